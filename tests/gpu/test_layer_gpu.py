"""The layer's kernels and the whole encoder on the card, against float64."""

import copy

import pytest
import torch

from modules.encoder import Encoder
from modules.products import fp32_products
from tests.modules import test_mixer_kernels as core
from tests.modules.test_norm_kernels import gated_cases, gelu_cases, relative, residual_cases

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float32]
LIMITS = {torch.bfloat16: 5e-3, torch.float32: 2e-6}
MIXER_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 5e-5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 512), (3001, 512), (777, 96)])
@pytest.mark.parametrize("cases", [gated_cases, residual_cases, gelu_cases])
def test_kernel_values_and_gradients(cases, shape, dtype):
    for case, errors in cases(*shape, device="cuda", dtype=dtype):
        assert all(error < LIMITS[dtype] for error in errors.values()), (case, errors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0, 40_000])  # with few chunks each one's heads are split
@pytest.mark.parametrize(("width", "state", "head"), [(256, 64, 64), (256, 64, 16), (96, 32, 16)])
@pytest.mark.parametrize("direction", core.DIRECTIONS)
def test_mixer_core_values_gradients_and_equal_bits(direction, width, state, head, fill, dtype):
    case = mixer_case(width, state, head, fill, dtype)
    errors = core.errors_of(case, direction)
    assert all(error < MIXER_LIMITS[dtype] for error in errors.values()), errors
    first, second = (core.triton_outputs(case, direction) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fill", [0, 40_000])
@pytest.mark.parametrize(
    ("width", "state", "head"),
    [(256, 64, 64), (256, 64, 16), (96, 32, 16), (256, 128, 128), (64, 16, 32)],
)
@pytest.mark.parametrize("both", [False, True])
def test_mixer_last_values_gradients_and_equal_bits(both, width, state, head, fill, dtype):
    case = mixer_case(width, state, head, fill, dtype)
    errors = core.errors_of_last(case, both)
    assert all(error < MIXER_LIMITS[dtype] for error in errors.values()), errors
    first, second = (core.last_outputs(case, both) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def mixer_case(width, state, head, fill, dtype):
    lengths = [1, 63, 64, 65, 200, 1, 2, 1500, *[40] * (fill // 40)]
    sizes = (width, state, head, 4)
    return core.make_case(lengths, sum(lengths) + 77, *sizes, dtype=dtype, device="cuda")


@pytest.mark.parametrize("precision", ["bf16", "fp32", "tf32"])
@pytest.mark.parametrize("read", ["all", "any", "last"])
@pytest.mark.parametrize(
    ("kind", "restore_order"),
    [("causal", False), ("bidirectional", False), ("bidirectional", True)],
)
def test_encoder_values_and_gradients(kind, restore_order, read, precision):
    torch.manual_seed(0)
    encoder = Encoder(
        kind, width=128, layers=2, state=32, head=32, expand=2, conv=4, dropout=0.0,
        norm_embedding=True, restore_order=restore_order,
    )  # fmt: skip
    offsets = torch.tensor([0, 1, 2, 130, 193, 500, 500])
    x, d = torch.randn(503, 128), torch.randn(503, 128)
    read_S = None if read == "all" else torch.cat([offsets[1:6] - 1, offsets[:1]])

    def run(encoder, x, offsets, read_S, d):
        x = x.clone().requires_grad_()
        out = encoder(x, offsets, read_S, read == "last")
        used = {"all": 500, "any": 6, "last": 5}  # the last position's sequence is empty
        out = out[: used[read]]
        return [out, *torch.autograd.grad(out, [x, *encoder.parameters()], d[: len(out)])]

    doubles = copy.deepcopy(encoder).double()
    expected = run(doubles, x.double(), offsets, read_S, d.double())
    bf16 = torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16")
    with fp32_products(precision), bf16:
        got = run(
            encoder.cuda(), x.cuda(), offsets.cuda(), None if read_S is None else read_S.cuda(),
            d.cuda(),
        )  # fmt: skip
    names = ["out", "x", *[name for name, _ in encoder.named_parameters()]]
    errors = {n: relative(a.cpu(), b) for n, a, b in zip(names, got, expected, strict=True)}
    assert precision == "fp32" or max(errors.values()) > 1e-4  # products are rounded
    limit = 5e-5 if precision == "fp32" else 5e-2
    assert all(error < limit for error in errors.values()), errors


@pytest.mark.parametrize("restore_order", [False, True])
@pytest.mark.parametrize("read_last", [False, True])
def test_a_graph_of_both_directions_follows_new_lengths(read_last, restore_order):
    torch.manual_seed(0)
    encoder = Encoder(
        "bidirectional", width=128, layers=2, state=64, head=16, expand=2, conv=4, dropout=0.0,
        norm_embedding=True, restore_order=restore_order,
    ).cuda()  # fmt: skip
    x = torch.randn(3000, 128, device="cuda", requires_grad=True)
    offsets = torch.tensor([0, 1, 700, 701, 2900], device="cuda")
    d = torch.randn(4 if read_last else len(x), 128, device="cuda")

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False):
            out = encoder(x, offsets, offsets[1:] - 1 if read_last else None, read_last)
        return [out.detach(), *torch.autograd.grad(out, [x, *encoder.parameters()], d)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    offsets.copy_(torch.tensor([0, 1400, 1463, 2999, 3000]))
    graph.replay()
    for one, other in zip(got, run(), strict=True):
        assert torch.equal(one, other)


def test_a_captured_graph_draws_new_masks_and_its_backward_the_same():
    from modules.kernels.residual_norm import residual_norm_triton

    a, x = (torch.randn(512, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    w = torch.zeros(256, device="cuda", requires_grad=True)
    bias = torch.ones(256, device="cuda", requires_grad=True)

    def step():
        out = residual_norm_triton(a, x, w, bias, 1e-12, 0.5, torch.bfloat16)
        return out, torch.autograd.grad(out.sum(), bias)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dbias = step()
    masks = []
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        masks.append(out.detach().clone())
        torch.testing.assert_close(dbias, masks[-1].float().sum(0))
    assert not torch.equal(*masks)
