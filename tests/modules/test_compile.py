"""Kernels compiled together, for a named GPU and without one (a subprocess)."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.conftest import ROOT

CODE = "import sys; from tests.modules.test_compile import compile_share as c; c(*sys.argv[1:])"


def compile_share(number: str, of: str) -> None:
    """Runs inside the subprocess: five kernels, one of them launched twice."""
    import torch
    from triton.runtime.driver import driver

    from modules.kernels.compile import Share, compile_ahead
    from modules.kernels.conv import causal_conv_backward_op, causal_conv_op
    from tests.gpu.lint_sass import NoDevice

    device = NoDevice()
    driver.set_active(device)
    x, weight, bias = torch.zeros(64, 128), torch.zeros(128, 4), torch.zeros(128)
    place = torch.arange(64)

    def call():
        causal_conv_op._init_fn(x, weight, bias, place)
        causal_conv_backward_op._init_fn(x, x, weight, bias, place)
        causal_conv_op._init_fn(x, weight, bias, place)
        causal_conv_op._init_fn(x.bfloat16(), weight, bias, place)

    compile_ahead(call, Share(int(number), int(of)), threads=1)
    print(len(device.launchers))


def test_kernels_are_compiled_in_shares_and_not_launched(tmp_path):
    """Launching would fail: there is no device."""
    pytest.importorskip("triton")
    found, launchers = [], []
    for number, of in [(0, 2), (1, 2), (0, 1)]:
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(number), str(of)],
            env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(sorted(one.stem for one in tmp_path.glob("*/*.cubin")))
        launchers.append(int(done.stdout))
    assert launchers == [3, 2, 5]
    assert found[0] == ["conv_kernel", "conv_kernel", "partial_sums_kernel"]
    assert (
        found[1] == found[2] == sorted([*found[0], "conv_gradient_kernel", "partial_sums_kernel"])
    )


@pytest.mark.parametrize("of", [1, 3, 4])
def test_every_kernel_is_in_one_share(of):
    pytest.importorskip("triton")
    from modules.kernels.compile import Share, _ShareMode

    launches = [*range(7), 3, *range(5, 11)]
    found: list[int] = []
    with ThreadPoolExecutor(1) as executor:
        for number in range(of):
            mode = _ShareMode(executor, Share(number, of))
            taken = [mode.submit(str(one), lambda: None, print) for one in launches]
            found += [int(key) for key in mode.future_kernels]
            assert sum(one is not None for one in taken) >= len(mode.future_kernels)
    assert sorted(found) == list(range(11))
