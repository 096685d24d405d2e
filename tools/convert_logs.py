"""Raw event logs to a data set of training histories (schema: data/schema.py).

    python -m tools.convert_logs input=LOGS output=DIR [columns.time=ts] [split=temporal …]

Load, de-duplicate, k-core, vocabulary, users to shards, one flat sort by user and time, and a cut
of the sorted stream at user changes. Nothing is held in memory beyond `memory_limit` and one row
group, and equal input gives equal bytes whatever the threads. All options: configs/convert.yaml.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
from tqdm import tqdm

from configs.command import command
from data.conversion import (
    CORE_USERS,
    HistoryCounts,
    k_core,
    order_items,
    sealed,
    write_histories,
    write_vocabulary,
)
from data.engine import one_row, open_engine, scalar
from data.errors import InputError
from data.grouping import group_users, stream_users
from data.log_files import find_files
from data.log_query import LogRules
from data.logs import ReadCounts, read_events, time_type
from data.output_folder import new_folder
from data.schema import HISTORIES, MANIFEST, RESERVED_ROWS, VOCABULARY, Manifest
from data.split import Split, temporal_split
from tools.stages import print_table, stage

SHARD_EVENTS = 8_000_000
ENGINE = "engine"  # scratch folder inside the unfinished output
OURS = (MANIFEST, VOCABULARY, HISTORIES, ENGINE)


@dataclass(frozen=True)
class ConvertConfig:
    """The options of configs/convert.yaml, checked."""

    input: str | list[str]
    output: Path
    rules: LogRules
    split: dict[str, Any]
    min_user_events: int = 5
    min_item_events: int = 5
    max_bad_rows: int = 0
    shards: int | None = None
    row_group_events: int = 1_000_000
    memory_limit: str = "4GB"
    threads: int | None = None
    overwrite: bool = False

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "ConvertConfig":
        """From the composed Hydra config."""
        rest = dict(options)
        columns, csv = rest.pop("columns"), rest.pop("csv")
        features = columns["features"]
        if not isinstance(features, list):
            raise InputError(f"columns.features={features} is no list; write [{features}]")
        rules = LogRules(
            user=str(columns["user"]),
            item=str(columns["item"]),
            time=str(columns["time"]),
            features=tuple(str(name) for name in features),
            where=None if rest["where"] is None else str(rest["where"]),
            deduplicate=rest["deduplicate"],
            csv_delimiter=csv["delimiter"],
            csv_types=dict(csv["types"] or {}),
        )
        del rest["where"], rest["deduplicate"]
        output = Path(str(rest.pop("output")))
        return cls(**rest | {"output": output, "rules": rules})

    def __post_init__(self) -> None:
        least = {"min_user_events": 1, "min_item_events": 1, "max_bad_rows": 0}
        least |= {"row_group_events": 1, "shards": 1, "threads": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if name in ("shards", "threads") and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise InputError(f"{name}={value} must be a whole number, {minimum} or more")
        if not isinstance(self.overwrite, bool):
            raise InputError(f"overwrite={self.overwrite} must be true or false")


@dataclass(frozen=True)
class Conversion:
    """What a conversion made."""

    manifest: Manifest
    mean_length: float
    median_length: int


def convert(config: ConvertConfig) -> Conversion:
    """Convert the log; `config.output` then holds the data set. Raises InputError."""
    files = find_files(config.input)
    with new_folder(config.output, OURS, config.overwrite) as folder:
        engine_folder = folder / ENGINE
        engine_folder.mkdir()
        with open_engine(engine_folder, config.memory_limit, config.threads) as connection:
            conversion = _convert(config, folder, connection, files)
        for left in sorted(engine_folder.rglob("*"), reverse=True):
            left.rmdir() if left.is_dir() else left.unlink()
        engine_folder.rmdir()
        conversion.manifest.write(folder)
    return conversion


def _convert(
    config: ConvertConfig, folder: Path, connection: duckdb.DuckDBPyConnection, files: Any
) -> Conversion:
    percent = connection.query_progress
    with stage(f"read {len(files.paths)} file(s)", percent):
        read = read_events(connection, files, config.rules, config.max_bad_rows)
        split = _split(config, connection)
    with stage("k-core", percent):
        core = k_core(connection, config.min_user_events, config.min_item_events, split)
    with stage("vocabulary", percent):
        items = order_items(connection, split, core)
    shards = config.shards or -(-read.kept // SHARD_EVENTS)
    with stage("users", percent):
        group_users(connection, shards, split, CORE_USERS if core else None)
    counts = HistoryCounts(np.zeros(RESERVED_ROWS + items, np.int64))
    events = int(scalar(connection, "SELECT sum(events) FROM users"))
    with stage("sort and write"):
        stream = stream_users(connection, config.rules.features, config.row_group_events)
        _show(write_histories(folder, stream, counts), events)
        write_vocabulary(folder, connection, counts.by_row)
    with stage("sync and hash"):
        paths = sorted((folder / HISTORIES).iterdir())
        histories = [sealed(folder, path) for path in paths]
        vocabulary = sealed(folder, folder / VOCABULARY)
    users, untrained_users, longest, median = one_row(
        connection,
        "SELECT count(*), count(*) FILTER (n_train = 0), max(events), "
        "quantile_disc(events, 0.5) FROM users",
    )
    manifest = Manifest(
        options=_options(config, shards),
        counts=_counts(read, counts) | {"users": users, "users_without_training": untrained_users},
        split=split.kind,
        table_rows=RESERVED_ROWS + items,
        longest_history=longest,
        vocabulary=vocabulary,
        histories=histories,
        features=list(config.rules.features),
    )
    return Conversion(manifest, counts.events / users, median)


def _split(config: ConvertConfig, connection: duckdb.DuckDBPyConnection) -> Split:
    kind = config.split["kind"]
    if kind == "temporal" and "validation_from" not in config.split:
        raise InputError("split.kind=temporal has no bounds; choose split=temporal instead")
    if kind == "leave_one_out":
        return Split()
    if kind != "temporal":
        raise InputError(f"split.kind={kind} is unknown; choose split=leave_one_out | temporal")
    bounds = config.split["validation_from"], config.split["test_from"]
    return temporal_split(connection, *bounds, time_type(connection))


def _show(written: Iterable[int], events: int) -> None:
    with tqdm(total=events, unit="event", unit_scale=True, disable=None, leave=False) as bar:
        for done in written:
            bar.update(done - bar.n)


def _options(config: ConvertConfig, shards: int) -> dict[str, Any]:
    """The options that shape the data: how the log is read, then how it is converted."""
    return config.rules.as_options() | {
        "min_user_events": config.min_user_events,
        "min_item_events": config.min_item_events,
        "max_bad_rows": config.max_bad_rows,
        "split": {name: str(value) for name, value in config.split.items()},
        "shards": shards,
        "row_group_events": config.row_group_events,
    }


def _counts(read: ReadCounts, written: HistoryCounts) -> dict[str, int]:
    trained = written.by_row[RESERVED_ROWS:]
    return {
        "events_read": read.read,
        "events_filtered": read.filtered,
        "events_bad": sum(read.bad.values()),
        **{f"events_bad_{reason}": count for reason, count in read.bad.items()},
        "events_duplicate": read.duplicates,
        "events_below_minimum": read.kept - written.events,
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
    parts = [f"{counts[f'{part}_events']:,} {part}" for part in ("train", "validation", "test")]
    rows += [
        ("events kept", f"{counts['events']:,} ({', '.join(parts)})"),
        ("users", f"{counts['users']:,} ({counts['users_without_training']:,} without training)"),
        ("items", f"{counts['items']:,} ({counts['items_without_training']:,} without training)"),
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
