"""The mixer's middle as one Triton operation, in the interpreter, against `Mamba2Mixer` in float64.

Runs in a subprocess, as the tests of the single kernels do.
"""

import copy
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from modules.encoder import Mamba2Mixer, positions
from tests.modules.test_ssd_kernels import in_interpreter, relative

PARAMETERS = ("conv_weight", "conv_bias", "dt_bias", "A_log", "D", "norm_weight")
CASES = {
    # lengths, tokens, width, state, head, taps
    "mixed": ([1, 40, 2, 1, 17, 16], 83, 16, 16, 16, 4),
    "three taps, one head": ([1, 6], 10, 8, 32, 16, 3),
    "nothing but padding": ([0], 5, 16, 16, 16, 4),
}


BETA = 0.4
DIRECTIONS = {  # whether there is a reversed one, and whether it is put back in order
    "forward": (False, False),
    "both": (True, False),
    "both, restored": (True, True),
}


def make_case(lengths, tokens, width, state, head, taps, dtype=torch.float32, device="cpu"):
    """A mixer with random parameters, proj, offsets, positions and reversal, dout."""
    torch.manual_seed(0)
    mixer = Mamba2Mixer(width, state, head, expand=2, conv=taps)
    with torch.no_grad():
        for parameter in (mixer.dt_bias, mixer.D, mixer.norm_weight):
            parameter.add_(torch.randn_like(parameter))
    columns = mixer.in_proj.out_features
    proj = torch.randn(tokens, columns).to(device, dtype)
    if taps == 4:  # rows in wider ones, as of `project_aligned`
        proj = torch.nn.functional.pad(proj, (0, 3))[:, :columns]
    dout = torch.randn(tokens, mixer.inner).to(device, dtype)
    offsets = torch.tensor([0, *lengths, 0], device=device).cumsum(0)  # the last is unused
    return mixer.to(device), proj, offsets, positions(offsets, tokens), dout


def outputs(core, mixer, proj, dout):
    """out and the gradients of proj and of every parameter of `core(mixer, proj)`."""
    leaves = [proj.detach().requires_grad_(), *(getattr(mixer, name) for name in PARAMETERS)]
    out = core(mixer, leaves[0])
    gradients = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
    return dict(zip(("out", "proj", *PARAMETERS), (out.detach(), *gradients), strict=True))


def triton_outputs(case, direction="forward"):
    from modules.kernels.mixer import mixer_core_triton

    mixer, proj, offsets, (position, mirror), dout = case
    both, restore = DIRECTIONS[direction]
    options = {"mirror_T": mirror, "beta": BETA, "restore": restore} if both else {}

    def core(mixer, proj):
        parameters = [getattr(mixer, name) for name in PARAMETERS]
        return mixer_core_triton(
            proj, *parameters, offsets, position, mixer.gated_norm_eps, **options
        )

    return outputs(core, mixer, proj, dout)


def errors_between(got, expected):
    return {name: relative(got[name].cpu(), value) for name, value in expected.items()}


def errors_of(case, direction="forward"):
    """Relative errors by name, against PyTorch in float64 on the CPU."""
    mixer, proj, offsets, (position, mirror), dout = case
    both, restore = DIRECTIONS[direction]
    reversal = (mirror.cpu(), BETA, restore) if both else ()

    def core(mixer, proj):
        return mixer.core(proj, offsets.cpu(), position.cpu(), *reversal)

    exact = copy.deepcopy(mixer).double().cpu()
    expected = outputs(core, exact, proj.double().cpu(), dout.double().cpu())
    return errors_between(triton_outputs(case, direction), expected)


def last_outputs(case, both):
    """As `triton_outputs`, of the last tokens' outputs alone, from a proj without z."""
    from modules.kernels.mixer import mixer_last_triton

    mixer, proj, offsets, (position, mirror), _ = case

    def core(mixer, proj):
        parameters = [getattr(mixer, name) for name in PARAMETERS[:-1]]
        ends = mixer_last_triton(
            proj[:, mixer.inner :], *parameters, offsets, position, mixer.inner,
            mirror_T=mirror if both else None,
        )  # fmt: skip
        return torch.cat(ends[: 1 + both])

    return outputs_of_last(core, mixer, proj, dout_of_last(case, both))


def outputs_of_last(core, mixer, proj, dout):
    got = outputs(core, mixer, proj, dout)
    assert not got.pop("norm_weight").any()  # not part of it
    return got


def dout_of_last(case, both):
    mixer, _, offsets, _, dout = case
    generator = torch.Generator().manual_seed(1)
    rows = (1 + both) * (len(offsets) - 1)
    return torch.randn(rows, mixer.inner, generator=generator).to(dout)


def errors_of_last(case, both):
    """Relative errors by name, against PyTorch in float64 on the CPU."""
    mixer, proj, offsets, (position, mirror), _ = (
        one.cpu() if isinstance(one, torch.Tensor) else one for one in case
    )
    position, mirror = position.cpu(), mirror.cpu()
    used = offsets[1:] > offsets[:-1]

    def core(mixer, proj):
        _, xBC, dt = mixer._split(proj)
        ends = (offsets[1:] - 1).clamp_min(0)
        y = mixer._scan(xBC, dt, offsets, position, ends)
        r = mixer._scan_reversed(xBC, dt, offsets, position, mirror, ends)
        return torch.cat([y * used[:, None], r * used[:, None]][: 1 + both])

    exact = copy.deepcopy(mixer).double().cpu()
    dout = dout_of_last(case, both).double().cpu()
    expected = outputs_of_last(core, exact, proj.double(), dout)
    return errors_between(last_outputs(case, both), expected)


def small_chunks(one_pass=False):
    """Runs inside the subprocess: the sizes of the cases are many chunks, and several segments."""
    from modules.kernels import ssd

    ssd.choose_launch = lambda *_: ssd.Launch(16, 2, 64, 1, 1, 1, 1, 1, 1, one_pass)


def errors_of_core(one_pass=False):
    small_chunks(one_pass)
    return {
        f"{name}, {direction}": errors_of(make_case(*case), direction)
        for name, case in CASES.items()
        for direction in DIRECTIONS
    }


def one_group():
    """As `errors_of_core`, with all heads of a chunk in one program, as at many tokens."""
    from modules.kernels import ssd

    ssd.head_groups = lambda *_, **__: 1
    return errors_of_core()


def one_pass():
    """As `errors_of_core`, with states and outputs in one pass."""
    return errors_of_core(one_pass=True)


def errors_of_ends():
    small_chunks()
    return {
        f"{name}, {both}": errors_of_last(make_case(*case), both)
        for name, case in CASES.items()
        for both in (False, True)
    }


@pytest.mark.parametrize("function", ["errors_of_core", "one_group", "one_pass", "errors_of_ends"])
def test_values_and_gradients(function):
    errors = in_interpreter(function, module="test_mixer_kernels")
    assert len(errors) == (2 if function == "errors_of_ends" else 3) * len(CASES)
    # A head's one number is a sum over all tokens that mostly cancels.
    limits = {"dt_bias": 3e-5, "A_log": 3e-5, "D": 3e-5}
    for name, case in errors.items():
        assert all(error < limits.get(key, 2e-6) for key, error in case.items()), (name, case)


def check_ops():
    """torch.library.opcheck, with and without the reversed direction."""
    small_chunks()
    from modules.kernels import mixer

    # No state stays unwritten: opcheck compares them too.
    module, proj, offsets, (position, reversal), _ = make_case([17, 17], 36, 8, 16, 16, 4)
    leaves = [getattr(module, name) for name in PARAMETERS]
    rest = proj[:, module.inner :].requires_grad_()
    for mirror in (None, reversal):
        inputs = (proj.requires_grad_(), *leaves, offsets, position, mirror)
        torch.library.opcheck(mixer.mixer_core_op, (*inputs, BETA, False, 1e-5))
        inputs = (rest, *leaves[:-1], offsets, position, mirror)
        torch.library.opcheck(mixer.mixer_last_op, (*inputs, module.inner))
    return {}


def test_opcheck():
    in_interpreter("check_ops", module="test_mixer_kernels")


def checkpointed():
    """What the forward keeps is made anew by torch.utils.checkpoint; the gradients are the same."""
    small_chunks()
    from modules.kernels import mixer

    kept = mixer.mixer_core_triton
    case = make_case([17, 17], 36, 8, 16, 16, 4)
    for direction in DIRECTIONS:
        mixer.mixer_core_triton = kept
        expected = triton_outputs(case, direction)
        mixer.mixer_core_triton = partial(checkpoint, kept, use_reentrant=False)
        got = triton_outputs(case, direction)
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    return {}


def test_checkpointed():
    in_interpreter("checkpointed", module="test_mixer_kernels")


def no_token():
    """An empty batch: gradients of the right shapes, those of parameters 0."""
    case = make_case([0], 0, 16, 16, 16, 4)
    shapes = {"out": case[-1].shape, "proj": case[1].shape}
    shapes |= {name: getattr(case[0], name).shape for name in PARAMETERS}
    for direction in DIRECTIONS:
        got = triton_outputs(case, direction)
        assert {name: value.shape for name, value in got.items()} == shapes
        assert not any(value.any() for value in got.values())
    for both in (False, True):
        got = last_outputs(case, both)
        assert got["out"].shape == (2 * (1 + both), case[0].inner)
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
        ({"mirror": torch.zeros(4, dtype=torch.int32)}, "mirror must be contiguous int64"),
        ({"mirror": torch.zeros(3, dtype=torch.int64)}, r"mirror must be \[4\]"),
    ],
)
def test_refuses_what_it_cannot_do(change, message):
    pytest.importorskip("triton")
    from modules.kernels.mixer import mixer_core_triton

    sizes = {"width": 16, "state": 16, "head": 16, "taps": 4, "dtype": torch.float32}
    sizes |= {key: change[key] for key in sizes.keys() & change.keys()}
    mixer, proj, offsets, (position, _), _ = make_case([4], 4, **sizes)
    parameters = [getattr(mixer, name) for name in PARAMETERS]
    with pytest.raises(ValueError, match=message):
        mixer_core_triton(
            change.get("proj", proj), *parameters, change.get("offsets", offsets),
            change.get("position", position), 1e-5, mirror_T=change.get("mirror"),
        )  # fmt: skip
