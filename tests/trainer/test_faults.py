"""A two-rank run that is killed, asked to stop, or hangs; and a rank that watches itself."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.trainer.fault_injection import compare, inject
from tests.trainer.launch import finish, losses, start
from trainer.checkpoint import list_checkpoints
from trainer.watchdog import STALLED


def wait_for_checkpoint(run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    while not list_checkpoints(run_dir):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_run_that_is_killed_again_and_again_ends_as_if_it_were_not(data, straight, tmp_path):
    run_dir, expected = straight
    killed = tmp_path / "run"
    assert inject(data, killed, most=3, seconds=12.0, draws=random.Random(3))
    compare(killed, run_dir, expected)


def test_sigterm_saves_and_the_same_command_goes_on(data, straight, tmp_path):
    _, expected = straight
    arguments = [f"data.path={data}", f"run_dir={tmp_path}"]
    process = start(arguments)
    wait_for_checkpoint(tmp_path)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    (line,) = [one for one in output.splitlines() if one.startswith("stopped by SIGTERM")]
    step = int(line.split("step ")[1].split(";")[0].replace(",", ""))
    assert list_checkpoints(tmp_path)[-1].name == f"step-{step:08d}"
    assert max(losses(output)) == step < max(expected)
    resumed = losses(finish(start(arguments)))
    assert {**losses(output), **resumed} == expected
    assert min(resumed) == step + 1


def test_rank_that_hangs_is_named_and_ends_the_job(data, tmp_path):
    process = start(
        [f"data.path={data}", f"run_dir={tmp_path}", "trainer.stall_seconds=20"],
        extra=("--standalone", "-m"),
        program="tests.trainer.faulty",
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "rank 1 on " in output
    assert "has made no progress for 20 s (trainer.stall_seconds) while taking step 4" in output
    assert "in stalling" in output, "its stack"


@pytest.mark.parametrize(
    ("hang", "status", "message"),
    [
        ("time.sleep(60)", STALLED, "error: rank 3 on "),
        # Without giving up Python's lock: no other thread gets to run.
        ("ctypes.PyDLL(None).usleep(60_000_000)", 1, "Timeout (0:00:0"),
    ],
)
def test_watchdog_ends_a_process_that_hangs(hang, status, message):
    program = (
        "import ctypes, time; from trainer.watchdog import Watchdog\n"
        "with Watchdog(2.0, rank=3) as watchdog:\n"
        "    for _ in range(20): time.sleep(0.05); watchdog.beat('taking step 7')\n"
        f"    {hang}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert 'File "<string>", line 4' in done.stderr


def test_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time; import trainer.stop as stop\n"
        "stop.ECHO_SECONDS = 0.2\n"
        "with stop.stop_request() as request:\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.3)\n"
        "    print(request.number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == -signal.SIGTERM
    assert done.stdout == f"{int(signal.SIGTERM)}\n"
