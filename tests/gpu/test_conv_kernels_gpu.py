"""The Triton convolution on the card, against the reference in float64."""

import pytest
import torch

from modules.ssd import causal_conv_reference

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("E", "K"), [(640, 4), (100, 3), (16, 2)])
def test_values_gradients_and_equal_bits(E, K, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from modules.kernels.conv import causal_conv_op

    g = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device="cuda")

    lengths, T = [1, 2, 3, 700, 65, 1, 4000], 5000
    runs = [*lengths, 0, T - sum(lengths)]
    position = torch.cat([torch.arange(run, device="cuda") for run in runs])
    values = [normal(T, E + 32)[:, 16 : E + 16].to(dtype), normal(E, K), normal(E)]
    dy = normal(T, E).to(dtype)

    def run():
        leaves = [t.detach().requires_grad_() for t in values]
        y = causal_conv_op(*leaves, position)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    exact = [t.double().requires_grad_() for t in values]
    y_exact = causal_conv_reference(*exact, position)
    want = [y_exact, *torch.autograd.grad(y_exact, exact, dy.double())]
    got = run()
    limit = 4e-3 if dtype == torch.bfloat16 else 1e-5
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, want, strict=True)]
    assert all(error <= limit for error in errors), errors  # NaN is not
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(got, run(), strict=True))
