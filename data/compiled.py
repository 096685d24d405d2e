"""Bundles whose encoder is native code (`trainer.export format=aotinductor`).

In place of model.pt such a bundle holds

    encoder.pt     the encoder's weights, its state dict
    forward.pt2    the encoder, compiled by AOTInductor; modules/compiled.py says how it is called
    step.pt2       of a causal model, one event on: what carries states forward

Looking rows up and ranking are `modules.scorer.Scorer` in plain PyTorch, as in every bundle.
"""

import platform
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError

AOTINDUCTOR = "aotinductor"
WEIGHTS, FORWARD, STEP = "encoder.pt", "forward.pt2", "step.pt2"
TARGET = {"device": "cpu", "machine": "x86_64", "instructions": "AVX2"}  # the one that there is


def check_allowed(folder: Path, native_code: bool) -> None:
    """Raise InputError where whoever opens a bundle of native code has not asked for that."""
    if not native_code:
        raise InputError(
            f"bundle {folder} is native code, which can do whatever this process may; if you trust "
            "who wrote it, open it with native_code=true, in tools.score_histories with "
            f"kernels={AOTINDUCTOR}"
        )


def check_runs_here(folder: Path, target: Any, made_with: str, device: torch.device) -> None:
    """Raise InputError where a bundle's native code would not run, or crash, on `device` here.

    target: the manifest's compiled_for. made_with: the version of torch that compiled it.
    """
    again = "export the checkpoint again, there or with format=torchscript"
    if target != TARGET:
        raise InputError(f"bundle {folder} is compiled for {target}, not for {TARGET}; {again}")
    if device.type != TARGET["device"]:
        raise InputError(
            f"bundle {folder} is compiled for CPUs, not for {device.type}; use device=cpu, or "
            "export the checkpoint with format=torchscript"
        )
    if not is_target():
        raise InputError(
            f"bundle {folder} is compiled for {TARGET['machine']} CPUs with "
            f"{TARGET['instructions']}, which this machine is not; use another machine, or export "
            "the checkpoint with format=torchscript"
        )
    if _release(made_with) != _release(torch.__version__):
        raise InputError(
            f"bundle {folder} is compiled by torch {made_with}, and here is {torch.__version__}, "
            f"which may crash on it; {again}"
        )


def is_target() -> bool:
    """Whether this machine runs what is compiled for TARGET."""
    able = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return platform.machine() == TARGET["machine"] and able


def load_compiled(folder: Path, config: dict[str, Any]) -> Any:
    """The scorer, without rows, whose encoder is the native code in `folder`; this runs it.

    config: of `modules.encoder.Encoder`. Raises what a file that is damaged or does not fit does:
    RuntimeError, OSError, TypeError or pickle.UnpicklingError.
    """
    from modules.compiled import CompiledEncoder  # TorchScript bundles need nothing of ours
    from modules.scorer import Scorer

    weights = torch.load(folder / WEIGHTS, weights_only=True)
    return Scorer(CompiledEncoder(config, weights, folder))


def _release(version: str) -> list[str]:
    """Major and minor: what torch keeps its binary interface within."""
    return version.split(".")[:2]
