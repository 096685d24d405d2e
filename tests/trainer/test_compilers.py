"""The children that compile kernels: when there are some, what they import, how they end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from configs.command import plain_config
from tests.conftest import ROOT
from tests.data.datasets import write_dataset
from trainer import compilers
from trainer.compilers import Compilers, compilers_of, marker_name
from trainer.config import Config

SLEEPING = [sys.executable, "-c", "import time; time.sleep(300)"]
FAILING = [sys.executable, "-c", "import sys; print(1, file=sys.stderr); sys.exit('no memory')"]
WELL = [sys.executable, "-c", "print('never seen')"]


def test_a_child_imports_neither_fbgemm_nor_torchrec():
    """Nor does what it runs, on the CPU."""
    code = """
import sys, torch
from tests.trainer.test_compile_step import resolved
from trainer.compile_step import step_of
from trainer.world import World
step_of(resolved("model.width=16", "model.head=8"), 50, World(0, 1, 0, 1, torch.device("cpu")))()
print([one for one in sys.modules if one.split(".")[0] in ("fbgemm_gpu", "torchrec")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_before_the_children_torch_is_not_imported():
    code = "import sys, trainer.main; from triton import knobs; print('torch' in sys.modules)"
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def begun(commands: list[list[str]], marker: Path, limit_seconds: float = 60.0) -> Compilers:
    found = Compilers(limit_seconds)
    found.begin(lambda: (commands, marker))
    return found


def test_children_that_end_well_leave_the_marker(tmp_path, capfd):
    marker = tmp_path / "marker"
    started = begun([WELL, WELL], marker)
    assert started.wait() is None
    assert marker.exists()
    assert started.wait() is None  # there are none left
    assert capfd.readouterr() == ("", "")


def test_a_child_that_fails_stops_nothing(tmp_path):
    marker = tmp_path / "marker"
    assert begun([WELL, FAILING], marker).wait() == (
        "compiling kernels beside the imports failed (no memory); the first step compiles them"
    )
    assert not marker.exists()


def test_a_child_that_hangs_delays_no_longer_than_the_limit(tmp_path):
    before = time.monotonic()
    started = begun([SLEEPING, SLEEPING], tmp_path / "marker", limit_seconds=0.3)
    processes = [one._process for one in started._children]
    assert "took too long; the first step compiles them" in (started.wait() or "")
    assert time.monotonic() - before < 5
    assert all(one.poll() is not None for one in processes)
    assert not (tmp_path / "marker").exists()


def test_a_cache_that_cannot_be_marked_is_no_failure(tmp_path):
    assert begun([WELL], tmp_path / "absent" / "marker").wait() is None


def test_children_that_cannot_start_stop_nothing(tmp_path):
    marker = tmp_path / "marker"
    found = begun([SLEEPING, [str(tmp_path / "no python")]], marker, limit_seconds=0.3)
    processes = [one._process for one in found._children]
    assert re.search(r"failed \(.*no python.*\); the first step compiles", found.wait() or "")
    assert [one.poll() is not None for one in processes] == [True]
    assert not marker.exists()


def test_a_package_that_is_not_known_stops_nothing():
    def work():
        raise PackageNotFoundError("triton")

    found = Compilers()
    found.begin(work)
    assert "triton" in (found.wait() or "")


@pytest.mark.skipif(sys.platform != "linux", reason="children start on Linux alone")
@pytest.mark.parametrize("asks_early", [True, False])
def test_a_child_ends_with_a_parent_that_is_killed(tmp_path, asks_early):
    """Be it before the child has asked for that or after."""
    pids, killed = tmp_path / "pids", tmp_path / "killed"
    child = f"""
import os, sys, time
from pathlib import Path
from trainer.compilers import end_with
while not {asks_early} and not Path({str(killed)!r}).exists():
    time.sleep(0.02)
    Path({str(pids)!r}).write_text(str(os.getpid()))
end_with(int(sys.argv[1]))
Path({str(pids)!r}).write_text(str(os.getpid()))
time.sleep(300)
"""
    code = f"""
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", {child!r}, str(os.getpid())])
time.sleep(300)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_until(lambda: pids.exists() and pids.read_text())
    parent.kill()
    parent.wait()
    killed.touch()
    wait_until(lambda: not alive(int(pids.read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="children start on Linux alone")
def test_a_child_whose_parent_is_gone_ends_before_its_imports(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is imported')")
    done = subprocess.run(
        [sys.executable, "-m", "trainer.compile_step", json.dumps({"parent": 1})],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")


def wait_until(what, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie that nobody has asked for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """A run's config on a machine that seems to have a GPU, and an empty cache."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(compilers, "gpu_name", lambda: "a GPU")
    monkeypatch.setattr(compilers, "cores", lambda: 16)
    folder = write_dataset(tmp_path / "data", [[8, 9, 10, 11]] * 9)
    return plain_config("train", [f"data.path={folder}", f"run_dir={tmp_path / 'run'}"])


def started(monkeypatch, plain, **trainer) -> list[list[str]]:
    """The commands of the children of a run, which are never started."""
    commands: list[list[str]] = []

    def keep(self, command, cache):
        commands.append(command)

    monkeypatch.setattr(compilers._Child, "__init__", keep)
    monkeypatch.setattr(compilers._Child, "end", lambda self: None)
    plain = plain | {"trainer": plain["trainer"] | trainer}
    with compilers_of(Config.of(plain), plain):
        return commands


def test_shares_of_kernels_and_cores(monkeypatch, plain):
    found = started(monkeypatch, plain)
    assert [one[1:3] for one in found] == [["-m", "trainer.compile_step"]] * 4
    given = [json.loads(one[3]) for one in found]
    assert [one["number"] for one in given] == [0, 1, 2, 3]
    assert {(one["parent"], one["of"], one["threads"]) for one in given} == {(os.getpid(), 4, 4)}
    monkeypatch.setattr(compilers, "cores", lambda: 2)
    (one,) = started(monkeypatch, plain)
    given = json.loads(one[3])
    assert (given["number"], given["of"], given["threads"]) == (0, 1, 2)


def test_a_run_that_needs_none_starts_none(monkeypatch, plain):
    assert started(monkeypatch, plain, device="cuda")
    assert not started(monkeypatch, plain, device="cpu")
    assert not started(monkeypatch, plain | {"dry_run": True})
    elsewhere = plain["data"] | {"path": "/nowhere"}
    assert not started(monkeypatch, plain | {"data": elsewhere})  # the run itself will say it
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        assert not started(patch, plain)
    with monkeypatch.context() as patch:
        patch.setattr(compilers, "gpu_name", lambda: None)
        assert not started(patch, plain)
    (marker,) = {compilers._work(Config.of(plain), plain)[1]}
    marker.parent.mkdir()
    marker.touch()
    assert not started(monkeypatch, plain)


def test_no_gpu_is_seen_where_none_may_be_used():
    code = "from trainer.compilers import gpu_name; print(gpu_name())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout == "None\n"


def test_children_end_with_a_run_that_fails(monkeypatch, plain):
    monkeypatch.setattr(compilers, "commands", lambda plain, cores: [SLEEPING])
    config = Config.of(plain)
    with pytest.raises(RuntimeError), compilers_of(config, plain) as found:  # noqa: PT012
        processes = [one._process for one in found._children]
        assert [one.poll() for one in processes] == [None]
        raise RuntimeError
    assert all(one.poll() is not None for one in processes)


def test_marker_changes_with_what_decides_the_kernels(plain, tmp_path):
    pytest.importorskip("triton")
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "modules", sources / "modules")

    def name(part: str = "", manifest: bytes = b"1", gpu: str = "H100", **values) -> str:
        changed = plain | ({part: plain[part] | values} if part else values)
        return marker_name(changed, manifest, gpu, sources)

    same = {name(), name(run_dir="elsewhere"), name(seed=9), name("data", path="/moved")}
    assert len(same) == 1
    others = [
        name("model", width=128),
        name("loss", kind="sampled"),
        name("data", batch_tokens=99),
        name("trainer", precision="fp32"),
        name(manifest=b"2"),
        name(gpu="H200"),
    ]
    kernel = sources / "modules" / "kernels" / "conv.py"
    kernel.write_text(kernel.read_text() + "\n")
    others.append(name())
    assert len({*others, *same}) == len(others) + 1


def test_sources_are_where_the_marker_looks_for_them():
    for pattern in compilers.SOURCES:
        assert list(ROOT.glob(pattern)), pattern
    assert ROOT / "modules/kernels/ssd.py" in set(ROOT.glob(compilers.SOURCES[0]))


def test_the_children_are_of_this_package():
    assert Path(compilers.ROOT) == ROOT
