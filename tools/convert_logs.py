"""Raw event logs to a data set of training histories (schema: data/schema.py).

    python -m tools.convert_logs input=LOGS output=DIR [columns.time=ts] [split=temporal …]

Load, de-duplicate, k-core, vocabulary, users to shards, one flat sort by user and time, and a cut
of the sorted stream at user changes. Nothing is held in memory beyond `memory_limit` and one row
group, and equal input gives equal bytes whatever the threads. `vocabulary=` numbers items as an
older data set does, `append=` puts the log behind that data set's, `engine=spark` does the work on
events in Spark. All options: configs/convert.yaml.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from configs.command import command
from data.append import EarlierData
from data.bad_rows import write_bad_rows
from data.conversion import HistoryCounts, sealed, write_histories
from data.engine import one_row, open_engine
from data.errors import InputError
from data.events import Events, LocalEvents
from data.grouping import group_users, stream_users
from data.k_core import count_events, k_core
from data.log_files import LogFiles, find_files
from data.logs import drop_repeats, read_events
from data.numbering import KnownVocabulary, number_items, unseen_items, write_vocabulary
from data.output_folder import new_folder
from data.residual import RESIDUAL_FILE, write_residual
from data.schema import (
    BAD_ROWS,
    HISTORIES,
    MANIFEST,
    RESERVED_ROWS,
    RESIDUAL,
    VOCABULARY,
    DataFile,
    Manifest,
)
from data.spark_events import open_spark
from data.split import Split, temporal_split
from tools.convert_config import ConvertConfig
from tools.stages import print_table, stage

SHARD_EVENTS = 8_000_000
ENGINE = "engine"  # scratch folder inside the unfinished output
OURS = (MANIFEST, VOCABULARY, HISTORIES, RESIDUAL, BAD_ROWS, ENGINE)


@dataclass(frozen=True)
class Conversion:
    """What a conversion made."""

    manifest: Manifest
    mean_length: float
    median_length: int


@dataclass(frozen=True)
class Selection:
    """What the engine holds once events are filtered and counted, items numbered, users dealt.

    counts: those of the manifest that writing does not give. events: of all users.
    """

    split: Split
    items: int
    shards: int
    counts: dict[str, int]
    events: int
    longest: int
    median: int


def convert(config: ConvertConfig) -> Conversion:
    """Convert the log; `config.output` then holds the data set. Raises InputError."""
    files = find_files(config.input)
    earlier = EarlierData.open(config.append, config.rules) if config.append else None
    numbered = config.vocabulary or config.append
    known = KnownVocabulary.find(numbered) if numbered else None
    with new_folder(config.output, OURS, config.overwrite) as folder:
        engine_folder = folder / ENGINE
        engine_folder.mkdir()
        with _open_events(config, engine_folder) as events:
            selection = _select(config, events, files, known, earlier)
            written = _write(config, folder, events, selection)
        for left in sorted(engine_folder.rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        engine_folder.rmdir()
        manifest = _manifest(config, folder, selection, written, known)
        manifest.write(folder)
    users = manifest.counts["users"]
    return Conversion(manifest, selection.events / users, selection.median)


@contextmanager
def _open_events(config: ConvertConfig, folder: Path) -> Iterator[Events]:
    with open_engine(folder, config.memory_limit, config.threads) as connection:
        if config.engine == "duckdb":
            yield LocalEvents(connection)
            return
        with open_spark(connection, folder, config.spark_master, config.spark_conf) as events:
            yield events


def _select(
    config: ConvertConfig,
    events: Events,
    files: LogFiles,
    known: KnownVocabulary | None,
    earlier: EarlierData | None,
) -> Selection:
    connection, percent = events.connection, events.progress
    with stage(f"read {len(files.paths)} file(s)", percent):
        read = read_events(events, files, config.rules, config.max_bad_rows)
        known_items = known.load(events) if known else 0
        counts = read.as_counts()
        if earlier:
            counts = earlier.add(connection, counts)
        good = events.count("events")
        kept = drop_repeats(events, config.rules)
        split = _split(config, events)
    with stage("count", percent):
        count_events(events, "user_id", split)
        count_events(events, "item_id", split)
        unseen = unseen_items(connection) if known else 0
    with stage("k-core and vocabulary", percent):
        k_core(events, config.min_user_events, config.min_item_events, split)
        items = number_items(connection, known_items)
        shards = config.shards or -(-kept // SHARD_EVENTS)
        group_users(connection, shards, split)
    users, untrained, used, longest, median = one_row(
        connection,
        "SELECT count(*), count(*) FILTER (n_train = 0), sum(events)::BIGINT, max(events), "
        "quantile_disc(events, 0.5) FROM users",
    )
    if known:
        counts |= {"items_new": items - known_items, "items_unseen": unseen}
    counts |= {"events_duplicate": good - kept, "events_below_minimum": kept - used}
    counts |= {"users": users, "users_without_training": untrained}
    return Selection(split, items, shards, counts, used, longest, median)


def _write(
    config: ConvertConfig,
    folder: Path,
    events: Events,
    selection: Selection,
) -> HistoryCounts:
    written = HistoryCounts(np.zeros(RESERVED_ROWS + selection.items, np.int64))
    features = config.rules.features
    with stage("sort and write"):
        stream = stream_users(events, features, config.row_group_events)
        _show(write_histories(folder, stream, written), selection.events)
        write_vocabulary(folder, events.connection, written.by_row)
    counts = selection.counts
    dropped = counts["events_duplicate"] + counts["events_below_minimum"]
    if dropped:
        with stage("residual", events.progress):
            write_residual(folder, events, features)
    if counts["events_bad"]:
        write_bad_rows(folder, events.connection)
    return written


def _manifest(
    config: ConvertConfig,
    folder: Path,
    selection: Selection,
    written: HistoryCounts,
    known: KnownVocabulary | None,
) -> Manifest:
    with stage("sync and hash"):
        return Manifest(
            options=_options(config, selection.shards, known),
            counts=selection.counts | _written_counts(written),
            split=selection.split.kind,
            table_rows=RESERVED_ROWS + selection.items,
            longest_history=selection.longest,
            vocabulary=sealed(folder, folder / VOCABULARY),
            histories=[sealed(folder, path) for path in sorted((folder / HISTORIES).iterdir())],
            features=list(config.rules.features),
            residual=_sealed_if_there(folder, RESIDUAL_FILE),
            bad_rows=_sealed_if_there(folder, BAD_ROWS),
        )


def _split(config: ConvertConfig, events: Events) -> Split:
    kind = config.split["kind"]
    if kind == "temporal" and "validation_from" not in config.split:
        raise InputError("split.kind=temporal has no bounds; choose split=temporal instead")
    if kind == "leave_one_out":
        return Split()
    if kind != "temporal":
        raise InputError(f"split.kind={kind} is unknown; choose split=leave_one_out | temporal")
    return temporal_split(events, config.split["validation_from"], config.split["test_from"])


def _sealed_if_there(folder: Path, name: str) -> DataFile | None:
    return sealed(folder, folder / name) if (folder / name).exists() else None


def _show(written: Iterable[int], events: int) -> None:
    with tqdm(total=events, unit="event", unit_scale=True, disable=None, leave=False) as bar:
        for done in written:
            bar.update(done - bar.n)


def _options(config: ConvertConfig, shards: int, known: KnownVocabulary | None) -> dict[str, Any]:
    """The options that shape the data: how the log is read, then how it is converted."""
    return config.rules.as_options() | {
        "min_user_events": config.min_user_events,
        "min_item_events": config.min_item_events,
        "max_bad_rows": config.max_bad_rows,
        "split": {name: str(value) for name, value in config.split.items()},
        "shards": shards,
        "row_group_events": config.row_group_events,
        "vocabulary_sha256": known.sha256 if known else None,
    }


def _written_counts(written: HistoryCounts) -> dict[str, int]:
    trained = written.by_row[RESERVED_ROWS:]
    return {
        "events": written.events,
        "train_events": written.train_events,
        "validation_events": written.validation_events,
        "test_events": written.events - written.train_events - written.validation_events,
        "tied_events": written.tied_events,
        "items": len(trained),
        "items_without_training": int(np.count_nonzero(trained == 0)),
    }


def _report(conversion: Conversion, output: Path, seconds: float) -> None:
    manifest, counts = conversion.manifest, conversion.manifest.counts
    rows = [("events read", f"{counts['events_read']:,}")]
    for name, what in (
        ("events_filtered", "dropped by where"),
        ("events_bad", "bad rows skipped"),
        ("events_duplicate", "duplicates dropped"),
        ("events_below_minimum", "dropped by k-core"),
    ):
        rows += [(f"  {what}", f"{counts[name]:,}")] if counts[name] else []
    known = []
    if "items_new" in counts:
        known = [
            ("  new", f"{counts['items_new']:,}, behind those of the older vocabulary"),
            ("  never seen in the log", f"{counts['items_unseen']:,} of the older vocabulary"),
        ]
    parts = [f"{counts[f'{part}_events']:,} {part}" for part in ("train", "validation", "test")]
    if "events_appended" in counts:
        rows += [("  appended", f"{counts['events_appended']:,} ({counts['events_late']:,} late)")]
    rows += [
        ("events kept", f"{counts['events']:,} ({', '.join(parts)})"),
        ("users", f"{counts['users']:,} ({counts['users_without_training']:,} without training)"),
        ("items", f"{counts['items']:,} ({counts['items_without_training']:,} without training)"),
        *known,
        (
            "history length",
            f"mean {conversion.mean_length:.1f}, median {conversion.median_length:,}, "
            f"longest {manifest.longest_history:,}",
        ),
        ("ties in time", f"{100 * counts['tied_events'] / counts['events']:.1f} % of events"),
        ("data set", f"{output} ({len(manifest.histories)} history file(s))"),
        ("seconds", f"{seconds:.1f}"),
    ]
    print()
    print_table(rows)


@command("convert")
def main(options: dict[str, Any]) -> None:
    start = time.monotonic()
    config = ConvertConfig.from_dict(options)
    conversion = convert(config)
    _report(conversion, config.output, time.monotonic() - start)


if __name__ == "__main__":
    main()
