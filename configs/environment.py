"""The versions that must agree, checked before the imports that a mismatch would break."""

import logging
import sys
from importlib.metadata import PackageNotFoundError, version

from data.errors import InputError

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu", "fbgemm_gpu")


def versions() -> dict[str, str]:
    """Installed versions of what results depend on; an absent package is left out."""
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchrec", *FBGEMM, "triton", "mamba-ssm", "numpy", "pyarrow", "duckdb"):
        try:
            found[name.replace("_", "-")] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_versions() -> None:
    """Stop with one sentence when torch, fbgemm and torchrec do not belong together.

    fbgemm 1.X is ABI-locked to torch 2.(X+5), and torchrec 1.X calls fbgemm 1.X; users otherwise
    meet "fbgemm has no attribute jagged_2d_to_dense".
    """
    try:
        require_matching(versions())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    quiet_fbgemm()


def quiet_fbgemm() -> None:
    """Before its import: its own check knows no release of its last year, and says so each time."""
    logging.getLogger().addFilter(_not_of_fbgemms_table)


def _not_of_fbgemms_table(record: logging.LogRecord) -> bool:
    return "_fbgemm_torch_compat_table" not in str(record.msg)


def require_matching(found: dict[str, str]) -> None:
    """Raises InputError where `found` (package to version) cannot work together."""
    fbgemm = next((found[name] for name in FBGEMM if name in found), None)
    for name, one in (
        ("torch", found.get("torch")),
        ("fbgemm-gpu", fbgemm),
        ("torchrec", found.get("torchrec")),
    ):
        if one is None:
            raise InputError(f"{name} is not installed; `make install` (or install-cuda) does it")
    torch_minor, fbgemm_minor = _minor(found["torch"]), _minor(fbgemm or "")
    if torch_minor != fbgemm_minor + 5:
        raise InputError(
            f"torch {found['torch']} and fbgemm-gpu {fbgemm} do not belong together: fbgemm 1.X "
            f"needs torch 2.(X+5), so install fbgemm 1.{torch_minor - 5} or "
            f"torch 2.{fbgemm_minor + 5}; `make install` brings torch 2.13 with fbgemm 1.8"
        )
    if _minor(found["torchrec"]) != fbgemm_minor:
        raise InputError(
            f"torchrec {found['torchrec']} needs fbgemm-gpu 1.{_minor(found['torchrec'])}, found "
            f"{fbgemm}; `make install` brings a matching pair"
        )


def _minor(text: str) -> int:
    return int(text.split(".")[1])
