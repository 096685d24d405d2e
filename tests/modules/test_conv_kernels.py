"""The Triton convolution in the interpreter (a subprocess), against the reference in float64."""

import pytest
import torch

from tests.modules.test_ssd_kernels import in_interpreter, relative

CASES = {
    # lengths, tokens, E, K
    "short ones": ([1, 2, 3, 17, 40, 1], 70, 20, 4),
    "one long": ([300], 300, 130, 4),
    "three taps": ([5, 5], 10, 16, 3),
    "two taps": ([70, 1, 9], 80, 5, 2),
    "one tap": ([4], 5, 16, 1),
    "no token": ([0], 0, 16, 4),
    "nothing but padding": ([0, 0], 5, 16, 4),
}


def errors_of_all():
    """Runs inside the subprocess: relative errors of y and its gradients, and opcheck."""
    from modules.kernels.conv import causal_conv_op
    from modules.ssd import causal_conv_reference

    errors = {}
    for name, (lengths, T, E, K) in CASES.items():
        g = torch.Generator().manual_seed(0)
        runs = [*lengths, 0, T - sum(lengths)]
        position = torch.cat([torch.arange(run) for run in runs])
        x = torch.randn(T, E + 8, generator=g)[:, 3 : E + 3]  # a slice of a wider tensor
        values = [x, torch.randn(E, K, generator=g), torch.randn(E, generator=g)]
        dy = torch.randn(T, E, generator=g)
        ours = [t.detach().requires_grad_() for t in values]
        exact = [t.double().requires_grad_() for t in values]
        y, y_exact = causal_conv_op(*ours, position), causal_conv_reference(*exact, position)
        got = [y, *torch.autograd.grad(y, ours, dy)]
        want = [y_exact, *torch.autograd.grad(y_exact, exact, dy.double())]
        errors[name] = [relative(a, b) for a, b in zip(got, want, strict=True)]
    torch.library.opcheck(causal_conv_op, (*ours, position))
    return errors


def leak():
    """Whether NaN in one sequence, of x or of dy, changes a bit of its neighbours."""
    from modules.kernels.conv import causal_conv_backward_op, causal_conv_op

    g = torch.Generator().manual_seed(0)
    position = torch.cat([torch.arange(run) for run in (66, 2, 70)])
    x, dy = torch.randn(2, 138, 8, generator=g)
    weight, bias = torch.randn(8, 4, generator=g), torch.randn(8, generator=g)
    others = torch.ones(138, dtype=torch.bool)
    others[66:68] = False
    changed_x, changed_dy = (
        t.clone().index_fill(0, torch.tensor([66, 67]), torch.nan) for t in (x, dy)
    )

    def outputs(x, dy):
        dx = causal_conv_backward_op(dy, x, weight, bias, position)[0]
        return torch.cat([causal_conv_op(x, weight, bias, position), dx], 1)[others]

    kept, found = outputs(x, dy), [outputs(changed_x, dy), outputs(x, changed_dy)]
    return {"differs": not all(torch.equal(kept, t) for t in found)}


def test_values_and_gradients():
    errors = in_interpreter("errors_of_all", module="test_conv_kernels")
    assert set(errors) == set(CASES)
    assert max(max(e) for e in errors.values()) < 1e-5, errors


def test_sequences_do_not_leak():
    assert in_interpreter("leak", module="test_conv_kernels") == {"differs": False}


def test_refuses_shapes_that_do_not_fit():
    pytest.importorskip("triton")
    from modules.kernels.conv import causal_conv_triton

    x, position = torch.zeros(4, 8), torch.arange(4)
    with pytest.raises(ValueError, match="8 channels need weight"):
        causal_conv_triton(x, torch.zeros(7, 4), torch.zeros(8), position)
    with pytest.raises(ValueError, match="positions int64"):
        causal_conv_triton(x, torch.zeros(8, 4), torch.zeros(8), position.int())
    with pytest.raises(ValueError, match="4 tokens need as many positions"):
        causal_conv_triton(x, torch.zeros(8, 4), torch.zeros(8), position[:3])
