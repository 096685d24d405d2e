"""Carry users' states forward by new events alone, instead of reading whole histories again.

    python -m tools.update_states bundle=BUNDLE events=WHOLE_LOG output=STATES           # build
    python -m tools.update_states bundle=BUNDLE states=STATES events=TODAY output=NEXT   # each day

A user's state is one row of Parquet. An event is applied when its time is not before the user's
last one; an earlier one is late and passed over, because a state cannot go back. An event of the
last time whose item is among those applied at it is a duplicate and passed over, so the same log
given twice changes nothing. The bundle's rule on repeats (`deduplicate`) holds against the state
as well. All options: configs/update_states.yaml.
"""

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from configs.command import command
from data.bundle import Bundle
from data.conversion import sealed
from data.errors import InputError, check_whole
from data.log_files import find_files
from data.output_folder import new_folder
from data.schema import MANIFEST, RESERVED_ROWS, DataFile
from data.score_input import GroupingLimits, group_log, rules_for
from data.scoring import score_table
from data.user_states import (
    NUMBERS,
    PART_BYTES,
    STATES,
    NewEvents,
    StateManifest,
    StatePart,
    apply,
)
from tools.stages import print_table

GROUPED, SCORES = "grouped", "scores"
OURS = (MANIFEST, STATES, SCORES, GROUPED, f".{GROUPED}.unfinished")
NO_ITEMS = np.zeros(0, np.int64)
PROBE_EVENTS, PROBE_LENGTH, PROBE_SECONDS = 2048, 128, 0.3  # of the full pass that is timed
WARM_UP = 4  # calls: TorchScript compiles anew after the first ones


@dataclass(frozen=True)
class UpdateConfig:
    """The options of configs/update_states.yaml, checked."""

    bundle: str
    events: str | list[str]
    output: str
    native_code: bool = False
    states: str | None = None
    numbers: str = "fp32"
    k: int = 0
    exclude_seen: bool = True
    columns: dict[str, str | None] = field(default_factory=dict)
    csv: dict[str, Any] = field(default_factory=dict)
    max_bad_rows: int = 0
    memory_limit: str = "4GB"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.numbers not in NUMBERS:
            raise InputError(f"numbers={self.numbers} is unknown; choose {' | '.join(NUMBERS)}")
        check_whole("k", self.k, 0)
        check_whole("max_bad_rows", self.max_bad_rows, 0)
        if self.threads is not None:
            check_whole("threads", self.threads, 1)
        for name in ("exclude_seen", "native_code"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)} must be true or false")


@dataclass(frozen=True)
class Report:
    """What a run did. seconds_moving: of reading, moving and writing states, without reading the
    log and without scores, which cost the same either way."""

    manifest: StateManifest
    bytes_a_state: int
    seconds_moving: float
    full_pass_seconds_an_event: float

    @property
    def break_even_events(self) -> float | None:
        """The history length whose full pass takes as long as an updated user took here; None
        where no user with a state moved on."""
        users = self.manifest.counts["users_updated"]
        if users == self.manifest.counts["users_new"]:
            return None
        return self.seconds_moving / users / self.full_pass_seconds_an_event


def update(config: UpdateConfig) -> Report:
    """Write the new states. Raises InputError for what cannot be read, or is of another model."""
    bundle = Bundle.open(Path(config.bundle), "cpu", native_code=config.native_code)
    bundle.new_states(0)  # refuses a bidirectional model before the log is read
    rules = rules_for(
        bundle.manifest.data["options"],
        config.columns,
        config.csv.get("delimiter"),
        config.csv.get("types"),
    )
    old_folder = None if config.states is None else Path(config.states)
    old = None if old_folder is None else StateManifest.read(old_folder, bundle)
    files = find_files(config.events)
    limits = GroupingLimits(
        config.max_bad_rows, memory_limit=config.memory_limit, threads=config.threads
    )
    with new_folder(Path(config.output), OURS) as folder:
        grouped = group_log(files, rules, bundle, folder / GROUPED, limits)
        new = NewEvents.read(folder / GROUPED, grouped.histories)
        shutil.rmtree(folder / GROUPED)
        started = time.monotonic()
        writer = _Writer(config, bundle, folder, new, rules.deduplicate)
        if old is not None and old_folder is not None:
            for file in old.parts:
                writer.old(StatePart.read(old_folder, file))
        writer.new_users()
        seconds = time.monotonic() - started - writer.seconds_scoring
        counts = {name: grouped.counts[name] for name in ("events_unknown", "events_bad")}
        counts |= writer.counts
        manifest = StateManifest(
            bundle.manifest.fingerprint,
            config.numbers,
            writer.users,
            counts,
            writer.parts,
            writer.scores,
        )
        manifest.write(folder)
    state_bytes = NUMBERS[config.numbers].itemsize * bundle.model.state_numbers
    return Report(manifest, state_bytes, seconds, full_pass_seconds(bundle))


class _Writer:
    """Moves parts of states on and writes them, numbered as they come."""

    def __init__(
        self, config: UpdateConfig, bundle: Bundle, folder: Path, new: NewEvents, repeats: str
    ) -> None:
        self.config, self.bundle, self.folder = config, bundle, folder
        self.new, self.repeats = new, repeats
        self.waiting_U = np.ones(len(new), bool)  # users of the log whose state has not come yet
        self.parts: list[DataFile] = []
        self.scores: list[DataFile] = []
        self.users = 0
        self.seconds_scoring = 0.0
        self.counts: dict[str, int] = {"users_new": 0}
        (folder / STATES).mkdir()
        if config.k:
            (folder / SCORES).mkdir()

    def old(self, part: StatePart) -> None:
        """Users of an earlier run. Raises InputError where ids or times are of another type."""
        for name, had, has in (
            ("user ids", part.user_ids.type, self.new.user_ids.type),
            ("times", part.last_time.type, self.new.times.type),
        ):
            if had != has:
                raise InputError(
                    f"{name} are {has} in the log but {had} in states={self.config.states}; cast "
                    "the log's column"
                )
        place_U = pc.index_in(part.user_ids, value_set=self.new.user_ids)
        theirs = pc.fill_null(place_U, -1).to_numpy().astype(np.int64)
        self.waiting_U[theirs[theirs >= 0]] = False
        self._write(part, theirs)

    def new_users(self) -> None:
        """Everyone else of the log."""
        theirs = np.flatnonzero(self.waiting_U)
        self.counts["users_new"] = len(theirs)
        step = max(1, PART_BYTES // (4 * self.bundle.model.state_numbers))
        for start in range(0, len(theirs), step):
            some = theirs[start : start + step]
            ids = self.new.user_ids.take(pa.array(some))
            self._write(StatePart.new(self.bundle, ids, self.new.times.type), some)

    def _write(self, part: StatePart, theirs: np.ndarray) -> None:
        before_U = part.events_U.copy()
        for name, count in apply(self.bundle, part, self.new, theirs, self.repeats).items():
            self.counts[name] = self.counts.get(name, 0) + count
        number = len(self.parts)
        self.parts.append(part.write(self.folder, number, self.config.numbers))
        self.users += len(part.user_ids)
        moved = np.flatnonzero(part.events_U > before_U)
        if self.config.k and len(moved):
            started = time.monotonic()
            self._score(part, moved, self.folder / SCORES / f"part-{number:05d}.parquet")
            self.seconds_scoring += time.monotonic() - started

    def _score(self, part: StatePart, users: np.ndarray, path: Path) -> None:
        """The top k of these users of a part, as tools.score_histories writes them."""
        seen = [part.seen[user] for user in users]
        items_N = torch.from_numpy(np.concatenate([NO_ITEMS, *seen]))
        users_N = torch.from_numpy(np.arange(len(users)).repeat([len(one) for one in seen]))
        rows_UK, scores_UK = self.bundle.score_states(
            part.state_UF[users],
            self.config.k,
            excluded=(items_N, users_N) if self.config.exclude_seen else None,
            seen=None if self.config.exclude_seen else (items_N, users_N),
        )
        real_UK = rows_UK >= 0
        table = score_table(
            self.bundle.vocabulary,
            part.user_ids.take(pa.array(users)),
            real_UK.sum(1).numpy(),
            rows_UK[real_UK].numpy(),
            scores_UK[real_UK].numpy(),
        )
        pq.write_table(table, path, compression="zstd")
        self.scores.append(sealed(self.folder, path))


def full_pass_seconds(bundle: Bundle) -> float:
    """Seconds an event of reading whole histories in this process, measured in a moment."""
    generator = torch.Generator().manual_seed(1)
    items_T = torch.randint(
        RESERVED_ROWS, bundle.manifest.table_rows, [PROBE_EVENTS], generator=generator
    )
    offsets_B1 = torch.arange(0, PROBE_EVENTS + 1, PROBE_LENGTH)
    for _ in range(WARM_UP):
        bundle.model.hidden(items_T, offsets_B1)
    times: list[float] = []
    begun = time.monotonic()
    while len(times) < 3 or time.monotonic() - begun < PROBE_SECONDS:
        started = time.perf_counter()
        bundle.model.hidden(items_T, offsets_B1)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2] / PROBE_EVENTS


def _print(report: Report, output: str) -> None:
    counts, manifest = report.manifest.counts, report.manifest
    size = sum(one.bytes for one in manifest.parts)
    rows = [
        ("users", f"{manifest.users:,} ({counts['users_new']:,} new)"),
        ("users moved on", f"{counts['users_updated']:,} by {counts['events_applied']:,} events"),
        ("events of unknown items", f"{counts['events_unknown']:,} (passed over)"),
        ("bad rows", f"{counts['events_bad']:,} (skipped)"),
        ("late events", f"{counts['events_late']:,} (passed over)"),
        ("duplicate events", f"{counts['events_duplicate']:,} (passed over)"),
        ("bytes a user", f"{report.bytes_a_state:,} of state, {size / manifest.users:,.0f} in all"),
        ("full pass", f"{1e6 * report.full_pass_seconds_an_event:.1f} us an event"),
        ("states", f"{output} ({len(manifest.parts)} file(s), {report.seconds_moving:.1f} s)"),
    ]
    if report.break_even_events is not None:
        rows.append(
            (
                "break-even",
                f"{report.break_even_events:,.0f} events: below that length, scoring "
                "whole histories is cheaper",
            )
        )
    print_table(rows)


@command("update_states")
def main(options: dict[str, Any]) -> None:
    config = UpdateConfig(**options)
    _print(update(config), config.output)


if __name__ == "__main__":
    main()
