"""The layer's Triton kernels in Triton's interpreter, fp32, against PyTorch in float64.

The interpreter must be on before Triton's decorators run, so one subprocess runs this file as a
script over all cases and prints their errors as JSON: no other test sees the switch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

SEED = 123456789012345678
RATE = 0.3
KEPT = 1 - round(RATE * 65536) / 65536
LIMIT = 2e-6


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-6)).item()


def compare(kernel, reference, leaves, names):
    """Relative errors of the output and of every gradient; the reference runs in float64."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = kernel(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    grad = grad.to(out.device, out.dtype)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected_out = reference(*doubles)
    expected = [expected_out, *torch.autograd.grad(expected_out, doubles, grad.double())]
    return {n: relative(a, b) for n, a, b in zip(["out", *names], got, expected, strict=True)}


def gated_cases(T, E, device="cpu", dtype=torch.float32):
    """(case, errors); also run on the card by tests/gpu/test_layer_gpu.py, as those below."""
    from modules.fused import gated_norm_both_reference, gated_norm_reference
    from modules.kernels.gated_norm import gated_norm_op, gated_norm_triton

    torch.manual_seed(T)
    y, r, wide = (torch.randn(T, width).to(device, dtype) for width in (E, E, E + 8))
    z, w = wide[:, :E], torch.randn(E, device=device)  # z is a slice of the projection
    mirror = torch.arange(T, device=device).flip(0)
    yield (
        "one direction",
        compare(
            lambda y, z, w: gated_norm_triton(y, z, w, 1e-5),
            lambda y, z, w: gated_norm_reference(y, z, w, 1e-5),
            [y, z, w],
            ["y", "z", "w"],
        ),
    )
    for restore in (False, True):
        yield (
            f"both, restore={restore}",
            compare(
                lambda y, r, z, w, restore=restore: gated_norm_op(
                    y, z, w, r, mirror, 0.4, restore, 1e-5
                ),
                lambda y, r, z, w, restore=restore: gated_norm_both_reference(
                    y, r[mirror], z, w, 1e-5, 0.4, mirror, restore
                ),
                [y, r, z, w],
                ["y", "r", "z", "w"],
            ),
        )


def residual_cases(T, D, device="cpu", dtype=torch.float32):
    from modules.kernels.residual_norm import residual_norm_triton

    torch.manual_seed(T)
    a, x = (torch.randn(T, D).to(device, dtype) for _ in range(2))
    w, bias, a_bias = (torch.randn(D).to(device) for _ in range(3))
    seed = torch.tensor([SEED], device=device)

    def kernel(a, x, w, bias, rate, first=False, out=dtype, a_bias=None):
        return residual_norm_triton(
            a, x, w, bias, 1e-12, rate, out, a_bias_D=a_bias, dropout_first=first, seed=seed
        )  # fmt: skip

    def norm(s, w, bias):
        return F.layer_norm(s, [D], w, bias, 1e-12)

    zeros, ones = torch.zeros_like(w), torch.ones_like(w)
    mask = kernel(a, x, zeros, ones, RATE, out=torch.float32).double()  # 0 or 1 / kept
    names = ["a", "x", "w", "bias"]
    yield (
        "no dropout",
        compare(
            lambda *t: kernel(*t, 0.0),
            lambda a, x, w, bias: norm(a + x, w, bias),
            [a, x, w, bias],
            names,
        ),
    )
    yield (
        "dropout behind",
        compare(
            lambda *t: kernel(*t, RATE),
            lambda a, x, w, bias: norm(a + x, w, bias) * mask,
            [a, x, w, bias],
            names,
        ),
    )
    yield (
        "dropout behind, a bias of a",
        compare(
            lambda a, x, w, bias, a_bias: kernel(a, x, w, bias, RATE, a_bias=a_bias),
            lambda a, x, w, bias, a_bias: norm(a + a_bias + x, w, bias) * mask,
            [a, x, w, bias, a_bias],
            [*names, "a_bias"],
        ),
    )
    yield (
        "dropout in front",
        compare(
            lambda a, w, bias: kernel(a, None, w, bias, RATE, first=True),
            lambda a, w, bias: norm(a * mask, w, bias),
            [a, w, bias],
            ["a", "w", "bias"],
        ),
    )


def gelu_cases(T, columns, device="cpu", dtype=torch.float32):
    from modules.kernels.gelu import gelu_dropout_triton

    torch.manual_seed(T)
    x, bias = torch.randn(T, columns).to(device, dtype), torch.randn(columns).to(device)
    seed = torch.tensor([SEED], device=device)
    ones = gelu_dropout_triton(torch.full_like(x, 9.0), torch.zeros_like(bias), RATE, seed=seed)
    mask = (ones != 0).double() / KEPT
    yield (
        "no dropout",
        compare(
            lambda x, b: gelu_dropout_triton(x, b, 0.0),
            lambda x, b: F.gelu(x + b),
            [x, bias],
            ["x", "bias"],
        ),
    )
    for scale in (5.0, 1e8):
        yield (
            f"far from 0, {scale:g}",
            compare(
                lambda x, b: gelu_dropout_triton(x, b, 0.0),
                lambda x, b: F.gelu(x + b),
                [x * scale, bias],
                ["x", "bias"],
            ),
        )
    yield (
        "dropout",
        compare(
            lambda x, b: gelu_dropout_triton(x, b, RATE, seed=seed),
            lambda x, b: F.gelu(x + b) * mask,
            [x, bias],
            ["x", "bias"],
        ),
    )


def mask_facts():
    """The share dropped, its spread, and whether seeds and torch's generator govern the mask."""
    from modules.kernels.residual_norm import residual_norm_triton

    def draw(seed):
        return residual_norm_triton(
            torch.zeros(2000, 48), None, torch.zeros(48), torch.ones(48), 1e-12, RATE,
            torch.float32, seed=seed,
        )  # fmt: skip

    first = draw(torch.tensor([SEED]))
    dropped = (first == 0).double()
    torch.manual_seed(4)
    drawn = [draw(None), draw(None)]
    torch.manual_seed(4)
    return {
        "share": dropped.mean().item(),
        "column_spread": dropped.mean(0).std().item(),
        "row_spread": dropped.mean(1).std().item(),
        "neighbours": (dropped[:, 1:] * dropped[:, :-1]).mean().item(),
        "scale": first.max().item(),
        "same_seed": torch.equal(first, draw(torch.tensor([SEED]))),
        "other_seed": not torch.equal(first, draw(torch.tensor([SEED + (1 << 40)]))),
        "generator_advances": not torch.equal(*drawn),
        "generator_repeats": torch.equal(drawn[0], draw(None)),
    }


def check_ops():
    """opcheck of each op, forward with dropout and without."""
    from modules.kernels.gated_norm import gated_norm_op
    from modules.kernels.gelu import gelu_dropout_op
    from modules.kernels.residual_norm import residual_norm_op

    y, z, w = torch.randn(6, 16), torch.randn(6, 20)[:, :16], torch.randn(16)
    mirror, seed = torch.arange(6).flip(0), torch.tensor([SEED])
    bias, r = torch.randn(16), torch.randn(6, 16)
    for leaf in (y, z, w, bias, r):
        leaf.requires_grad_()
    calls = [
        (gated_norm_op, (y, z, w, None, None, 0.0, False, 1e-5)),
        (gated_norm_op, (y, z, w, r, mirror, 0.4, False, 1e-5)),
        (residual_norm_op, (y, r, None, w, bias, None, 0, False, 1e-12, torch.float32)),
        (residual_norm_op, (y, r, w, w, bias, None, 0, False, 1e-12, torch.float32)),
        (residual_norm_op, (y, None, None, w, bias, seed, 9000, True, 1e-12, torch.bfloat16)),
        (gelu_dropout_op, (y, w, None, 0)),
        (gelu_dropout_op, (y, w, seed, 9000)),
    ]
    for op, inputs in calls:
        torch.library.opcheck(op, inputs)
    return len(calls)


def sums_errors():
    """Of one row, of some, and of more than a tile has."""
    from modules.kernels.partial_sums import partial_sums

    cases = {}
    for shape in [(1, 1, 24), (3, 37, 40), (2, 2500, 16)]:
        partial = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        cases[f"{shape}"] = {"sum": relative(partial_sums(partial), partial.double().sum(1))}
    return cases


def report():
    shapes = [(1, 24), (37, 24), (9, 64)]
    return {
        "gated": {f"{s}": dict(gated_cases(*s)) for s in shapes},
        "residual": {f"{s}": dict(residual_cases(*s)) for s in shapes},
        "gelu": {f"{s}": dict(gelu_cases(*s)) for s in [*shapes, (6, 520)]},
        "sums": {"all": sums_errors()},
        "mask": mask_facts(),
        "opcheck": check_ops(),
    }


@pytest.fixture(scope="module")
def results():
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__).resolve())]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kernel", ["gated", "residual", "gelu", "sums"])
def test_values_and_gradients(results, kernel):
    for shape, cases in results[kernel].items():
        for case, errors in cases.items():
            assert all(error < LIMIT for error in errors.values()), (shape, case, errors)


def test_masks_are_fair_and_governed_by_the_generator(results):
    mask = results["mask"]
    spread = RATE * KEPT  # of one draw
    assert mask["share"] == pytest.approx(RATE, abs=4 * (spread / 96000) ** 0.5)
    assert mask["column_spread"] == pytest.approx((spread / 2000) ** 0.5, rel=0.4)
    assert mask["row_spread"] == pytest.approx((spread / 48) ** 0.5, rel=0.1)
    assert mask["neighbours"] == pytest.approx(RATE**2, rel=0.05)
    assert mask["scale"] == pytest.approx(1 / KEPT)
    for fact in ("same_seed", "other_seed", "generator_advances", "generator_repeats"):
        assert mask[fact], fact


def test_opcheck(results):
    assert results["opcheck"] == 7


if __name__ == "__main__":
    print(json.dumps(report()))
