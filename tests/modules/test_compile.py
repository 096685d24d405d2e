"""Kernels compiled together, for a named GPU and without one (a subprocess)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

CODE = "import json; from tests.modules import test_compile as t; print(json.dumps(t.compiled()))"


def compiled():
    """Runs inside the subprocess: names of the kernels on the disk after each of two calls."""
    import torch
    from triton.runtime.driver import driver

    from modules.kernels.compile import compile_ahead
    from modules.kernels.conv import causal_conv_op
    from tests.gpu.lint_sass import NoDevice

    driver.set_active(NoDevice())
    x, weight, bias = torch.zeros(64, 128), torch.zeros(128, 4), torch.zeros(128)
    found = []
    for _ in range(2):
        compile_ahead(lambda: causal_conv_op._init_fn(x, weight, bias, torch.arange(64)))
        cache = Path(os.environ["TRITON_CACHE_DIR"])
        found.append(sorted(one.stem for one in cache.glob("*/*.cubin")))
    return found


def test_kernels_are_compiled_and_not_launched(tmp_path):
    """Launching would fail: there is no device."""
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=env, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert "conv_kernel" in first
    assert first == second
