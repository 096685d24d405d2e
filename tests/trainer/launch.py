"""The training command as a child process, on a data set that is easy to learn."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.schema import RESERVED_ROWS
from tests.conftest import ROOT
from tests.data.datasets import write_dataset

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = [
    "model.width=16",
    "model.state=8",
    "model.head=8",
    "model.layers=1",
    "data.batch_tokens=64",
    "data.mask_ratio=0",
    "embedding.optimizer=rowwise_adagrad",
    "embedding.learning_rate=0.05",
    "trainer.schedule=constant",
    "trainer.warmup_steps=2",
    "trainer.patience=0",
    "trainer.log_every_steps=1",
    "trainer.checkpoint_every_steps=5",
    "trainer.keep_checkpoints=50",
    "trainer.max_epochs=6",
    "trainer.device=cpu",
]


def ring(folder: Path) -> Path:
    """Users who walk round a ring of 30 items: easy to predict, and popularity knows nothing."""
    draws = np.random.default_rng(0)
    histories = []
    for length in draws.integers(5, 30, 80):
        start = int(draws.integers(30))
        histories.append([RESERVED_ROWS + (start + step) % 30 for step in range(length)])
    return write_dataset(folder, histories, row_group_users=20)


def start(
    arguments: list[str],
    ranks: int = 2,
    extra: tuple[str, ...] = (),
    program: str = "trainer/main.py",
) -> subprocess.Popen:
    """torchrun with so many ranks; `extra` goes to torchrun itself."""
    # --standalone: a free port, where two runs of one machine would share torchrun's default.
    launcher = [*TORCHRUN, f"--nproc_per_node={ranks}", *(extra or ["--standalone"])]
    return spawn([*launcher, program, *TINY, *arguments])


def spawn(command: list[str]) -> subprocess.Popen:
    """A command at the project's root, for `finish`."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 240.0) -> str:
    """What it printed, once it has ended well within so long; the test fails otherwise."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # torchrun ends its ranks
        output, _ = process.communicate()
        pytest.fail(output)
    assert process.returncode == 0, output
    return output


def processes(argument: str) -> list[int]:
    """torchrun and its ranks, which have sessions of their own: all that were started with this
    in their arguments."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                command = (folder / "cmdline").read_text()
            except OSError:
                continue
            if argument in command and "trainer/main.py" in command:
                found.append(int(folder.name))
    return found


def kill(argument: str) -> None:
    for one in processes(argument):
        os.kill(one, signal.SIGKILL)


def free_port() -> int:
    """A free port below those that the system hands out: no other connection takes it meanwhile."""
    for port in random.sample(range(20_000, 30_000), 50):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)):
                return port
    raise OSError("no free port")


def losses(output: str) -> dict[int, str]:
    """Loss by step of the log lines."""
    lines = [line.split() for line in output.splitlines() if line.startswith("step ")]
    return {int(one[1].replace(",", "")): one[3] for one in lines if one[2] == "loss"}
