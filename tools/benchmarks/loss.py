"""Suite `loss`: softmax losses forward + backward to hidden states and candidate rows.

Legend: S tokens with a target, V items, C candidates, D width.
"""

import importlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.negatives import SampledCandidates
from data.schema import RESERVED_ROWS
from modules.losses import (
    FullSoftmax,
    LogSumExp,
    SampledSoftmax,
    logsumexp_fused,
    logsumexp_reference,
)
from modules.products import fp32_products
from tools.benchmarks.bench import Bench, UnavailableError
from tools.benchmarks.measure import Floor

CATALOGUES = (3_417, 100_000, 1_000_000)
DRAWS = (1_024, 16_384)
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]


def run(bench: Bench) -> None:
    tokens = bench.size(16_384, 1_024, 256)
    catalogues = [CATALOGUES[0], bench.size(CATALOGUES[1], CATALOGUES[1], 20_000)]
    if bench.on_gpu and not bench.quick:
        catalogues.append(CATALOGUES[2])
    for items in catalogues:
        full(bench, tokens, items)
    for draws in DRAWS if bench.on_gpu else DRAWS[:1]:
        for in_batch in (False, True):
            with bench.case(f"sampled softmax, {draws:,} draws"):
                sampled(bench, tokens, catalogues[-1], draws, in_batch)


def full(bench: Bench, tokens: int, items: int) -> None:
    """Ours and its peers at one catalogue size, candidates being all rows of the table."""
    rows, name = RESERVED_ROWS + items, f"full, {items:,} items"
    work = floor(tokens, rows, bench.config.model.width, bench.precision)
    for kind, logsumexp in ours(bench).items():
        with bench.case(f"{name}, {kind}"):
            loss = FullSoftmax(0, logsumexp)
            _record(bench, name, loss, _full_inputs(bench, tokens, rows), work, kind=kind)
    peers: dict[str, Callable[..., Tensor]] = {
        "plain logits": _plain,
        "torch linear_cross_entropy": _torch_fused,
        "liger-kernel": _liger,
    }
    for by, peer in peers.items():
        with bench.case(f"{name} [{by}]", peer=True):
            if by == "plain logits":
                _refuse_unless_it_fits(bench, tokens, rows)
            _record(bench, name, peer, _full_inputs(bench, tokens, rows), work, by=by)


def ours(bench: Bench) -> dict[str, LogSumExp]:
    """What sums the exponentials: the kernels need a GPU."""
    reference: dict[str, LogSumExp] = {"PyTorch": logsumexp_reference}
    return reference | ({"Triton": logsumexp_fused} if bench.on_gpu else {})


def sampled(bench: Bench, tokens: int, items: int, draws: int, in_batch: bool) -> None:
    """Draws by popularity from `items`; with `in_batch` the tokens' targets are rivals as well."""
    random = np.random.default_rng(1)
    counts = np.zeros(RESERVED_ROWS + items, np.int64)
    counts[RESERVED_ROWS:] = random.integers(1, 1_000, items)
    targets_S = random.integers(RESERVED_ROWS, RESERVED_ROWS + items, tokens)
    source = SampledCandidates("popularity", draws, counts, in_batch, seed=1)
    candidates_C, log_counts_C = source.for_pack(0, targets_S)
    generator = torch.Generator(bench.device).manual_seed(1)
    h_SD, c_CD = _leaves(bench, generator, tokens, len(candidates_C))
    ids, counts_C, targets = (
        torch.from_numpy(one).to(bench.device) for one in (candidates_C, log_counts_C, targets_S)
    )
    rivals = draws + in_batch * tokens
    name = f"sampled, {draws:,}" + (" + batch" if in_batch else " draws")
    work = floor(tokens, rivals, bench.config.model.width, bench.precision)
    for kind, logsumexp in ours(bench).items():
        loss = SampledSoftmax(draws, in_batch, logq=True, logsumexp=logsumexp)
        _record(bench, name, loss, (h_SD, targets, c_CD, ids, counts_C), work, kind=kind)


def floor(tokens: int, candidates: int, width: int, precision: str) -> Floor:
    """Three products: logits, and the gradients of both sides. fp32 rows in, fp32 gradients out."""
    operations = 3 * 2.0 * tokens * candidates * width
    return Floor(2 * 4 * (tokens + candidates) * width, operations, precision)


def _record(
    bench: Bench,
    name: str,
    loss: Callable[..., Tensor],
    inputs: Inputs,
    work: Floor,
    *,
    by: str = "ours",
    kind: str = "",
) -> None:
    """Launched kernel by kernel; ours on a GPU also as the trainer runs it, from a CUDA graph.

    kind: which of ours.
    """
    h_SD, _, c_CD, *_ = inputs

    def step() -> None:
        with fp32_products(bench.precision):
            with bench.autocast():
                total = loss(*inputs)
            torch.autograd.grad(total, (h_SD, c_CD))

    tokens, gradients = h_SD.shape[0], 4 * (h_SD.numel() + c_CD.numel())
    label = f"{name}: fwd+bwd" + (f", {kind}" if kind else "")
    bench.record(label, step, by=by, work=tokens, floor=work, gradient_bytes=gradients)
    if kind and bench.on_gpu:
        label = f"{label} graph"
        bench.record(label, step, work=tokens, floor=work, gradient_bytes=None, graph=True)


def _full_inputs(bench: Bench, tokens: int, rows: int) -> Inputs:
    generator = torch.Generator(bench.device).manual_seed(1)
    h_SD, c_CD = _leaves(bench, generator, tokens, rows)
    targets_S = torch.randint(
        RESERVED_ROWS, rows, (tokens,), generator=generator, device=bench.device
    )
    return h_SD, targets_S, c_CD, torch.arange(rows, device=bench.device), None


def _leaves(
    bench: Bench, generator: torch.Generator, tokens: int, candidates: int
) -> tuple[Tensor, Tensor]:
    """Hidden states and candidate rows as the trainer has them: fp32, cast under autocast."""
    width = bench.config.model.width

    def normal(rows: int, scale: float) -> Tensor:
        drawn = torch.randn(rows, width, generator=generator, device=bench.device)
        return drawn.mul_(scale).requires_grad_()

    return normal(tokens, 1.0), normal(candidates, 0.1)


def _refuse_unless_it_fits(bench: Bench, tokens: int, candidates: int) -> None:
    """The plain loss holds logits, their fp32 log-softmax and both gradients at once."""
    needed = 12 * tokens * candidates
    there = torch.cuda.mem_get_info(bench.device)[0] if bench.on_gpu else 2 * 2**30
    if needed > there:
        raise UnavailableError(
            f"needs {needed / 2**30:.0f} GiB of logits, {there / 2**30:.0f} are free"
        )


def _plain(h_SD: Tensor, targets_S: Tensor, c_CD: Tensor, *_: Tensor | None) -> Tensor:
    return F.cross_entropy((h_SD @ c_CD.T).float(), targets_S, reduction="sum")


def _torch_fused(h_SD: Tensor, targets_S: Tensor, c_CD: Tensor, *_: Tensor | None) -> Tensor:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        raise UnavailableError(f"torch {torch.__version__} has none; 2.13 has")
    return fused(*_cast(h_SD, c_CD), targets_S, reduction="sum")


def _liger(h_SD: Tensor, targets_S: Tensor, c_CD: Tensor, *_: Tensor | None) -> Tensor:
    if not h_SD.is_cuda:
        raise UnavailableError("its kernels are for GPUs")
    try:
        liger = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError as error:
        raise UnavailableError("liger-kernel is not installed") from error
    arguments = (*_cast(h_SD, c_CD), targets_S, None, None, -100, 0.0, 0.0, "sum")
    return liger.LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]


def _cast(h_SD: Tensor, c_CD: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does to the inputs of a product."""
    device = h_SD.device.type
    if not torch.is_autocast_enabled(device):
        return h_SD, c_CD
    kind = torch.get_autocast_dtype(device)
    return h_SD.to(kind), c_CD.to(kind)
