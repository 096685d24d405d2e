"""The output folder of batch scoring, shared by processes that meet through its files alone.

_job.json       what is being scored; a killed run goes on only with its own job
part-*.parquet  finished units
_summary.json   counts; written last, so a folder that has one is finished

Readers of Parquet folders pass over names that start with _.
"""

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from configs.environment import versions
from data.errors import InputError
from data.schema import write_atomically

JOB, SUMMARY = "_job.json", "_summary.json"
COUNTS = b"ssd4rec.counts"  # of a unit, in the metadata of its file's schema
POLL_SECONDS = 0.1


class ScoreFolder:
    """An output folder and the job that fills it. `scratch` names a folder removed at the end."""

    def __init__(self, path: Path, job: dict[str, Any], scratch: str) -> None:
        self.path, self.scratch = path, scratch
        self.job = json.loads(json.dumps(job))

    def begin(self, is_main: bool) -> bool:
        """Claim the folder (the main process) or wait for that; False where all is done already.

        Raises InputError for an output that is finished, of another job, or not ours.
        """
        if not is_main:
            while not self._holds(JOB):
                if self.finished:
                    return False
                time.sleep(POLL_SECONDS)
            return True
        try:
            if (self.path / SUMMARY).exists():
                raise InputError(
                    f"output={self.path} already exists; remove it or choose another name"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            entries = sorted(entry.name for entry in self.path.iterdir())
            if entries and JOB not in entries:
                raise InputError(
                    f"output={self.path} holds {entries[0]!r} and is no unfinished output of this "
                    "command; choose another name"
                )
            if entries and not self._holds(JOB):
                raise InputError(
                    f"output={self.path} holds unfinished scores of another bundle, input or "
                    "options; remove that folder to start over, or choose another name"
                )
            self._write_json(JOB, self.job)
        except OSError as error:
            raise InputError(
                f"cannot write output={self.path}: {error.strerror}; name a writable place"
            ) from error
        return True

    def abandon(self) -> None:
        """Give the folder up where nothing has been scored yet, so that the next run may be of
        another job. For the main process alone."""
        if {entry.name for entry in self.path.iterdir()} <= {JOB, self.scratch}:
            shutil.rmtree(self.path)

    def _holds(self, name: str) -> bool:
        """Whether a JOB or SUMMARY of this very job is there."""
        try:
            content = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError):
            return False
        return (content.get("job") if name == SUMMARY else content) == self.job

    @property
    def finished(self) -> bool:
        """Whether the main process has committed this very job."""
        return self._holds(SUMMARY)

    def wait_for(self, path: Path) -> None:
        """Wait until another process has written `path`; torchrun ends us when that one fails."""
        while not path.exists() and not self.finished:
            time.sleep(POLL_SECONDS)

    def write(self, name: str, table: pa.Table) -> None:
        """Write one unit, whole or not at all."""
        temporary = self.path / f"{name}.tmp"
        # Without a dictionary: ids of a large catalogue overflow one, and cost a third more time.
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(self.path / name)

    def progress(self, users: int, rank: int, size: int) -> tqdm:
        """Users and users/s of the first process's own share, on a terminal."""
        return tqdm(
            total=users,
            unit="user",
            unit_scale=True,
            desc="scoring" if size == 1 else f"scoring (1 of {size} processes)",
            disable=True if rank else None,
        )

    def finish(self, summary: dict[str, Any]) -> None:
        """Remove what only the work needed and commit the summary."""
        shutil.rmtree(self.path / self.scratch, ignore_errors=True)
        for left in self.path.glob("*.tmp"):
            left.unlink()
        self._write_json(SUMMARY, summary | {"job": self.job, "versions": versions()})
        (self.path / JOB).unlink()

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(self.path / name, text.encode())


class WriteBehind:
    """Runs jobs in threads of its own, so that whoever submits them can go on.

    As many jobs wait as there are threads: `submit` waits for the oldest where there are more. What
    a job raises is raised by a later `submit` or at the end of the `with` block, which waits for
    all, also where it ends by an exception: what was computed is written.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="write")
        self._unfinished: deque[Future[Any]] = deque()

    def submit(self, job: Callable[[], Any]) -> None:
        while len(self._unfinished) >= 2 * self._threads:
            self._unfinished.popleft().result()
        self._unfinished.append(self._executor.submit(job))

    def finish(self) -> None:
        """Wait for all jobs so far."""
        while self._unfinished:
            self._unfinished.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._executor.shutdown()
        if kind is None:
            self.finish()


def summarise(folder: ScoreFolder, names: Iterable[str], log: dict[str, int]) -> dict[str, Any]:
    """The counts over all written units, and those of a raw log, whose unknown users are users
    without a history too."""
    totals = {"users_scored": 0, "users_without_history": 0, "users_short": 0, "events": 0}
    parts = list(names)
    for name in parts:
        for key, count in unit_counts(pq.read_schema(folder.path / name)).items():
            totals[key] += count
    totals["users_without_history"] += log.get("users_unknown", 0)
    taken = {name: count for name, count in log.items() if name.startswith("events_")}
    users = totals["users_scored"] + totals["users_without_history"]
    return {"users": users, **totals, **taken, "parts": parts}


def unit_counts(schema: pa.Schema) -> dict[str, int]:
    """The counts of a written unit: users_scored, users_without_history, users_short (of fewer
    than k items), events."""
    return json.loads(schema.metadata[COUNTS])
