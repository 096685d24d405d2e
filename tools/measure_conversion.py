"""How long a conversion takes beside the time to read and write its files, measured in turn.

    python -m tools.measure_conversion input=LOG scratch=DIR [rounds=3 memory_limit=4GB threads=2]

The floor decodes the log's columns and encodes the data set's histories, row group by row group,
with the converter's own Parquet settings; decoding the histories for that is not counted. Each
side is a process of its own. Other work on the machine slows both alike, but not equally: CPU
seconds stand beside the clock's.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from configs.command import command
from data.conversion import history_writer
from data.cores import check_threads
from data.errors import InputError, check_whole
from data.log_files import find_files
from data.schema import Manifest
from tools.stages import print_table

POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Cost:
    """What a process took; scratch_bytes: the most that lay in its folder at one time."""

    seconds: float
    cpu_seconds: float
    memory_bytes: int
    scratch_bytes: int


def measure(arguments: list[str], scratch: Path) -> Cost:
    """Run `python …` to its end. Raises InputError when it fails."""
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(scratch, peak, done))
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    if os.waitstatus_to_exitcode(status):
        raise InputError(f"python {' '.join(arguments)} failed; its own sentence is above")
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(seconds, cpu, usage.ru_maxrss * 1024, peak[0])


def _watch(folder: Path, peak: list[int], done: threading.Event) -> None:
    while not done.wait(POLL_SECONDS):
        total = 0
        for one in folder.rglob("*"):
            try:
                total += one.stat().st_blocks * 512
            except FileNotFoundError:
                continue
        peak[0] = max(peak[0], total)


def read_and_write(log: list[str], dataset: Path, output: Path) -> tuple[float, float]:
    """Decode the log, encode the histories. Returns the seconds and CPU seconds of that alone."""
    clock = _Clock()
    for path in log:
        with pq.ParquetFile(path) as file:
            batches = iter(file.iter_batches(columns=["user_id", "item_id", "timestamp"]))
            while clock.timed(next, batches, None) is not None:
                pass
    output.mkdir()
    for number, one in enumerate(Manifest.read(dataset).histories):
        with pq.ParquetFile(dataset / one.path) as file:
            writer = history_writer(output / f"{number}.parquet", file.schema_arrow)
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                clock.timed(writer.write_table, table)
            clock.timed(writer.close)
    shutil.rmtree(output)
    return clock.seconds, clock.cpu_seconds


class _Clock:
    """The seconds spent in what it calls."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def timed(self, call: Callable[..., Any], *arguments: Any) -> Any:
        start, cpu = time.monotonic(), time.process_time()
        result = call(*arguments)
        self.seconds += time.monotonic() - start
        self.cpu_seconds += time.process_time() - cpu
        return result


def _floor(log: list[str], dataset: Path, output: Path, threads: int) -> tuple[float, float]:
    """`read_and_write` in a process of its own."""
    script = (
        "import json, sys, pyarrow, pathlib\n"
        "from tools.measure_conversion import read_and_write\n"
        "log, dataset, output, threads = json.loads(sys.argv[1])\n"
        "pyarrow.set_cpu_count(threads)\n"
        "print(json.dumps(read_and_write(log, pathlib.Path(dataset), pathlib.Path(output))))"
    )
    facts = json.dumps([log, str(dataset), str(output), threads])
    done = subprocess.run(
        [sys.executable, "-c", script, facts], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise InputError(f"cannot read the log again and write {output}; the reason is above")
    seconds, cpu_seconds = json.loads(done.stdout)
    return seconds, cpu_seconds


@command("measure_conversion")
def main(options: dict[str, Any]) -> None:
    check_whole("rounds", options["rounds"], 1)
    check_threads(options["threads"])
    files = find_files(options["input"])
    if files.kind != "parquet":
        raise InputError(
            f"{files.paths[0]} is no Parquet, and reading CSV is no floor; name a Parquet log"
        )
    scratch = Path(str(options["scratch"])).absolute()
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot make scratch={scratch}: {error.strerror}; name a new folder"
        ) from error
    try:
        _measure_rounds(options, list(files.paths), scratch)
    finally:
        shutil.rmtree(scratch)


def _measure_rounds(options: dict[str, Any], log: list[str], scratch: Path) -> None:
    dataset = scratch / "data"
    inputs = ",".join(f'"{path}"' for path in log)
    arguments = ["-m", "tools.convert_logs", f"input=[{inputs}]", f'output="{dataset}"']
    arguments += [f"{name}={options[name]}" for name in ("memory_limit", "threads")]
    conversions: list[Cost] = []
    floors: list[tuple[float, float]] = []
    for number in range(1, options["rounds"] + 1):
        shutil.rmtree(dataset, ignore_errors=True)
        conversions.append(measure(arguments, scratch))
        floors.append(_floor(log, dataset, scratch / "floor", options["threads"]))
        one, (seconds, cpu_seconds) = conversions[-1], floors[-1]
        print(
            f"round {number}: conversion {one.seconds:.1f} s ({one.cpu_seconds:.1f} s CPU), "
            f"read and write {seconds:.1f} s ({cpu_seconds:.1f} s CPU)",
            flush=True,
        )
    _report(Manifest.read(dataset), conversions, floors, sum(os.path.getsize(one) for one in log))


def _report(
    manifest: Manifest, conversions: list[Cost], floors: list[tuple[float, float]], log_bytes: int
) -> None:
    middle = statistics.median
    ratio = middle(
        one.seconds / seconds for one, (seconds, _) in zip(conversions, floors, strict=True)
    )
    cpu_ratio = middle(
        one.cpu_seconds / cpu for one, (_, cpu) in zip(conversions, floors, strict=True)
    )
    memory = max(one.memory_bytes for one in conversions)
    disk = max(one.scratch_bytes for one in conversions)
    written = sum(one.bytes for one in manifest.files)
    print_table(
        [
            ("events", f"{manifest.counts['events_read']:,}"),
            ("log, data set", f"{log_bytes / 1e9:.2f} GB, {written / 1e9:.2f} GB"),
            ("times the floor", f"{ratio:.1f} by the clock, {cpu_ratio:.1f} by CPU seconds"),
            ("most memory", f"{memory / 2**30:.2f} GiB"),
            ("most disk", f"{disk / 1e9:.2f} GB, {disk / log_bytes:.1f} times the log"),
        ]
    )


if __name__ == "__main__":
    main()
