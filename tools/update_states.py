"""Carry users' states forward by new events alone, instead of reading whole histories again.

    python -m tools.update_states bundle=BUNDLE events=WHOLE_LOG output=STATES           # build
    python -m tools.update_states bundle=BUNDLE states=STATES events=TODAY output=NEXT   # each day

A user's state is one row of Parquet. An event is applied when its time is not before the user's
last one; an earlier one is late and passed over, because a state cannot go back. An event of the
last time whose item is among those applied at it is a duplicate and passed over, so the same log
given twice changes nothing. The bundle's rule on repeats (`deduplicate`) holds against the state
as well. States lie on the host; a GPU gets some at a time. All options: configs/update_states.yaml.
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
from data.cores import check_threads
from data.errors import InputError, check_whole
from data.log_files import LogFiles, find_files
from data.output_folder import new_folder
from data.schema import MANIFEST, RESERVED_ROWS, DataFile, is_data_set
from data.score_input import GroupingLimits, group_log, rules_for
from data.scoring import score_table
from data.user_states import (
    NUMBERS,
    PART_BYTES,
    SCORES,
    STATES,
    NewEvents,
    StateManifest,
    StatePart,
    apply,
)
from tools.benchmarks.report import device_name
from tools.full_pass import WARM_UP, FullPass, full_passes
from tools.place import DEVICES, Place
from tools.stages import print_table

GROUPED = "grouped"
OURS = (MANIFEST, STATES, SCORES, GROUPED, f".{GROUPED}.unfinished")
NO_ITEMS = np.zeros(0, np.int64)


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
    device: str = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    csv: dict[str, Any] = field(default_factory=dict)
    max_bad_rows: int = 0
    memory_limit: str = "4GB"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, choices in (("numbers", NUMBERS), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name}={getattr(self, name)} is unknown; choose {' | '.join(choices)}"
                )
        check_whole("k", self.k, 0)
        check_whole("max_bad_rows", self.max_bad_rows, 0)
        if self.threads is not None:
            check_threads(self.threads)
        for name in ("exclude_seen", "native_code"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)} must be true or false")


@dataclass(frozen=True)
class Report:
    """What a run did. seconds_moving: of reading, moving and writing states, without reading the
    log and without scores, which cost the same either way. device: its name."""

    manifest: StateManifest
    bytes_a_state: int
    device: str
    seconds_moving: float
    full_passes: list[FullPass]

    def break_even_events(self, full_pass: FullPass) -> float | None:
        """The history length whose full pass takes as long as an updated user took here; None
        where no user with a state moved on, or the pass was not timed."""
        users = self.manifest.counts["users_updated"]
        seconds = full_pass.seconds_an_event
        if seconds is None or users == self.manifest.counts["users_new"]:
            return None
        return self.seconds_moving / users / seconds


def update(config: UpdateConfig) -> Report:
    """Write the new states. Raises InputError for what cannot be read, or is of another model."""
    place = Place.of(config.device)
    if place.size > 1:
        raise InputError(
            f"tools.update_states is one process, and torchrun started {place.size}; start it with "
            "python -m"
        )
    bundle = Bundle.open(config.bundle, place.device, native_code=config.native_code)
    bundle.new_states(0)  # refuses a bidirectional model before the log is read
    bundle.check_k(config.k)
    rules = rules_for(
        bundle.manifest.data["options"],
        config.columns,
        config.csv.get("delimiter"),
        config.csv.get("types"),
    )
    old_folder = None if config.states is None else Path(config.states)
    old = None if old_folder is None else StateManifest.read(old_folder, bundle)
    files = _log_files(config.events)
    limits = GroupingLimits(
        config.max_bad_rows, memory_limit=config.memory_limit, threads=config.threads
    )
    with new_folder(Path(config.output), OURS) as folder:
        grouped = group_log(files, rules, bundle, folder / GROUPED, limits)
        new = NewEvents.read(folder / GROUPED, grouped.histories)
        shutil.rmtree(folder / GROUPED)
        _warm_up(bundle)
        started = time.monotonic()
        writer = _Writer(config, bundle, folder, new, rules.deduplicate)
        if old is not None and old_folder is not None:
            for file in old.parts:
                writer.old(StatePart.read(old_folder, file, old.numbers))
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
    name = device_name(bundle.device)
    return Report(manifest, state_bytes, name, seconds, full_passes(bundle))


def _log_files(events: str | list[str]) -> LogFiles:
    for one in [events] if isinstance(events, str) else events:
        if is_data_set(Path(str(one))):
            raise InputError(
                f"events={one} is a converted data set, and states move on by raw events; name "
                "the log itself"
            )
    return find_files(events, "events")


def _warm_up(bundle: Bundle) -> None:
    """What a process does once is no user's cost: a GPU's start, and TorchScript's compiling for
    each of the first numbers of users, then for any."""
    for users in range(2, 2 + 2 * WARM_UP):
        bundle.advance(bundle.new_states(users), torch.full([users], RESERVED_ROWS))


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


def print_report(report: Report, output: str) -> None:
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
        ("device", report.device),
        *(("full pass", _of_pass(one)) for one in report.full_passes),
        ("states", f"{output} ({len(manifest.parts)} file(s), {report.seconds_moving:.1f} s)"),
    ]
    for one in report.full_passes:
        events = report.break_even_events(one)
        if events is not None:
            rows.append(
                (
                    "break-even",
                    f"{events:,.0f} events: below that length, scoring whole histories with "
                    f"kernels={one.kernels} is cheaper",
                )
            )
    print_table(rows)


def _of_pass(one: FullPass) -> str:
    if one.seconds_an_event is None:
        return f"kernels={one.kernels} was not timed: {one.reason}"
    return f"{1e6 * one.seconds_an_event:,.4g} us an event with kernels={one.kernels}"


@command("update_states")
def main(options: dict[str, Any]) -> None:
    config = UpdateConfig(**options)
    print_report(update(config), config.output)


if __name__ == "__main__":
    main()
