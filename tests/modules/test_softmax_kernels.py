"""The softmax kernels in Triton's interpreter, fp32, against PyTorch in float64.

The cases run in one subprocess (`in_interpreter`). `problem` and `errors_of` also serve the card
(tests/gpu/test_softmax_kernels_gpu.py).
"""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest import mock

import pytest
import torch

from data.schema import PADDING_ROW, RESERVED_ROWS
from modules import softmax_memory
from modules.losses import (
    FullSoftmax,
    SampledSoftmax,
    logsumexp_fused,
    logsumexp_reference,
)
from modules.repeats import NEVER, Repeats, SeenItems
from tests.modules.test_ssd_kernels import in_interpreter, relative

LIMITS = {"shapes": 2e-6, "losses": 2e-6, "corners": 5e-6}


@dataclass(frozen=True)
class Problem:
    """Arguments of `candidate_logsumexp` and the gradients of its two answers."""

    h_ND: torch.Tensor
    c_CD: torch.Tensor
    bias_C: torch.Tensor
    candidates_C: torch.Tensor | None
    targets_N: torch.Tensor | None
    place_N: torch.Tensor | None
    repeats: Repeats | None
    dlse_N: torch.Tensor
    dtarget_N: torch.Tensor


def problem(N, C, D, hits=False, places=False, repeats=False, device="cpu", dtype=torch.float32):
    """Random ids with repeats, so that targets hit; every fourth position has no weight."""
    g = torch.Generator().manual_seed(N + C + D)
    h, c, bias = (torch.randn(*shape, generator=g) for shape in ((N, D), (C, D), (C,)))
    bias[2::5] = -torch.inf
    ids, targets = (torch.randint(0, max(2, C // 2), (n,), generator=g) for n in (C, N))
    place = torch.randint(-3, C + 3, (N,), generator=g)
    at = place.clamp(0, max(C - 1, 0))
    if C:  # where the target's logit is finite
        place = place.where(bias[at].isfinite(), -1)
    dlse, dtarget = torch.randn(2, N, generator=g)
    dlse[3::4], dtarget[3::4] = 0.0, 0.0
    floats = [(h * 2 / D**0.5).to(device, dtype), c.to(device, dtype), bias.to(device)]
    ids, targets, place = (t.to(device) for t in (ids, targets, place))
    gradients = dlse.to(device), dtarget.to(device)
    some = (ids, targets) if hits else (None, None)
    held = random_repeats(N, C, g, device) if repeats else None
    return Problem(*floats, *some, place if places else None, held, *gradients)


def random_repeats(N, C, g, device):
    """Three histories of 40 tokens; a third of the candidates in none."""
    first = torch.full((3, -(-C // 128) * 128), NEVER, dtype=torch.int32)
    first[:, :C] = torch.randint(0, 60, (3, C), generator=g)
    first[first >= 40] = NEVER
    sequence = torch.randint(0, 3, (N,), generator=g)
    token = torch.randint(0, 40, (N,), generator=g, dtype=torch.int32)
    score = 2 * torch.randn(N, generator=g)
    first, *rest = (t.to(device) for t in (first, sequence, token, score))
    return Repeats(first[:, :C], *rest)


def answers(logsumexp, p, exact=False):
    """Both answers and their gradients."""
    kind = torch.float64 if exact else p.h_ND.dtype
    leaves = [t.detach().to(kind).requires_grad_() for t in (p.h_ND, p.c_CD)]
    bias_C, repeats = p.bias_C.double() if exact else p.bias_C, p.repeats
    if repeats is not None:
        score_N = repeats.score_N.to(torch.float64 if exact else torch.float32)
        leaves.append(score_N.detach().requires_grad_())
        repeats = repeats._replace(score_N=leaves[-1])
    ids = p.candidates_C, p.targets_N, p.place_N
    outputs = logsumexp(*leaves[:2], bias_C, *ids, repeats)
    wanted = [p.dlse_N.to(outputs[0].dtype), p.dtarget_N.to(outputs[1].dtype)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, wanted)]


def errors_of(p):
    """Relative errors by name; both must be -inf at the same positions."""
    got, want = answers(logsumexp_fused, p), answers(logsumexp_reference, p, exact=True)
    assert torch.equal(got[0].isinf(), want[0].isinf())
    got[0], want[0] = (lse.nan_to_num(neginf=0.0) for lse in (got[0], want[0]))
    names = ["lse", "target", "dh", "dc", "dscore"][: len(got)]
    return {name: relative(a, b) for name, a, b in zip(names, got, want, strict=True)}


def small_tiles(columns):
    """Many tiles, runs and chunks at sizes that the interpreter can do."""
    from modules.kernels import softmax, softmax_backward, softmax_launch

    launch = softmax_launch.Launch(16, 16, columns, 1, 1, "tf32x3")
    softmax.choose_launch = softmax_backward.choose_launch = lambda *_: launch
    softmax_backward.CHUNK_CANDIDATES, softmax_backward.CHUNK_BYTES = 32, 4 * 32 * 32
    softmax_launch.MULTIPROCESSORS = 5
    softmax_launch.runs_of.cache_clear()


@contextmanager
def nothing_kept():
    """As for problems whose exponentials do not fit."""
    with mock.patch.object(softmax_memory, "KEPT_SHARE", 0.0):
        yield


def errors_of_shapes():
    """Of every shape with all options, and of two that are cut everywhere with any of them."""
    shapes = [(1, 1, 16), (1, 90, 4), (33, 1, 8), (16, 32, 16), (40, 45, 12), (35, 70, 40)]
    every = [(shape, True, True, True) for shape in shapes]
    some = itertools.product(shapes[-2:], *3 * [[False, True]])
    small_tiles(16)
    problems = {str(case): problem(*case[0], *case[1:]) for case in {*every, *some}}
    errors = {name: errors_of(one) for name, one in problems.items()}
    with nothing_kept():
        return errors | {f"{name}, nothing kept": errors_of(p) for name, p in problems.items()}


def far_from_first_tile(first, others, device="cpu", dtype=torch.float32):
    """Added to the biases of 64 candidates, and of all others or, where `first` is 0, a third."""
    p = problem(40, 150, 8, False, True, True, device, dtype)
    bias_C = p.bias_C.clone()
    bias_C[:64] += first
    bias_C[64:][:: 3 if first == 0 else 1] += others
    return replace(p, bias_C=bias_C, place_N=p.place_N.where(p.place_N >= 64, -1))


def some_far_from_first_tile(device="cpu", dtype=torch.float32):
    """Every second position has repeats 70 above all else, none of them in the first tile."""
    p = problem(40, 150, 8, False, True, True, device, dtype)
    p.repeats.first_ZC[:, :64] = NEVER
    p.repeats.score_N[::2] = 70.0
    return p


def errors_of_corners():
    """With tiles as on the card."""
    p = problem(9, 13, 8, hits=True, places=True, repeats=True)
    zeros_N, zeros_C = torch.zeros_like(p.targets_N), torch.zeros_like(p.candidates_C)
    problems = {
        "as it is": p,
        "no weights": replace(p, dlse_N=p.dlse_N * 0, dtarget_N=p.dtarget_N * 0),
        "no rivals": replace(p, bias_C=p.bias_C - torch.inf, place_N=zeros_N - 1),
        "all hits": replace(p, candidates_C=zeros_C, targets_N=zeros_N),
        "exponentials beyond fp32": replace(p, h_ND=p.h_ND * 60),
        "all far above their first tile": far_from_first_tile(0.0, 70.0),
        "not quite far": far_from_first_tile(0.0, 35.0),
        "some far above their first tile": some_far_from_first_tile(),
        "all far below an empty first tile": far_from_first_tile(-torch.inf, -120.0),
        "a target's gradient alone": replace(p, dlse_N=p.dlse_N * 0),
        "the same, not quite far": replace(far_from_first_tile(0.0, 35.0), dlse_N=torch.zeros(40)),
        "one row many times": replace(p, c_CD=p.c_CD[:1].expand(13, 8)),
        "ids beyond 32 bits": replace(
            p, candidates_C=p.candidates_C + 2**40, targets_N=p.targets_N + 2**40
        ),
        "ids that agree in 32 bits": replace(p, targets_N=p.targets_N + 2**32),
        "places beyond 32 bits": replace(p, place_N=p.place_N + 2**32),
        "strided": replace(
            p,
            h_ND=p.h_ND.T.contiguous().T,
            candidates_C=p.candidates_C.repeat_interleave(2)[::2],
            targets_N=p.targets_N.repeat_interleave(3)[::3],
            place_N=p.place_N.repeat_interleave(2)[::2],
            repeats=p.repeats._replace(
                sequence_N=p.repeats.sequence_N.repeat_interleave(2)[::2],
                token_N=p.repeats.token_N.repeat_interleave(2)[::2],
                score_N=p.repeats.score_N[:1].expand(9),
            ),
            dlse_N=p.dlse_N[:1].expand(9),
        ),
        "no positions": problem(0, 13, 8, places=True, repeats=True),
        "no candidates": problem(3, 0, 8, repeats=True),
        "repeats out of the question": replace(
            p, repeats=p.repeats._replace(score_N=p.repeats.score_N - 1e4)
        ),
    }
    errors = {name: errors_of(one) for name, one in problems.items()}
    with nothing_kept():
        return errors | {f"{name}, nothing kept": errors_of(p) for name, p in problems.items()}


def losses_of_modules():
    """Errors of loss, dh and dc; the full softmax also cut over two ranks as `FullSoftmax` does."""
    g = torch.Generator().manual_seed(5)
    h, table = torch.randn(30, 8, generator=g), torch.randn(44, 8, generator=g)
    targets = torch.randint(RESERVED_ROWS, 41, (30,), generator=g)
    targets[3::4] = PADDING_ROW
    rows = torch.arange(44).where(torch.arange(44) < 41, PADDING_ROW)
    ids = torch.cat([torch.randint(RESERVED_ROWS, 41, (12,), generator=g), targets])
    ids[0] = targets[0]
    log_counts = torch.randn(42, generator=g)

    items = torch.randint(RESERVED_ROWS, 41, (30,), generator=g)
    bounds, score = torch.tensor([0, 11, 12, 27]), torch.randn(30, generator=g)
    held = SeenItems.of(items, bounds, None, score)

    def full(h, table, logsumexp):
        return FullSoftmax(0, logsumexp)(h, targets, table, rows, None, held)

    def two_ranks(h, table, logsumexp):
        parts = []
        for rank in range(2):
            mine = slice(22 * rank, 22 * rank + 22)
            bias = torch.zeros(22).masked_fill(rows[mine] < RESERVED_ROWS, -torch.inf)
            place = (targets - 22 * rank).where(targets != PADDING_ROW, -1)
            repeats = held.repeats_of_slice(22 * rank, 22)
            parts.append(logsumexp(h, table[mine], bias, place_N=place, repeats=repeats))
        lse = torch.logsumexp(torch.stack([lse for lse, _ in parts]), 0)
        target = parts[0][1] + parts[1][1]
        return (lse - target).where(targets != PADDING_ROW, 0.0).sum()

    def sampled(in_batch, logq):
        return lambda h, table, logsumexp: SampledSoftmax(12, in_batch, logq, logsumexp)(
            h, targets, table[ids], ids, log_counts, held
        )

    def run(loss, logsumexp, kind):
        leaves = [t.to(kind).requires_grad_() for t in (h, table)]
        value = loss(*leaves, logsumexp)
        return [value, *torch.autograd.grad(value, leaves)]

    wanted = {"full": (full, full), "full, two ranks": (two_ranks, full)}
    for in_batch, logq in itertools.product([False, True], repeat=2):
        one = sampled(in_batch, logq)
        wanted[f"sampled, in_batch={in_batch}, logq={logq}"] = (one, one)
    errors = {}
    for name, (ours, reference) in wanted.items():
        got = run(ours, logsumexp_fused, torch.float32)
        want = run(reference, logsumexp_reference, torch.float64)
        names = ["loss", "dh", "dc"]
        errors[name] = {n: relative(a, b) for n, a, b in zip(names, got, want, strict=True)}
    return errors


def opchecks():
    """With and without the optional tensors."""
    from modules.kernels.softmax import candidate_logsumexp_op

    for options in [(False, False, False), (True, True, True)]:
        p = problem(7, 20, 8, *options)
        leaves = (p.h_ND.requires_grad_(), p.c_CD.requires_grad_(), p.bias_C)
        ids = (p.candidates_C, p.targets_N, p.place_N)
        repeats = (None,) * 4 if p.repeats is None else p.repeats
        if p.repeats is not None:
            p.repeats.score_N.requires_grad_()
        for keep in (True, False):
            torch.library.opcheck(candidate_logsumexp_op, (*leaves, *ids, *repeats, keep))
    return "checked"


def small_gradients():
    """Of a target alone, 35 above its base and 1e-12 small, against the same at 1; by scaling."""
    p = far_from_first_tile(0.0, 35.0)
    alone = replace(p, dlse_N=p.dlse_N * 0)
    small = answers(logsumexp_fused, replace(alone, dtarget_N=p.dtarget_N * 1e-12))
    large = answers(logsumexp_fused, alone)
    pairs = zip(small[2:], large[2:], strict=True)
    return max(relative(1e12 * one, other) for one, other in pairs)


def gradients_of_places_elsewhere():
    """The largest gradient that a target's own makes where it is none of the candidates."""
    p = problem(40, 150, 8, False, True, True)
    p = replace(p, place_N=p.place_N * 0 - 1, dlse_N=p.dlse_N * 0)
    return max(float(one.abs().max()) for one in answers(logsumexp_fused, p)[2:])


def kept_after_a_backward():
    """Whether the exponentials are what they were, for another one."""
    p = problem(40, 45, 12, places=True, repeats=True)
    leaves = [t.detach().requires_grad_() for t in (p.h_ND, p.c_CD)]
    outputs = logsumexp_fused(*leaves, p.bias_C, place_N=p.place_N, repeats=p.repeats)
    kept = outputs[0].grad_fn.saved_tensors[-1].clone()
    torch.autograd.grad(outputs, leaves, [p.dlse_N, p.dtarget_N], retain_graph=True)
    return len(kept) == 40 and torch.equal(outputs[0].grad_fn.saved_tensors[-1], kept)


def report():
    """Runs inside the subprocess. `small_tiles` stays in force, so the shapes come last."""
    return {
        "corners": errors_of_corners(),
        "losses": losses_of_modules(),
        "opcheck": opchecks(),
        "kept": kept_after_a_backward(),
        "small gradients": small_gradients(),
        "elsewhere": gradients_of_places_elsewhere(),
        "shapes": errors_of_shapes(),
    }


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton")
    return in_interpreter("report", module="test_softmax_kernels")


@pytest.mark.parametrize(("kind", "cases"), [("shapes", 40), ("corners", 38), ("losses", 6)])
def test_values_and_gradients(results, kind, cases):
    assert len(results[kind]) == cases
    for case, errors in results[kind].items():
        assert all(error < LIMITS[kind] for error in errors.values()), (case, errors)


def test_opcheck(results):
    assert results["opcheck"] == "checked"


def test_a_backward_leaves_what_it_read(results):
    assert results["kept"]


def test_gradients_of_targets_alone(results):
    """Their exponentials are divided by factors that may be very small."""
    assert results["small gradients"] < 1e-5
    assert results["elsewhere"] == 0


def test_chunks_are_even_and_within_the_budget():
    softmax = pytest.importorskip("modules.kernels.softmax_backward")
    launch = softmax.choose_launch(256, torch.bfloat16)
    assert softmax.chunk_shape(16_384, 3_425, 2, launch) == (16_384, 3_456)
    assert softmax.chunk_shape(16_384, 1_000_008, 2, launch) == (16_384, 16_160)
    assert softmax.chunk_shape(262_144, 3_425, 2, launch) == (65_536, 3_456)
    positions, candidates = softmax.chunk_shape(1_000, 1_000_008, 4, launch)
    assert positions == 1_024
    assert 4 * positions * candidates < 1.05 * softmax.CHUNK_BYTES


def test_products_are_aligned():
    softmax = pytest.importorskip("modules.kernels.softmax_backward")
    launch = softmax.choose_launch(256, torch.bfloat16)
    assert [softmax.aligned(K, launch) for K in (1, 64, 3_424, 3_425)] == [32, 64, 3_424, 3_456]


def test_runs_fill_the_card():
    softmax = pytest.importorskip("modules.kernels.softmax_launch")
    assert softmax.runs_of(128, 27, 132) == 1  # one wave
    assert softmax.runs_of(128, 108, 264) == 2
    assert softmax.runs_of(1, 1, 132) == 1
    assert softmax.runs_of(8, 1_000, 132) == 16


def test_refuses_what_the_kernels_do_not_have():
    softmax = pytest.importorskip("modules.kernels.softmax")
    h, c, bias, ids = torch.zeros(3, 8), torch.zeros(5, 8), torch.zeros(5), torch.zeros(5).long()
    fused = softmax.candidate_logsumexp_triton
    with pytest.raises(ValueError, match="one dtype"):
        fused(h.double(), c.double(), bias)
    with pytest.raises(ValueError, match="needs c"):
        fused(h, c[:, :4], bias)
    with pytest.raises(ValueError, match="both"):
        fused(h, c, bias, candidates_C=ids)
    with pytest.raises(ValueError, match="int64"):
        fused(h, c, bias, place_N=ids[:3].int())
    held = random_repeats(3, 5, torch.Generator(), "cpu")
    with pytest.raises(ValueError, match="all or none"):
        fused(h, c, bias, first_ZC=held.first_ZC)
    with pytest.raises(ValueError, match="int32, int64, int32, fp32"):
        fused(h, c, bias, None, None, None, *held._replace(token_N=held.sequence_N))
    with pytest.raises(ValueError, match="a multiple of 128"):
        fused(h, c, bias, None, None, None, *held._replace(first_ZC=held.first_ZC.contiguous()))
