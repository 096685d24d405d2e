"""A raw event log as histories in a bundle's table rows, so that it scores like a data set.

The converter's own code reads the log by the rules that the bundle carries and groups it by user,
out of core. No k-core and no split: every user with one known item has a history.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data.bundle import Bundle
from data.conversion import HistoryCounts, sealed, write_histories
from data.engine import open_engine, scalar
from data.errors import InputError
from data.events import LocalEvents
from data.grouping import group_users, stream_users, use_vocabulary
from data.k_core import count_events
from data.log_files import LogFiles
from data.log_query import LogRules
from data.logs import drop_repeats, read_events
from data.output_folder import new_folder
from data.schema import HISTORIES, MANIFEST, VOCABULARY, DataFile, Manifest
from data.split import Split

ENGINE = "engine"  # scratch folder inside the unfinished output


@dataclass(frozen=True)
class GroupingLimits:
    """How a log is grouped; the result's content does not depend on it."""

    max_bad_rows: int = 0
    row_group_events: int = 1_000_000
    memory_limit: str = "4GB"
    threads: int | None = None


def rules_for(
    options: dict[str, Any],
    columns: dict[str, str | None],
    csv_delimiter: str | None = None,
    csv_types: dict[str, str] | None = None,
) -> LogRules:
    """The bundle's rules, with this log's own column names (user, item, time) where given.

    options: the converter's, as the bundle's manifest keeps them. Raises InputError without any.
    """
    if "log" not in options:
        raise InputError(
            "the bundle carries no rules for reading a log, because its data set was not made by "
            "tools.convert_logs; score a converted data set"
        )
    rules = LogRules.from_options(options)
    named = {role: str(name) for role, name in columns.items() if name is not None}
    return replace(
        rules,
        features=(),
        csv_delimiter=csv_delimiter or rules.csv_delimiter,
        csv_types=rules.csv_types | (csv_types or {}),
        **named,
    )


def group_log(
    files: LogFiles, rules: LogRules, bundle: Bundle, output: Path, limits: GroupingLimits
) -> Manifest:
    """Write the log's histories into the new folder `output`, as a data set of the bundle's rows.

    Its counts: events_read, events_filtered, events_bad, events_duplicate, events_unknown (of
    items that the bundle lacks), users, users_unknown (of whom no event is known).
    Raises InputError for a log that cannot be read, or with no item that the bundle knows.
    """
    with new_folder(output, (MANIFEST, HISTORIES, ENGINE)) as folder:
        (folder / ENGINE).mkdir()
        with open_engine(folder / ENGINE, limits.memory_limit, limits.threads) as connection:
            manifest = _group(LocalEvents(connection), files, rules, bundle, folder, limits)
        shutil.rmtree(folder / ENGINE)
        manifest.write(folder)
    return manifest


def _group(
    events: LocalEvents,
    files: LogFiles,
    rules: LogRules,
    bundle: Bundle,
    folder: Path,
    limits: GroupingLimits,
) -> Manifest:
    connection = events.connection
    read = read_events(events, files, rules, limits.max_bad_rows, where_is_option=False)
    kept = drop_repeats(events, rules)
    use_vocabulary(events, bundle.folder)
    unknown = scalar(connection, "SELECT count(*) FROM events ANTI JOIN vocabulary USING (item_id)")
    if unknown == kept:
        raise InputError(
            f"none of the log's {kept:,} events is of an item that bundle {bundle.folder} "
            "knows; check columns.item and that the log is of the same catalogue"
        )
    count_events(events, "user_id", Split(), "SEMI JOIN vocabulary USING (item_id)")
    group_users(connection, 1, Split())
    users = int(scalar(connection, "SELECT count(*) FROM users"))
    everyone = int(scalar(connection, "SELECT count(DISTINCT user_id) FROM events"))
    longest = int(scalar(connection, "SELECT max(events) FROM users"))
    counts = HistoryCounts(np.zeros(bundle.manifest.table_rows, np.int64))
    stream = stream_users(events, (), limits.row_group_events)
    _drain(write_histories(folder, stream, counts))
    vocabulary = next(one for one in bundle.manifest.files if one.path == VOCABULARY)
    return Manifest(
        options=rules.as_options(),
        counts=read.as_counts()
        | {
            "events_duplicate": read.good - kept,
            "events_unknown": int(unknown),
            "events": counts.events,
            "users": users,
            "users_unknown": everyone - users,
        },
        split="leave_one_out",
        table_rows=bundle.manifest.table_rows,
        longest_history=longest,
        vocabulary=DataFile(
            VOCABULARY, bundle.vocabulary.size, vocabulary.bytes, vocabulary.sha256
        ),
        histories=[sealed(folder, path) for path in sorted((folder / HISTORIES).iterdir())],
    )


def _drain(steps: Iterator[int]) -> None:
    for _ in steps:
        pass
