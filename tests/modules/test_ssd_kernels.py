"""The Triton SSD kernels in Triton's interpreter, against a float64 recurrence.

The interpreter must be on before Triton's decorators run, so each test runs this file as a script
in a subprocess: no other test sees the switch. Small sizes: the interpreter is slow.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

CASES = {
    # lengths, tokens, H, P, N, chunk, segment_chunks, tile
    "one item": ([1], 1, 1, 16, 16, 16, 2, 64),
    "around a chunk": ([1, 15, 16, 17, 31, 32, 33], 150, 2, 16, 16, 16, 4, 64),
    "several segments": ([3, 0, 70, 1, 49], 130, 2, 32, 16, 16, 2, 32),
    "odd heads": ([5, 40, 20], 70, 3, 16, 32, 32, 2, 64),
    "wide head": ([40, 9], 49, 1, 64, 16, 32, 1, 32),
    "nothing but padding": ([0, 0], 20, 2, 16, 16, 16, 2, 64),
    "steps of 0": ([40, 9], 49, 2, 32, 16, 32, 1, 32),
    "fast decays": ([70, 5, 64], 150, 2, 16, 16, 64, 2, 64),  # by 2^-300 and more in a chunk
}
FAST = 16


def recurrence(x, dt, A, B, C, D, offsets):
    """y and the final states, one token after the other."""
    T, H, P = x.shape
    ys, finals = [], []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        h = x.new_zeros(H, P, B.shape[1])
        for t in range(begin, end):
            decay = torch.exp(dt[t] * A)[:, None, None]
            h = decay * h + (dt[t, :, None] * x[t])[:, :, None] * B[t]
            ys.append(h @ C[t] + D[:, None] * x[t])
        finals.append(h)
    ys += [x.new_zeros(H, P)] * (T - len(ys))
    return torch.stack(ys), torch.stack(finals)


def make_inputs(lengths, T, H, P, N, seed=0, rate=1.0):
    """x, B and C are slices of one wider tensor, as they are behind the convolution."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(T, H * P + 2 * N, generator=g)
    x, B, C = wide.split([H * P, N, N], dim=1)
    dt = torch.nn.functional.softplus(torch.randn(T, H, generator=g) - 2)
    A, D = -rate * (0.5 + 4 * torch.rand(H, generator=g)), torch.randn(H, generator=g)
    ends = torch.tensor([0, *lengths, 0]).cumsum(0)  # the last sequence is unused
    dy = torch.randn(T, H, P, generator=g)
    dfinal = torch.randn(len(lengths) + 1, H, P, N, generator=g)
    return [x.unflatten(1, (H, P)), dt, A, B, C, D], ends, dy, dfinal


def relative(a, b, scale=None):
    return ((a.double() - b).norm() / (b if scale is None else scale).norm().clamp_min(1e-6)).item()


def errors_of(name, final_states, one_pass):
    """Runs inside the subprocess: relative errors of outputs and gradients."""
    from modules.kernels import ssd

    lengths, T, H, P, N, chunk, segment_chunks, tile = CASES[name]
    precision = "ieee" if one_pass else "tf32x3"  # which also choose between forms of dB
    launch = ssd.Launch(chunk, segment_chunks, tile, 1, 1, 1, 1, 1, 1, one_pass, precision)
    ssd.choose_launch = lambda *_: launch
    rate = FAST if name == "fast decays" else 1.0
    inputs, offsets, dy, dfinal = make_inputs(lengths, T, H, P, N, rate=rate)
    if name == "steps of 0":
        inputs[1][::3] = 0.0
    ours = [t.detach().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    y, final, _ = ssd.ssd_op(*ours, offsets, final_states)
    y_exact, final_exact = recurrence(*exact, offsets)
    outputs, outputs_exact, gradients = [y], [y_exact], [dy]
    if final_states:
        outputs, outputs_exact, gradients = [y, final], [y_exact, final_exact], [dy, dfinal]
    if not y_exact.requires_grad:  # padding alone: everything is zero
        zero = sum(t.sum() for t in exact) * 0
        outputs_exact = [t + zero for t in outputs_exact]
    got = torch.autograd.grad(outputs, ours, gradients)
    want = torch.autograd.grad(
        outputs_exact, exact, [g.double() for g in gradients], materialize_grads=True
    )
    errors = {"y": relative(y, y_exact)}
    if final_states:
        errors["final"] = relative(final, final_exact)
    names = ["dx", "ddt", "dA", "dB", "dC", "dD"]
    # dA sums terms of random sign, here to near nothing: its rounding is that of the terms
    scales = {"dA": exact[1] * want[1]} if name == "fast decays" else {}
    errors |= {n: relative(a, b, scales.get(n)) for n, a, b in zip(names, got, want, strict=True)}
    used = sum(lengths)
    padding = [y, got[0], got[1], got[3], got[4]]
    errors["padding"] = max((t[used:].abs().max().item() for t in padding if used < T), default=0.0)
    return errors


def errors_of_all():
    """Every case with and without final states, in one process: starting one takes seconds."""
    cases = itertools.product(CASES, (False, True), (False, True))
    return {", ".join(map(str, case)): errors_of(*case) for case in cases}


def leak(one_pass):
    """Changing one sequence changes no bit of its neighbours; NaN stays where it is."""
    from modules.kernels import ssd

    ssd.choose_launch = lambda *_: ssd.Launch(16, 2, 64, 1, 1, 1, 1, 1, 1, one_pass)
    inputs, offsets, dy, _ = make_inputs([20, 37, 20], 80, 2, 16, 16)

    def run(values):
        leaves = [t.detach().clone().requires_grad_() for t in values]
        y, _, _ = ssd.ssd_op(*leaves, offsets, False)
        dx, ddt, _, dB, dC, _ = torch.autograd.grad(y, leaves, dy)
        return [t.detach() for t in (y, dx, ddt, dB, dC)]

    changed = [t.clone() for t in inputs]
    for k in (0, 1, 3, 4):
        changed[k][20:57] = float("nan")
    keep = torch.cat([torch.arange(20), torch.arange(57, 80)])
    same = [torch.equal(a[keep], b[keep]) for a, b in zip(run(inputs), run(changed), strict=True)]
    return {"differs": float(not all(same))}


def opcheck():
    """torch.library.opcheck: schema, fake tensors, autograd registration."""
    from modules.kernels import ssd

    ssd.choose_launch = lambda *_: ssd.Launch(16, 2, 64, 1, 1, 1, 1, 1, 1)
    # No state stays unwritten: opcheck compares them too.
    inputs, offsets, _, _ = make_inputs([17, 17], 36, 2, 16, 16)
    leaves = [t.detach().requires_grad_() for t in inputs]
    for final_states in (False, True):
        torch.library.opcheck(ssd.ssd_op, (*leaves, offsets, final_states))
    return {}


def in_interpreter(function, *args, module="test_ssd_kernels"):
    """Call a test module's function in a fresh Python with Triton's interpreter switched on."""
    root = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
    code = (
        f"import json, sys; sys.path.insert(0, {root!r}); from tests.modules import {module} as t; "
        f"print(json.dumps(t.{function}(*{args!r})))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def all_errors():
    return in_interpreter("errors_of_all")


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("final_states", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(all_errors, name, final_states, one_pass):
    errors = dict(all_errors[f"{name}, {final_states}, {one_pass}"])
    assert errors.pop("padding") == 0.0
    assert all(error < 1e-5 for error in errors.values()), errors  # NaN is not


@pytest.mark.parametrize("one_pass", [False, True])
def test_sequences_do_not_leak(one_pass):
    assert in_interpreter("leak", one_pass) == {"differs": 0.0}


def test_opcheck():
    in_interpreter("opcheck")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(P=24), "head dims"),
        (dict(N=8), "state sizes"),
        (dict(dtype=torch.float16), "dtype"),
        (dict(dt_dtype=torch.bfloat16), "fp32"),
        (dict(offsets_dtype=torch.int32), "int64"),
    ],
)
def test_refuses_what_it_cannot_do(change, message):
    pytest.importorskip("triton")
    from modules.kernels.ssd import ssd_triton

    P, N, dtype = change.get("P", 16), change.get("N", 16), change.get("dtype", torch.float32)
    x, B = torch.zeros(4, 2, P, dtype=dtype), torch.zeros(4, N, dtype=dtype)
    dt, A = torch.zeros(4, 2, dtype=change.get("dt_dtype", torch.float32)), torch.zeros(2)
    offsets = torch.tensor([0, 4], dtype=change.get("offsets_dtype", torch.int64))
    with pytest.raises(ValueError, match=message):
        ssd_triton(x, dt, A, B, B, A, offsets)
