"""python -m tools.check_env: are the installed libraries the ones that work together?

Prints versions, then imports what a training run imports. Exits non-zero, with one sentence, when
they cannot work together.
"""

import importlib
import os
import sys

from configs.environment import require_matching, versions
from data.errors import InputError

IMPORTS = ("torch", "fbgemm_gpu", "torchrec", "pyarrow", "duckdb", "hydra", "tensorboard")


def main() -> None:
    found = versions()
    for name, version in found.items():
        print(f"{name:<16} {version}")
    try:
        require_matching(found)
        _import_all()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"{'devices':<16} {_devices()}")
    print("these versions work together")


def _import_all() -> None:
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise InputError(f"{name} does not import ({reason}); run `make install`") from error


def _devices() -> str:
    import torch

    cpu = f"{os.cpu_count()} CPU cores"
    if not torch.cuda.is_available():
        return f"{cpu}, no GPU that torch sees"
    names = [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())]
    return f"{cpu}, " + ", ".join(names)


if __name__ == "__main__":
    main()
