"""Train SSD4Rec: torchrun --nproc_per_node=N trainer/main.py experiment=NAME data.path=… run_dir=…

The same command again resumes the run from its newest checkpoint.
"""

import time

STARTED = time.monotonic()  # before the imports, which cost seconds too

# ruff: noqa: E402
from configs.environment import check_versions

check_versions()  # a mismatch would break the imports of `trainer.run`

from typing import Any

from configs.command import command
from trainer.compilers import compilers_of
from trainer.config import Config


@command("train")
def main(plain: dict[str, Any]) -> None:
    config = Config.of(plain)
    with compilers_of(config, plain) as compilers:
        from trainer.run import run  # torch, FBGEMM, TorchRec: seconds, in which kernels compile

        run(config, compilers, STARTED)


if __name__ == "__main__":
    main()
