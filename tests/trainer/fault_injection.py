"""Kill a two-rank run at random moments until it has finished, and compare it with an undisturbed
one: python -m tests.trainer.fault_injection KILLS [SEED].

Half of the kills (SIGKILL) take one rank, which torchrun answers with a restart of all; the others
take torchrun and every rank, and the same command is given again. Each run has to end with the
losses, test figures and weights of the undisturbed one, to the last digit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.trainer.launch import finish, kill, losses, processes, ring, start
from trainer.checkpoint import list_checkpoints
from trainer.checkpoint_files import MANIFEST
from trainer.observe import read_scalars

MOST = 5  # kills of one run
RESTARTS = ("--standalone", "--max-restarts=1000")


def main(kills: int, seed: int) -> None:
    draws = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="fault-injection-") as name:
        folder = Path(name)
        data, straight = ring(folder / "data"), folder / "straight"
        started = time.monotonic()
        expected = losses(finish(start([f"data.path={data}", f"run_dir={straight}"])))
        seconds = time.monotonic() - started
        done = runs = 0
        while done < kills:
            runs += 1
            run_dir, started = folder / f"run-{runs}", time.monotonic()
            killed = inject(data, run_dir, min(MOST, kills - done), seconds, draws)
            if not killed:  # the machine has become faster than the range of delays
                seconds = min(seconds, time.monotonic() - started)
            done += killed
            compare(run_dir, straight, expected)
            print(f"{done} kills, {runs} runs, no loss", flush=True)


def inject(data: Path, run_dir: Path, most: int, seconds: float, draws: random.Random) -> int:
    """Run to the end, killing at most so often, each time within `seconds` of a start; the kills.

    What the run printed is left in run_dir/output.txt.
    """
    arguments = [f"data.path={data}", f"run_dir={run_dir}", "trainer.asynchronous_checkpoints=true"]
    kills, printed = 0, ""
    while True:
        process = start(arguments, extra=RESTARTS)
        while kills < most and wait(process, draws.uniform(0.2, 0.9) * seconds):
            ranks = [one for one in processes(str(run_dir)) if one != process.pid]
            if not ranks:
                continue  # between two starts
            kills += 1
            if draws.random() < 0.5:
                kill(str(run_dir))
                break
            os.kill(draws.choice(ranks), signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
        printed += output
        if process.returncode == 0:
            (run_dir / "output.txt").write_text(printed)
            return kills
        assert process.returncode == -signal.SIGKILL, output


def wait(process: subprocess.Popen, seconds: float) -> bool:
    """Whether the process still runs after so long."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


def compare(run_dir: Path, straight: Path, expected: dict[int, str]) -> None:
    """Raise AssertionError unless the run ended as the undisturbed one did."""
    lines = (run_dir / "output.txt").read_text()
    found = losses(lines)
    assert found.items() <= expected.items()
    assert max(found) == max(expected)
    steps, values = read_scalars(run_dir)["train/loss"]
    assert steps == sorted(expected), "every step once, over all processes"
    assert {step: f"{one:.4f}" for step, one in zip(steps, values, strict=True)} == expected
    for part in ("test", "validation", "best_step", "steps", "epochs"):
        ours, theirs = (
            json.loads((one / "summary.json").read_text()) for one in (run_dir, straight)
        )
        assert ours[part] == theirs[part], part
    ours, theirs = (tensor_files(list_checkpoints(one)[-1]) for one in (run_dir, straight))
    assert ours == theirs


def tensor_files(checkpoint: Path) -> dict[str, dict]:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return {name: one for name, one in files.items() if name.endswith(".distcp")}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
