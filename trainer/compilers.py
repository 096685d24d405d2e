"""Processes that compile the step's kernels while this one imports FBGEMM and TorchRec.

Those imports take as long as the kernels do where Triton's cache is cold, and neither leaves Python
free for the other. The children (`trainer.compile_step`) fill the cache on the disk, where
`compile_ahead` of the first step finds the kernels; what they did not get done, it compiles.

A file in that cache says that the kernels of a config are there, so that a warm start has no
children; whoever clears the cache clears it too. Nothing here imports torch, which takes seconds.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from data.cores import cores
from data.schema import MANIFEST
from trainer.config import Config

ROOT = Path(__file__).parent.parent
LIMIT_SECONDS = 60.0  # from the children's start
MOST_CHILDREN, CORES_A_CHILD = 4, 4
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)
COMPUTE_MODE, SHARED = 20, 0  # CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, CU_COMPUTEMODE_DEFAULT
# Code that decides which kernels a config has, and of which constants.
SOURCES = ("modules/**/*.py", "trainer/compile_step.py", "trainer/parts.py", "trainer/resolve.py")


@contextmanager
def compilers_of(config: Config, plain: dict[str, Any]) -> Iterator["Compilers"]:
    """The children of this process, which end with the block at the latest.

    There are some only where this is the first rank of its host, the run will train on a GPU, and
    the kernels of its config are not in Triton's cache. plain: what `config` was made of.
    """
    compilers = Compilers()
    try:
        compilers.begin(lambda: _work(config, plain))
        yield compilers
    finally:
        compilers.end()


def _work(config: Config, plain: dict[str, Any]) -> tuple[list[list[str]], Path]:
    """The children's commands, perhaps none, and the marker that makes them needless."""
    nothing: tuple[list[list[str]], Path] = ([], Path())
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if config.trainer.device == "cpu" or config.dry_run or not first or not find_spec("triton"):
        return nothing
    manifest = Path(config.data.path) / MANIFEST
    gpu = gpu_name()
    if gpu is None or not manifest.exists():
        return nothing
    marker = cache_folder() / marker_name(plain, manifest.read_bytes(), gpu)
    return ([] if marker.exists() else commands(plain, cores())), marker


def commands(plain: dict[str, Any], cores: int) -> list[list[str]]:
    """One command a child, each with its share of the kernels and of the cores."""
    path = str(Path(plain["data"]["path"]).resolve())
    config = plain | {"data": plain["data"] | {"path": path}}
    of = max(1, min(MOST_CHILDREN, cores // CORES_A_CHILD))
    shares = [
        {
            "parent": os.getpid(),
            "config": config,
            "number": number,
            "of": of,
            "threads": max(1, cores // of),
        }
        for number in range(of)
    ]
    return [[sys.executable, "-m", "trainer.compile_step", json.dumps(one)] for one in shares]


def cache_folder() -> Path:
    """Triton's cache of compiled kernels."""
    from triton import knobs  # Triton comes with a GPU

    return Path(knobs.cache.dir)


def marker_name(plain: dict[str, Any], manifest: bytes, gpu: str, root: Path = ROOT) -> str:
    """A name that changes with whatever decides the kernels of a config's step.

    manifest: the data set's, by which it is known wherever it lies. root: of the sources.
    """
    data = {key: value for key, value in plain["data"].items() if key != "path"}
    decides = [
        *(plain["model"], plain["loss"], data, plain["trainer"]["precision"]),
        *(os.environ.get("WORLD_SIZE", "1"), gpu, version("torch"), version("triton")),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
    digest.update(manifest)
    for pattern in SOURCES:
        for path in sorted(root.glob(pattern)):
            digest.update(path.read_bytes())
    return f"ssd4rec-{digest.hexdigest()}"


def gpu_name() -> str | None:
    """The first GPU that this process and its children may use at once, by the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, mode, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    # Short of the first error, which is not 0. Not one that is set to serve one process alone.
    found = (
        not driver.cuInit(0)
        and not driver.cuDeviceGet(ctypes.byref(device), 0)
        and not driver.cuDeviceGetAttribute(ctypes.byref(mode), COMPUTE_MODE, device)
        and not driver.cuDeviceGetName(name, len(name), device)
    )
    return name.value.decode() if found and mode.value == SHARED else None


def end_with(parent: int) -> None:
    """Have Linux end this process with the one that started it, however that ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os.kill(os.getpid(), signal.SIGKILL)


class Compilers:
    """Children that compile: `begin`, then `wait` for them or `end` them."""

    def __init__(self, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._limit_seconds = limit_seconds
        self._deadline = 0.0
        self._marker = Path()
        self._children: list[_Child] = []
        self._failure: str | None = None

    def begin(self, work: Callable[[], tuple[list[list[str]], Path]]) -> None:
        """Start a child for each command of `work`.

        The other half of its answer is the marker, which is made once all of them have ended well.
        What keeps them from starting is for `wait` to say.
        """
        try:
            commands, self._marker = work()
            self._deadline = time.monotonic() + self._limit_seconds
            for command in commands:
                self._children.append(_Child(command, self._marker.parent))
        except (OSError, PackageNotFoundError) as error:
            self._failure = f"failed ({error})"

    def wait(self) -> str | None:
        """Wait for the children, until the limit; a sentence on what failed.

        Afterwards no child is alive, and none holds memory of the device.
        """
        failures = [self._failure, *(one.failure(self._deadline) for one in self._children)]
        self.end()
        found = [one for one in failures if one]
        if self._children and not found:
            with contextlib.suppress(OSError):  # without it the next start has children again
                self._marker.touch()
        self._children = []
        if not found:
            return None
        return f"compiling kernels beside the imports {found[0]}; the first step compiles them"

    def end(self) -> None:
        for one in self._children:
            one.end()


class _Child:
    """A running command, whose kernels go to `cache`."""

    def __init__(self, command: list[str], cache: Path) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "TRITON_CACHE_DIR": str(cache.absolute())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def failure(self, deadline: float) -> str | None:
        """What went wrong, once it has ended or it is `deadline`."""
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "took too long"
        if status == 0:
            return None
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"failed ({lines[-1] if lines else f'status {status}'})"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._errors.close()
