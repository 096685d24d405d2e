"""Forward and backward passes of encoders, as training runs them.

Legend: T tokens, S read positions, D width, B sequences.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from modules.encoder import Encoder
from modules.products import fp32_products
from tools.benchmarks.bench import Bench
from trainer.config import ModelConfig


def new_encoder(model: ModelConfig, device: torch.device) -> Encoder:
    """The config's encoder, in training mode, with the same weights each time."""
    torch.manual_seed(1)
    with torch.device(device):
        return Encoder(**asdict(model))


def encoder_pass(
    bench: Bench,
    encoder: Callable[..., Tensor],
    tokens: int,
    offsets_B1: Tensor,
    read_positions_S: Tensor | None = None,
    precision: str | None = None,
    parameters: list[nn.Parameter] | None = None,
) -> Callable[[], None]:
    """A call that runs `encoder` forward and backward to its input and parameters.

    read_positions_S: the last token of each sequence, or None for every token.
    """
    if parameters is None:
        assert isinstance(encoder, nn.Module)
        parameters = list(encoder.parameters())
    width = bench.config.model.width
    generator = torch.Generator(bench.device).manual_seed(3)
    x_TD = torch.randn(tokens, width, generator=generator, device=bench.device)
    x_TD.requires_grad_()
    rows = tokens if read_positions_S is None else len(read_positions_S)
    dh_SD = torch.randn(rows, width, generator=generator, device=bench.device)
    wanted = [x_TD, *parameters]

    def step() -> None:
        with fp32_products(precision or bench.precision):
            with bench.autocast(precision):
                h_SD = encoder(x_TD, offsets_B1, read_positions_S, read_positions_S is not None)
            torch.autograd.grad(h_SD, wanted, dh_SD.to(h_SD.dtype), allow_unused=True)

    return step
