"""The softmax kernels on the card, against float64, widely (`test_ssd_kernels_gpu.py` says why)."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from data.schema import PADDING_ROW, RESERVED_ROWS
from modules import softmax_memory
from modules.losses import FullSoftmax, SampledSoftmax, logsumexp_fused, logsumexp_reference
from modules.products import fp32_products
from tests.modules.test_softmax_kernels import (
    answers,
    errors_of,
    far_from_first_tile,
    nothing_kept,
    problem,
    relative,
    some_far_from_first_tile,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]
# The logsumexp is fp32 in both; exponentials and gradients are rounded to the dtype.
LIMITS = {
    torch.bfloat16: {"lse": 1e-5, "target": 1e-5, "dh": 6e-3, "dc": 6e-3, "dscore": 1e-4},
    torch.float32: {"lse": 1e-5, "target": 1e-5, "dh": 2e-5, "dc": 2e-5, "dscore": 1e-4},
}


@pytest.fixture(autouse=True)
def needs_a_card():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def assert_right(p, slack=1):
    """With exponentials kept for the backward, and made anew there."""
    limits = LIMITS[p.h_ND.dtype]
    for how in (nullcontext(), nothing_kept()):
        with how:
            errors = errors_of(p)
        assert all(errors[name] < slack * limits[name] for name in errors), (how, errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hits", "places"), [(False, True), (True, False), (False, False)])
@pytest.mark.parametrize("C", [1, 127, 129, 3425])
@pytest.mark.parametrize("N", [1, 127, 129, 1500])
@pytest.mark.parametrize("D", [64, 256])
def test_values_and_gradients(D, N, C, hits, places, dtype):
    assert_right(problem(N, C, D, hits, places, hits == places, "cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [4, 100, 128, 260, 512])
def test_widths(D, dtype):
    assert_right(problem(700, 1001, D, True, True, True, "cuda", dtype))


def test_tf32_rounds_products():
    p = problem(1500, 3425, 256, False, True, True, "cuda", torch.float32)
    with fp32_products("tf32"):
        errors = errors_of(p)
    assert errors["dh"] > 1e-5
    assert all(error < 1e-2 for error in errors.values()), errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "C"), [(16_384, 3_425), (16_384, 17_408), (600, 100_008), (40_000, 20_003)]
)
def test_sizes_of_a_training_step(N, C, dtype):
    for hits in (False, True):
        assert_right(problem(N, C, 256, hits, not hits, True, "cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk_bytes", [2**20, 2**22])
def test_chunks_change_nothing(dtype, chunk_bytes, monkeypatch):
    from modules.kernels import softmax_backward

    monkeypatch.setattr(softmax_backward, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(softmax_backward, "CHUNK_CANDIDATES", 512)
    assert_right(problem(3000, 5001, 256, False, True, True, "cuda", dtype))
    assert_right(problem(3000, 5001, 256, True, False, False, "cuda", dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_corners(dtype):
    p = problem(300, 500, 256, True, False, True, "cuda", dtype)
    zeros_N, zeros_C = torch.zeros_like(p.targets_N), torch.zeros_like(p.candidates_C)
    assert_right(replace(p, bias_C=p.bias_C - torch.inf))
    assert_right(replace(p, candidates_C=zeros_C, targets_N=zeros_N))
    assert_right(replace(p, h_ND=p.h_ND * 60), slack=60 if dtype == torch.float32 else 1)
    assert_right(replace(p, targets_N=p.targets_N + 2**32))
    for first, others in ((0.0, 35.0), (0.0, 70.0), (-torch.inf, -120.0)):
        assert_right(far_from_first_tile(first, others, "cuda", dtype), slack=5)
    assert_right(some_far_from_first_tile("cuda", dtype), slack=5)
    nothing = answers(logsumexp_fused, replace(p, dlse_N=p.dlse_N * 0, dtarget_N=p.dtarget_N * 0))
    assert not nothing[2].any()
    assert not nothing[3].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_targets_that_are_all_but_certain(dtype):
    """Their weight and what the loss takes off it nearly cancel."""
    p = problem(700, 1_001, 64, False, True, True, "cuda", dtype)
    own_N = torch.arange(700, device="cuda")
    certain = replace(
        p, bias_C=torch.zeros_like(p.bias_C), h_ND=p.c_CD[:700] / 5, place_N=own_N,
        dlse_N=torch.ones_like(p.dlse_N), dtarget_N=-torch.ones_like(p.dlse_N),
    )  # fmt: skip
    assert_right(certain, slack=1 if dtype == torch.bfloat16 else 20)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_every_time(dtype, kept, monkeypatch):
    monkeypatch.setattr(softmax_memory, "KEPT_SHARE", 0.05 if kept else 0.0)
    p = problem(16_384, 3_425, 256, False, True, True, "cuda", dtype)
    first = answers(logsumexp_fused, p)
    for _ in range(7):
        junk = torch.full((2**28,), float("nan"), device="cuda")  # poison what is reused
        del junk
        again = answers(logsumexp_fused, p)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


class Core(torch.nn.Module):
    """A loss under bf16 autocast that takes tensors alone, as a graph wants it."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, h_SD, targets_S, c_CD, candidates_C, *log_counts_C):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            counts = log_counts_C[0] if log_counts_C else None
            return self.loss(h_SD, targets_S, c_CD, candidates_C, counts)


def loss_inputs(kind, seed):
    """(loss with our kernels, the reference, inputs) at 4,096 positions, a quarter padding."""
    g = torch.Generator("cuda").manual_seed(seed)
    table = torch.randn(3_425, 256, generator=g, device="cuda") * 0.1
    h = torch.randn(4_096, 256, generator=g, device="cuda")
    targets = torch.randint(RESERVED_ROWS, 3_425, (4_096,), generator=g, device="cuda")
    targets[3::4] = PADDING_ROW
    if kind == "full":
        losses = FullSoftmax(0, logsumexp_fused), FullSoftmax(0, logsumexp_reference)
        return *losses, (h, targets, table, torch.arange(3_425, device="cuda"))
    draws = torch.randint(RESERVED_ROWS, 3_425, (1_024,), generator=g, device="cuda")
    ids = torch.cat([draws, targets])
    counts = torch.randn(len(ids), generator=g, device="cuda")
    losses = (
        SampledSoftmax(1_024, True, True, one) for one in (logsumexp_fused, logsumexp_reference)
    )
    return *losses, (h, targets, table[ids], ids, counts)


def loss_and_gradients(core, inputs):
    h, targets, c, *rest = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (h, c)]
    total = core(leaves[0], targets, leaves[1], *rest)
    return [total, *torch.autograd.grad(total * 0.25, leaves)]


def exact_loss_and_gradients(loss, inputs):
    """In float64, from rows rounded to bf16, as the products see them."""
    h, targets, c, ids, *counts = inputs
    leaves = [t.bfloat16().double().requires_grad_() for t in (h, c)]
    total = loss(leaves[0], targets, leaves[1], ids, counts[0].double() if counts else None)
    return [total, *torch.autograd.grad(total * 0.25, leaves)]


@pytest.mark.parametrize("kind", ["full", "sampled"])
def test_a_captured_loss_follows_new_inputs(kind):
    """Forward and backward in graphs of their own, which replay apart."""
    fused, reference, inputs = loss_inputs(kind, seed=1)
    sample = [t.clone().requires_grad_(place in (0, 2)) for place, t in enumerate(inputs)]
    captured = torch.cuda.make_graphed_callables(Core(fused), tuple(sample))
    for seed in (2, 3):
        *_, inputs = loss_inputs(kind, seed)
        replayed = [t.clone() for t in loss_and_gradients(captured, inputs)]
        eager = loss_and_gradients(Core(fused), inputs)
        exact = exact_loss_and_gradients(reference, inputs)
        assert torch.equal(replayed[0], eager[0])
        for got in (replayed, eager):
            errors = [relative(a, b) for a, b in zip(got, exact, strict=True)]
            assert errors[0] < 1e-4, errors  # the sampled target's logit is not rounded to bf16
            assert all(error < 6e-3 for error in errors), errors  # NaN is not


def test_a_million_candidates_fit_in_two_gibibytes():
    """Beyond the inputs, which are fp32 as the trainer's are; the gradients count."""
    h = torch.randn(16_384, 256, device="cuda", requires_grad=True)
    c = (torch.randn(1_000_008, 256, device="cuda") * 0.1).requires_grad_()
    targets = torch.randint(RESERVED_ROWS, len(c), (len(h),), device="cuda")
    core, ids = Core(FullSoftmax(0, logsumexp_fused)), torch.arange(len(c), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(core(h, targets, c, ids), (h, c))
    assert torch.cuda.max_memory_allocated() - before < 2 * 2**30
    assert all(one.isfinite().all() for one in gradients)


def test_opcheck():
    from modules.kernels.softmax import candidate_logsumexp_op

    p = problem(200, 300, 64, True, False, True, "cuda", torch.bfloat16)
    leaves = (p.h_ND.requires_grad_(), p.c_CD.requires_grad_(), p.bias_C)
    p.repeats.score_N.requires_grad_()
    ids = (p.candidates_C, p.targets_N, None)
    for keep in (True, False):
        torch.library.opcheck(candidate_logsumexp_op, (*leaves, *ids, *p.repeats, keep))
