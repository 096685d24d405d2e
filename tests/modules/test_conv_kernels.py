"""The Triton convolution in the interpreter (a subprocess), against the reference in float64."""

import pytest
import torch

from tests.modules.test_ssd_kernels import in_interpreter, relative

CASES = {
    # lengths, tokens, E, K
    "short ones": ([1, 2, 3, 17, 40, 1], 70, 20, 4),
    "one long": ([300], 300, 130, 4),
    "three taps": ([5, 5], 10, 16, 3),
    "nothing but padding": ([0, 0], 5, 16, 4),
}


def errors_of_all():
    """Runs inside the subprocess: relative errors of y and its gradients, and opcheck."""
    from modules.kernels.conv import causal_conv_op
    from modules.ssd import causal_conv_reference

    errors = {}
    for name, (lengths, T, E, K) in CASES.items():
        g = torch.Generator().manual_seed(0)
        offsets = torch.tensor([0, *lengths, 0]).cumsum(0)
        runs = [*lengths, 0, T - sum(lengths)]
        position = torch.cat([torch.arange(run) for run in runs])
        x = torch.randn(T, E + 8, generator=g)[:, 3 : E + 3]  # a slice of a wider tensor
        values = [x, torch.randn(E, K, generator=g), torch.randn(E, generator=g)]
        dy = torch.randn(T, E, generator=g)
        ours = [t.detach().requires_grad_() for t in values]
        exact = [t.double().requires_grad_() for t in values]
        y, y_exact = causal_conv_op(*ours, offsets), causal_conv_reference(*exact, position)
        got = [y, *torch.autograd.grad(y, ours, dy)]
        want = [y_exact, *torch.autograd.grad(y_exact, exact, dy.double())]
        errors[name] = [relative(a, b) for a, b in zip(got, want, strict=True)]
    torch.library.opcheck(causal_conv_op, (*ours, offsets))
    return errors


def test_values_and_gradients():
    errors = in_interpreter("errors_of_all", module="test_conv_kernels")
    assert set(errors) == set(CASES)
    assert max(max(e) for e in errors.values()) < 1e-5, errors


def test_refuses_shapes_that_do_not_fit():
    pytest.importorskip("triton")
    from modules.kernels.conv import causal_conv_triton

    x, offsets = torch.zeros(4, 8), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="8 channels need weight"):
        causal_conv_triton(x, torch.zeros(7, 4), torch.zeros(8), offsets)
    with pytest.raises(ValueError, match="offsets int64"):
        causal_conv_triton(x, torch.zeros(8, 4), torch.zeros(8), offsets.int())
