"""The mixer's middle as one Triton operation, in the interpreter, against `Mamba2Mixer` in float64.

Runs in a subprocess, as the tests of the single kernels do.
"""

import copy

import pytest
import torch

from modules.encoder import Mamba2Mixer, positions
from tests.modules.test_ssd_kernels import in_interpreter, relative

PARAMETERS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
CASES = {
    # lengths, tokens, width, state, head, taps
    "mixed": ([1, 40, 2, 1, 17, 16], 83, 16, 16, 16, 4),
    "three taps, one head": ([1, 5], 9, 8, 32, 16, 3),
    "nothing but padding": ([0], 5, 16, 16, 16, 4),
}


def make_case(lengths, tokens, width, state, head, taps, dtype=torch.float32, device="cpu"):
    """A mixer with random parameters, proj, offsets, positions and dout."""
    torch.manual_seed(0)
    mixer = Mamba2Mixer(width, state, head, expand=2, conv=taps)
    with torch.no_grad():
        for parameter in (mixer.dt_bias, mixer.D, mixer.norm_weight):
            parameter.add_(torch.randn_like(parameter))
    proj = torch.randn(tokens, mixer.in_proj.out_features).to(device, dtype)
    dout = torch.randn(tokens, mixer.inner).to(device, dtype)
    offsets = torch.tensor([0, *lengths, 0], device=device).cumsum(0)  # the last is unused
    return mixer.to(device), proj, offsets, positions(offsets, tokens)[0], dout


def outputs(core, mixer, proj, dout):
    """out and the gradients of proj and of every parameter of `core(mixer, proj)`."""
    leaves = [proj.detach().requires_grad_(), *(getattr(mixer, name) for name in PARAMETERS)]
    out = core(mixer, leaves[0])
    gradients = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
    return dict(zip(("out", "proj", *PARAMETERS), (out.detach(), *gradients), strict=True))


def triton_outputs(case):
    from modules.kernels.mixer import mixer_core_triton

    mixer, proj, offsets, position, dout = case

    def core(mixer, proj):
        parameters = [getattr(mixer, name) for name in PARAMETERS]
        return mixer_core_triton(proj, *parameters, offsets, position, mixer.gated_norm_eps)

    return outputs(core, mixer, proj, dout)


def errors_of(case):
    """Relative errors by name, against PyTorch in float64 on the CPU."""
    mixer, proj, offsets, position, dout = case

    def core(mixer, proj):
        return mixer.core(proj, offsets.cpu(), position.cpu())

    exact = copy.deepcopy(mixer).double().cpu()
    expected = outputs(core, exact, proj.double().cpu(), dout.double().cpu())
    got = triton_outputs(case)
    return {name: relative(got[name].cpu(), value) for name, value in expected.items()}


def errors_of_all():
    """Runs inside the subprocess."""
    from modules.kernels import ssd

    ssd.choose_launch = lambda *_: ssd.Launch(16, 2, 64, 1, 1, 1, 1, 1, 1)
    from modules.kernels import mixer

    errors = {name: errors_of(make_case(*case)) for name, case in CASES.items()}
    module, proj, offsets, position, _ = make_case(*CASES["mixed"])
    leaves = [proj.requires_grad_(), *(getattr(module, name) for name in PARAMETERS)]
    torch.library.opcheck(mixer.mixer_core_op, (*leaves, offsets, position, 1e-5))
    return errors


def one_group():
    """As `errors_of_all`, with all heads of a chunk in one program, as at many tokens."""
    from modules.kernels import ssd

    ssd.head_groups = lambda *_, **__: 1
    return errors_of_all()


@pytest.mark.parametrize("function", ["errors_of_all", "one_group"])
def test_values_and_gradients(function):
    errors = in_interpreter(function, module="test_mixer_kernels")
    assert set(errors) == set(CASES)
    # A head's one number is a sum over all tokens that mostly cancels.
    limits = {"dt_bias": 3e-5, "A_log": 3e-5, "D": 3e-5}
    for name, case in errors.items():
        assert all(error < limits.get(key, 2e-6) for key, error in case.items()), (name, case)


def no_token():
    """An empty batch: gradients of the right shapes, those of parameters 0."""
    case = make_case([0], 0, 16, 16, 16, 4)
    got = triton_outputs(case)
    shapes = {"out": case[-1].shape, "proj": case[1].shape}
    shapes |= {name: getattr(case[0], name).shape for name in PARAMETERS}
    assert {name: value.shape for name, value in got.items()} == shapes
    assert not any(value.any() for value in got.values())
    return {}


def test_no_token():
    in_interpreter("no_token", module="test_mixer_kernels")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": 8}, "head dims and state sizes"),
        ({"taps": 5}, "taps"),
        ({"dtype": torch.float16}, "proj must be one of"),
        ({"proj": torch.zeros(4, 99)}, "does not fit"),
        ({"offsets": torch.tensor([0, 4], dtype=torch.int32)}, "offsets must be contiguous int64"),
        ({"position": torch.zeros(4, dtype=torch.int32)}, "positions must be contiguous int64"),
    ],
)
def test_refuses_what_it_cannot_do(change, message):
    pytest.importorskip("triton")
    from modules.kernels.mixer import mixer_core_triton

    sizes = {"width": 16, "state": 16, "head": 16, "taps": 4, "dtype": torch.float32}
    sizes |= {key: change[key] for key in sizes.keys() & change.keys()}
    mixer, proj, offsets, position, _ = make_case([4], 4, **sizes)
    parameters = [getattr(mixer, name) for name in PARAMETERS]
    with pytest.raises(ValueError, match=message):
        mixer_core_triton(
            change.get("proj", proj), *parameters, change.get("offsets", offsets),
            change.get("position", position), 1e-5,
        )  # fmt: skip
