"""The Triton SSD kernels on the card, against float64.

Believe nothing else there: Triton 3.6 has miscompiled such kernels on Hopper, for some tile shapes
and numbers of heads only (see `lint_sass.py` beside this), so shapes are covered widely and runs
repeated bit by bit.
"""

import itertools

import pytest
import torch

from modules.products import DTYPES, fp32_products

pytestmark = pytest.mark.gpu

MIXED = [1, 63, 64, 65, 200, 1, 2, 1500, 128, 333, 1]
LIMIT = {"bf16": 6e-3, "fp32": 2e-5, "tf32": 6e-3}


@pytest.fixture(autouse=True)
def needs_a_card():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def make_inputs(lengths, T, H, P, N, dtype, seed=0):
    """x, B and C are slices of one wider tensor, as they are behind the convolution."""
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    x, B, C = normal(T, H * P + 2 * N).to(dtype).split([H * P, N, N], dim=1)
    dt = torch.nn.functional.softplus(normal(T, H) - 2)
    A = -0.2 - 8 * torch.rand(H, generator=g, device="cuda")
    offsets = torch.tensor([0, *lengths, 0], device="cuda").cumsum(0)  # the last one is unused
    dfinal = normal(len(lengths) + 1, H, P, N)
    inputs = [x.unflatten(1, (H, P)), dt, A, B, C, normal(H)]
    return inputs, offsets, normal(T, H, P).to(dtype), dfinal


def exact_sequence(x, dt, A, B, C, D):
    """One sequence, one head, float64: the quadratic form and the final state [P, N]."""
    c = (dt * A).cumsum(0)
    later = torch.ones(len(c), len(c), dtype=torch.bool, device=c.device).triu(1)
    decay = torch.exp((c[:, None] - c[None, :]).masked_fill(later, -torch.inf))
    y = ((C @ B.T) * decay) @ (dt[:, None] * x) + D * x
    return y, ((torch.exp(c[-1] - c) * dt)[:, None] * x).T @ B


def exact(inputs, offsets, dy, dfinal):
    """y, final states and gradients in float64, one sequence and head at a time."""
    x, dt, A, B, C, D = (t.detach().double() for t in inputs)
    y, final = torch.zeros_like(x), torch.zeros_like(dfinal, dtype=torch.float64)
    gradients = [torch.zeros_like(t) for t in (x, dt, A, B, C, D)]
    ends = offsets.tolist()
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        for h in range(x.shape[1] if begin < end else 0):
            s = slice(begin, end)
            places = [(s, h), (s, h), h, s, s, h]
            pairs = zip((x, dt, A, B, C, D), places, strict=True)
            leaves = [t[k].clone().requires_grad_() for t, k in pairs]
            y_bh, final_bh = exact_sequence(*leaves)
            y[s, h], final[b, h] = y_bh.detach(), final_bh.detach()
            loss = (y_bh * dy[s, h].double()).sum() + (final_bh * dfinal[b, h].double()).sum()
            for total, k, g in zip(
                gradients, places, torch.autograd.grad(loss, leaves), strict=True
            ):
                total[k] += g
    return y, final, gradients


def recurrence(x, dt, A, B, C, D):
    """One sequence, float64, token by token: [T, H, P]."""
    h, ys = x.new_zeros(*x.shape[1:], B.shape[1]), []
    for t in range(len(x)):
        decay = torch.exp(dt[t] * A)[:, None, None]
        h = decay * h + (dt[t, :, None] * x[t])[:, :, None] * B[t]
        ys.append(h @ C[t] + D[:, None] * x[t])
    return torch.stack(ys)


def run(inputs, offsets, dy, dfinal=None):
    from modules.kernels.ssd import ssd_op

    leaves = [t.detach().requires_grad_() for t in inputs]
    y, final, _ = ssd_op(*leaves, offsets, dfinal is not None)
    outputs, gradients = ([y], [dy]) if dfinal is None else ([y, final], [dy, dfinal])
    return y.detach(), final.detach(), torch.autograd.grad(outputs, leaves, gradients)


def compare(inputs, offsets, dy, dfinal, used, precision):
    with fp32_products(precision):
        y, final, got = run(inputs, offsets, dy, dfinal)
    dfinal_or_zero = torch.zeros(
        offsets.numel() - 1, *dy.shape[1:], inputs[3].shape[1], device="cuda"
    )
    dfinal_or_zero = dfinal_or_zero if dfinal is None else dfinal
    y_exact, final_exact, want = exact(inputs, offsets, dy, dfinal_or_zero)
    limit = LIMIT[precision]

    def relative(a, b, scale=None):
        return ((a.double() - b).norm() / (b.norm() if scale is None else scale)).item()

    errors = {"y": relative(y, y_exact)}
    if dfinal is not None:
        errors["final"] = relative(final, final_exact)
    for name, a, b in zip(["dx", "ddt", "dA", "dB", "dC", "dD"], got, want, strict=True):
        # dA sums terms of random sign: its rounding is that of the terms, not of their sum
        scale = (inputs[1].double() * want[1]).norm() if name == "dA" else None
        errors[name] = relative(a, b, scale)
    assert all(e <= limit for e in errors.values()), errors
    for padded in (y, got[0], got[1], got[3], got[4]):
        assert (padded[used:] == 0).all()


def test_the_quadratic_form_is_the_recurrence():
    inputs, *_ = make_inputs([150], 150, 2, 16, 16, torch.float32)
    x, dt, A, B, C, D = (t.double() for t in inputs)
    by_token = recurrence(x, dt, A, B, C, D)
    for h in range(2):
        y, _ = exact_sequence(x[:, h], dt[:, h], A[h], B, C, D[h])
        torch.testing.assert_close(y, by_token[:, h], rtol=1e-10, atol=1e-10)


ALL = [(P, N, 3) for P in (16, 32, 64, 128) for N in (16, 32, 64, 128)]
MORE_HEADS = [(16, 64, 1), (16, 64, 8), (32, 128, 1), (32, 64, 8), (64, 64, 1), (64, 64, 8)]


@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize(("P", "N", "H"), ALL + MORE_HEADS)
def test_values_and_gradients(P, N, H, precision):
    inputs, offsets, dy, dfinal = make_inputs(MIXED, 2400, H, P, N, DTYPES[precision])
    compare(inputs, offsets, dy, dfinal if H == 3 else None, sum(MIXED), precision)


@pytest.mark.parametrize("precision", LIMIT)
@pytest.mark.parametrize("P", [16, 64])
def test_lengths_from_1_to_20000(P, precision):
    lengths = [1, 9999, 3, 777, 20000 if precision == "bf16" else 7000, 64, 1, 500]
    used = sum(lengths)
    inputs, offsets, dy, _ = make_inputs(lengths, used + 100, 2, P, 64, DTYPES[precision])
    compare(inputs, offsets, dy, None, used, precision)


@pytest.mark.parametrize(("P", "H"), [(16, 32), (64, 8)])
def test_many_tokens_give_the_same_bits_every_time(P, H):
    """No race and no atomic: forward and all gradients, 262,144 tokens, eight times."""
    lengths = torch.randint(1, 400, (1300,), generator=torch.Generator().manual_seed(1)).tolist()
    inputs, offsets, dy, dfinal = make_inputs(lengths, 2**18 + 999, H, P, 64, torch.bfloat16)
    first = run(inputs, offsets, dy, dfinal)
    for _ in range(7):
        junk = torch.full((2**28,), float("nan"), device="cuda")  # poison what is reused
        del junk
        again = run(inputs, offsets, dy, dfinal)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert all(torch.equal(a, b) for a, b in zip(first[2], again[2], strict=True))


def test_a_cuda_graph_follows_new_lengths():
    """Nothing reads lengths on the host: a captured graph serves any offsets of equal shape."""
    inputs, offsets, dy, _ = make_inputs(MIXED, 2400, 8, 64, 64, torch.bfloat16)
    run(inputs, offsets, dy)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _, gradients = run(inputs, offsets, dy)
    other = torch.tensor([0, 700, 701, 900] + [2300] * (offsets.numel() - 4), device="cuda")
    offsets.copy_(other)
    graph.replay()
    y_eager, _, gradients_eager = run(inputs, offsets, dy)
    assert torch.equal(y, y_eager)
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_eager, strict=True))
