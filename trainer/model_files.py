"""The model's files in a bundle, in either format: TorchScript, or native code by AOTInductor."""

import io
import warnings
from pathlib import Path
from typing import Any

import torch

from data.bundle import load_model, with_rows
from data.bundle_manifest import MODEL
from data.compiled import AOTINDUCTOR, TARGET, WEIGHTS, is_target, load_compiled
from data.errors import InputError
from modules.encoder import Encoder
from modules.scorer import Scorer


def write_model(folder: Path, kind: str, config: dict[str, Any], encoder: Encoder) -> list[Path]:
    """Write the model without its rows; the files. kind: of `data.bundle_manifest.FORMATS`.

    config: what `encoder` was made with. Raises InputError where it cannot be compiled here.
    """
    if kind != AOTINDUCTOR:
        (folder / MODEL).write_bytes(scripted(encoder))
        return [folder / MODEL]
    torch.save(encoder.state_dict(), folder / WEIGHTS)
    return [folder / WEIGHTS, *_compiled(folder, config, encoder)]


def _compiled(folder: Path, config: dict[str, Any], encoder: Encoder) -> list[Path]:
    """The encoder's packages. Raises InputError where this machine cannot compile them."""
    # Inductor takes seconds to import, and TorchScript needs none of it.
    from torch._inductor.config import cpp
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    from modules.compiled import compile_encoder

    instead = "or use format=torchscript"
    if not is_target():
        raise InputError(
            f"format={AOTINDUCTOR} compiles for {TARGET['machine']} CPUs with "
            f"{TARGET['instructions']}, and this machine is none; export on one, {instead}"
        )
    if not hasattr(cpp, "march"):
        raise InputError(
            f"torch {torch.__version__} compiles for the CPU that it runs on alone, and "
            f"format={AOTINDUCTOR} should run elsewhere too; use torch 2.13, {instead}"
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise InputError(
            f"format={AOTINDUCTOR} needs a C++ compiler, and there is no g++ here; install one, "
            f"{instead}"
        ) from error
    try:
        return compile_encoder(config, encoder, folder)
    except (CppCompileError, InductorError) as error:
        cause = getattr(error, "inner_exception", error)
        if not isinstance(cause, CppCompileError):
            raise
        said = [line for line in str(cause).splitlines() if "error: " in line]
        raise InputError(
            f"format={AOTINDUCTOR}: the C++ compiler {get_cpp_compiler()} failed "
            f"({said[0] if said else 'it does not say why'}); mend it, {instead}"
        ) from error


def load_written(folder: Path, kind: str, config: dict[str, Any], parts: list[Path]) -> Any:
    """The scorer that `write_model` has written to `folder`, with its rows, on the CPU."""
    if kind != AOTINDUCTOR:
        return load_model(folder / MODEL, parts, torch.device("cpu"))
    return with_rows(load_compiled(folder, config), parts, torch.device("cpu"))


def scripted(encoder: Encoder) -> bytes:
    """The scorer as TorchScript, without rows."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch.jit is deprecated since 2.13 and works; what it is wanted for, a model that loads
        # with torch alone on CPU and CUDA, torch.export gives only compiled for one device.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+.* is deprecated")
        torch.jit.save(torch.jit.script(Scorer(encoder)), buffer)
    return buffer.getvalue()
