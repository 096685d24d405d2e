"""The output folder: whole or absent, and replaced only when it is ours."""

import errno
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data.errors import InputError
from data.output_folder import LOCK
from data.schema import HISTORIES, MANIFEST, RESERVED_ROWS, Manifest
from tests.tools.conversion_cases import ROOT, digest, run, some_events, write
from tools import convert_logs


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.parquet", some_events(3, 200))


def test_output_is_replaced_only_when_it_is_ours(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(log, out)
    first = digest(out)
    with pytest.raises(InputError, match=r"already exists.*overwrite=true"):
        run(log, out)
    with pytest.raises(InputError, match="lies after"):  # a failed run leaves the old one whole
        run(log, out, {"kind": "temporal", "validation_from": 9, "test_from": 5}, overwrite=True)
    assert digest(out) == first
    run(log, out, overwrite=True, min_user_events=4)
    assert digest(out) != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes.txt'"):
        run(log, out, overwrite=True)
    with pytest.raises(InputError, match=r"already exists; remove it or choose another name$"):
        run(log, out)
    assert (out / MANIFEST).exists()
    with pytest.raises(InputError, match="cannot write"):
        run(log, tmp_path / "log.parquet/out")


def test_output_that_is_no_folder_is_kept(log: Path, tmp_path: Path) -> None:
    before = log.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (log, tmp_path / "link"):
        with pytest.raises(InputError, match="exists and is not a plain folder; choose another"):
            run(log, output, overwrite=True)
    assert log.read_bytes() == before


def test_full_disk_is_named_and_leaves_the_old_output(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(log, out)
    before = digest(out)

    def fill(folder: Path, *_: object) -> None:
        (folder / MANIFEST).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(convert_logs, "write_vocabulary", fill)
    with pytest.raises(InputError, match=r"the disk of .*/out is full .*; free space or choose"):
        run(log, out, overwrite=True)
    assert digest(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet", "out"]


def test_killed_run_leaves_nothing_finished_and_is_cleaned_up(tmp_path: Path, log: Path) -> None:
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    script = (
        "import os, sys\nfrom tests.tools import conversion_cases as t\n"
        "import tools.convert_logs as c\n"
        "c.write_vocabulary = lambda *_: os.kill(os.getpid(), 9)\n"
        f"t.run({str(log)!r}, t.Path({str(out)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert unfinished.exists()
    assert not out.exists()
    run(log, out)
    assert Manifest.read(out).counts["events"] == 200
    assert not unfinished.exists()
    unfinished.mkdir()
    (unfinished / "precious.txt").write_text("not ours")
    with pytest.raises(InputError, match="in the way"):
        run(log, out, overwrite=True)
    assert (unfinished / "precious.txt").exists()


def test_two_runs_at_once_are_kept_apart(tmp_path: Path, log: Path) -> None:
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with (unfinished / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            run(log, tmp_path / "out")
    run(log, tmp_path / "out")


def test_manifest_hashes_are_those_of_the_files(log: Path, tmp_path: Path) -> None:
    made = run(log, tmp_path / "out").manifest
    assert Manifest.read(tmp_path / "out") == made
    for one in [made.vocabulary, *made.histories]:
        content = (tmp_path / "out" / one.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one.bytes, one.sha256)
    text = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert str(tmp_path) not in json.dumps(text)
    assert os.listdir(tmp_path / "out" / HISTORIES) == ["part-00000.parquet"]
    counted = Counter(event["item"] for event in some_events(3, 200))
    assert len(counted) == made.table_rows - RESERVED_ROWS
