"""The training command as users run it: two ranks, resumed, over two hosts, and its refusals."""

import fcntl
import json
import os
import subprocess
import sys

import pytest

from data.schema import RESERVED_ROWS
from tests.conftest import ROOT
from tests.data.datasets import write_dataset
from tests.trainer.launch import TINY, finish, free_port, losses, start
from trainer.checkpoint import FOLDER, list_checkpoints


def test_run_folder_holds_what_the_readme_says(straight):
    run_dir, by_step = straight
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["steps"] == max(by_step)
    assert summary["world_size"] == 2
    assert set(summary["test"]["filtered"]) == set(summary["popularity"]["test"]["unfiltered"])
    assert (
        summary["test"]["unfiltered"]["hr@10"]
        > 1.5 * (summary["popularity"]["test"]["unfiltered"]["hr@10"])
    )
    for slices in summary["slices"].values():
        for records in slices.values():
            assert sum(one["targets"] for one in records) == summary["data"]["users"] == 80
    evaluated = summary["evaluations"][-1]
    assert evaluated["epochs"] == summary["epochs"] == 6.0
    assert evaluated["seconds"] < summary["seconds"] < evaluated["seconds"] + 30
    assert "SSD4Rec" in (run_dir / "report.html").read_text()
    assert list((run_dir / "tensorboard").iterdir())
    assert (run_dir / "config.yaml").exists()
    assert {one.name for one in (run_dir / FOLDER).iterdir()} == {
        one.name for one in list_checkpoints(run_dir)
    }


def test_resume_with_another_config_is_refused(data, straight):
    run_dir, _ = straight
    done = start([f"data.path={data}", f"run_dir={run_dir}", "model.dropout=0.5", "seed=9"])
    output, _ = done.communicate(timeout=120)
    assert done.returncode != 0
    assert "another config (model.dropout was 0.2, now 0.5; seed was 1, now 9)" in output


def test_finished_run_is_left_as_it_is(data, straight):
    run_dir, _ = straight
    before = (run_dir / "summary.json").read_bytes()
    report = run_dir / "report.html"
    drawn = report.read_text()
    report.unlink()
    assert "this run is finished" in finish(start([f"data.path={data}", f"run_dir={run_dir}"]))
    assert (run_dir / "summary.json").read_bytes() == before
    assert report.read_text() == drawn


def test_diverged_run_stops_before_it_stores_anything(data, tmp_path):
    wild = ["trainer.learning_rate=1e30", "embedding.learning_rate=1e30", "trainer.clip_norm=0"]
    error = error_of([f"data.path={data}", f"run_dir={tmp_path}", *wild])
    assert "training has diverged" in error or "lower trainer.learning_rate" in error
    assert not list_checkpoints(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_one_live_run_a_folder(data, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = error_of([f"data.path={data}", f"run_dir={tmp_path}"])
    assert f"another run is writing {tmp_path}; wait for it" in error


def test_init_from_a_run_with_fewer_items(data, straight, tmp_path):
    run_dir, _ = straight
    ring = [[RESERVED_ROWS + (start + step) % 36 for step in range(14)] for start in range(34)]
    grown = write_dataset(tmp_path / "grown", ring, table_rows=RESERVED_ROWS + 37)
    command = [
        sys.executable,
        "trainer/main.py",
        *TINY,
        f"data.path={grown}",
        f"run_dir={tmp_path / 'run'}",
        f"init_from={run_dir}",
        "trainer.max_epochs=2",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (
        "30 items keep their rows and their optimizer state, 7 are new; 1 of all have no training "
        "event" in done.stdout
    )
    first = float(done.stdout.split("loss ")[1].split()[0])
    assert first < 3, "a warm start begins where the other run ended"


def test_data_without_a_validation_target_is_refused_at_once(tmp_path):
    """By a dry run, and so by a run, which comes by there."""
    bare = write_dataset(tmp_path / "bare", [[8, 9, 10, 11]] * 9, n_train=[4] * 9)
    error = error_of([f"data.path={bare}", f"run_dir={tmp_path / 'run'}", "dry_run=true"])
    assert "has no validation target" in error
    assert not (tmp_path / "run").exists()


def error_of(arguments: list[str]) -> str:
    """The one line that a command of one process ends with."""
    done = subprocess.run(
        [sys.executable, "trainer/main.py", *TINY, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


def test_two_hosts_of_one_process_each(data, straight, tmp_path):
    _, expected = straight
    port = free_port()
    arguments = [f"data.path={data}", f"run_dir={tmp_path}", "trainer.max_epochs=1"]
    hosts = [
        start(
            arguments,
            ranks=1,
            extra=(
                "--nnodes=2",
                f"--node_rank={rank}",
                "--master_addr=127.0.0.1",
                f"--master_port={port}",
            ),
        )
        for rank in (0, 1)
    ]
    outputs = [finish(host) for host in hosts]
    by_step = losses(outputs[0])
    last = max(by_step)  # where the longer run goes on with the next epoch's packs
    assert last > 5
    for step in range(1, last):
        assert by_step[step] == expected[step]
    assert not losses(outputs[1]), "only rank 0 speaks"
    assert json.loads((tmp_path / "summary.json").read_text())["world_size"] == 2


def test_dry_run_plans_and_writes_nothing(data, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "trainer/main.py", *TINY, f"data.path={data}", "dry_run=true"]
    done = subprocess.run(
        [*command, f"run_dir={run_dir}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0: rows 0 to 38, columns 0 to 16" in done.stdout
    assert "rank 0: weights 2.4 KiB, optimizer state 0.1 KiB in host memory" in done.stdout
    assert "rank 0 in all, estimate: " in done.stdout
    assert "expected step time, estimate: " in done.stdout
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.path=/nowhere", "run_dir=R"], "data set /nowhere does not exist"),
        (["run_dir=R"], "missing on the command line: data.path=…"),
        (["data.path=a(b", "run_dir=R"], "cannot read the argument 'data.path=a(b'"),
        (["data.path=D", "run_dir=R", "trainer.device=cuda"], "torch sees no GPU"),
        (["data.path={data}", "run_dir=README.md"], "cannot write run_dir="),
    ],
)
def test_user_errors_are_one_sentence(data, arguments, message):
    arguments = [one.replace("{data}", str(data)) for one in arguments]
    assert message in error_of(arguments)
