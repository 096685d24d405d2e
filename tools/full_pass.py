"""What a pass over whole histories costs on this device, an event: states are compared with it.

It is timed as tools.score_histories encodes here, in batches of its size: by the bundle's own
model, and on a GPU also by the trainer's kernels. Reading histories and ranking items are left out.

Legend: T packed tokens, B sequences, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.bundle import Bundle
from data.errors import InputError
from data.schema import RESERVED_ROWS
from tools.benchmarks.measure import Timer
from tools.score_histories import default_tokens, kernel_scorer

GPU_KERNELS = "bf16"  # the fast way of tools.score_histories on a GPU
# Events of a history. One long history costs a GPU more than many short ones, and it is where
# histories are long that states are thought of.
PROBE_LENGTH = {"cpu": 128, "cuda": 4096}
BUDGET_MS = 300.0  # of each timing
WARM_UP = 4  # calls: TorchScript compiles anew after the first ones

Encode = Callable[[Tensor, Tensor], Tensor]  # items_T and offsets_B1, on the CPU, to h_BD


@dataclass(frozen=True)
class FullPass:
    """One way to read whole histories. kernels: as tools.score_histories names it. reason: why
    seconds_an_event is None."""

    kernels: str
    seconds_an_event: float | None
    reason: str = ""


def full_passes(bundle: Bundle) -> list[FullPass]:
    """All ways on the bundle's device, whose item rows may lie in one block afterwards."""
    passes = [_timed(bundle, bundle.manifest.format, _by_bundle)]
    if bundle.device.type == "cuda":
        passes.append(_timed(bundle, GPU_KERNELS, _by_kernels))
    return passes


def _by_bundle(bundle: Bundle) -> Encode:
    def encode(items_T: Tensor, offsets_B1: Tensor) -> Tensor:
        return bundle.model.hidden(items_T.to(bundle.device), offsets_B1.to(bundle.device))

    return encode


def _by_kernels(bundle: Bundle) -> Encode:
    return kernel_scorer(bundle, bundle.device, GPU_KERNELS).hidden


def _timed(bundle: Bundle, kernels: str, make: Callable[[Bundle], Encode]) -> FullPass:
    """Time a way, or say why not: the states that it is compared with are written by now."""
    try:
        return FullPass(kernels, _seconds_an_event(bundle, kernels, make(bundle)))
    except InputError as error:
        return FullPass(kernels, None, str(error))
    except RuntimeError as error:  # TorchScript makes this one of the device's error
        if "out of memory" not in str(error):
            raise
        return FullPass(kernels, None, "what it needs does not fit beside the item table")


def _seconds_an_event(bundle: Bundle, kernels: str, encode: Encode) -> float:
    """The median, warm, for a batch of random histories."""
    device = bundle.device.type
    tokens, generator = default_tokens(kernels, device), torch.Generator().manual_seed(1)
    items_T = torch.randint(
        RESERVED_ROWS, bundle.manifest.table_rows, [tokens], generator=generator
    )
    offsets_B1 = torch.arange(0, tokens + 1, PROBE_LENGTH[device])
    for _ in range(WARM_UP):
        encode(items_T, offsets_B1)
    timer = Timer(bundle.device, BUDGET_MS)
    return 1e-3 * timer(lambda: encode(items_T, offsets_B1)).median_ms / tokens
