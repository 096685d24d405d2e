"""Raw event logs into one table of events, by rules that scoring can repeat.

`read_events` leaves a view `events(seq, user_id, item_id, time, f0, f1, …)`, which `drop_repeats`
narrows. Ids are BIGINT or VARCHAR. `seq` is the input order (file in sorted path order, then row)
and breaks ties in time. f0, f1, … are the feature columns. The log never lies in memory whole.
"""

from dataclasses import dataclass

import pyarrow.parquet as pq

from data.bad_rows import collect_bad_rows, count_bad_rows, example
from data.errors import InputError
from data.events import FEATURE_BYTES, LOADED, LOG_EVENTS, MARKED_EVENTS, Events
from data.log_files import LogFiles
from data.log_query import FILTERED, LogRules, event_columns

EARLIER_EVENTS = "earlier_events"  # a table of data.append: events of an older data set
MARKED_BYTES = 48  # of an event in the engine's window over its user's events


@dataclass(frozen=True)
class ReadCounts:
    """What `read_events` met: read = filtered + bad + good."""

    read: int
    filtered: int  # dropped by `where`
    bad: dict[str, int]  # by reason
    good: int

    def as_counts(self) -> dict[str, int]:
        """What a manifest's counts say of the reading."""
        return {
            "events_read": self.read,
            "events_filtered": self.filtered,
            "events_bad": sum(self.bad.values()),
            **{f"events_bad_{reason}": count for reason, count in self.bad.items()},
        }


def read_events(
    events: Events,
    files: LogFiles,
    rules: LogRules,
    max_bad_rows: int = 0,
    where_is_option: bool = True,
) -> ReadCounts:
    """Read the log into the view `events` (see the module), filtered, repeats and all.

    `where` comes first, so it can drop bad rows by name; a bad row has a null or unreadable user,
    item or time, or is a malformed CSV line, and stands in the table `bad_rows`. Raises InputError
    for more of them than `max_bad_rows`, unusable columns, a `where` that is no condition, and
    damaged files. where_is_option: whether the command has `where`, so that sentences advise it.
    """
    loaded = events.load(files, rules)
    bad = count_bad_rows(events.connection, files, loaded.marks)
    bad_rows, good = sum(bad.values()), loaded.marks.get(None, 0)
    read = loaded.total
    if read is None:
        read = loaded.marks.get(FILTERED, 0) + bad_rows + good
    if read == 0:
        raise InputError(f"the log is empty: no row in {files.name}; name another input")
    if bad_rows > max_bad_rows:
        _check_every_file(files, rules)
        reasons = ", ".join(f"{count:,} {name}" for name, count in bad.items())
        one = example(events.connection, files, rules, loaded.query, bad)
        raise InputError(
            f"{bad_rows:,} of {read:,} rows are bad ({reasons}), above "
            f"max_bad_rows={max_bad_rows}{one}; mend them"
            f"{', drop them with where=…,' if where_is_option else ''} or raise the limit"
        )
    if good == 0:
        raise InputError(f"no event is left of {read:,} rows; check where={rules.where}")
    collect_bad_rows(events, files, loaded, bad)
    events.view("events", f"SELECT {event_columns(rules.features)} FROM {LOG_EVENTS}")
    return ReadCounts(read, read - bad_rows - good, bad, good)


def drop_repeats(events: Events, rules: LogRules) -> int:
    """Narrow `events` by `rules.deduplicate`; the first in time order stays. Returns the rest.

    consecutive: an event whose item is also that of the user's event before it is dropped.
    user_item: every event but the first of a (user, item) pair is dropped.
    What was dropped is the view `repeats`, of the same columns. Some users at a time, so that next
    to nothing spills.
    """
    columns = event_columns(rules.features)
    if rules.deduplicate == "none":
        events.view("repeats", f"SELECT {columns} FROM events LIMIT 0")
    else:
        order = "ORDER BY time, seq"
        kept = {
            "consecutive": f"lag(item_id) OVER (PARTITION BY user_id {order}) "
            "IS DISTINCT FROM item_id",
            "user_item": f"row_number() OVER (PARTITION BY user_id, item_id {order}) = 1",
        }[rules.deduplicate]
        row_bytes = MARKED_BYTES + FEATURE_BYTES * len(rules.features)
        sorts = events.sorts(events.count("events"), row_bytes)
        marked = (
            f"SELECT {columns}, {kept} AS kept FROM events WHERE hash(user_id) % {sorts} = {part}"
            for part in range(sorts)
        )
        events.keep(MARKED_EVENTS, *marked)
        for view, condition in (("events", "kept"), ("repeats", "NOT kept")):
            events.view(view, f"SELECT {columns} FROM {MARKED_EVENTS} WHERE {condition}")
        for table in (LOADED, EARLIER_EVENTS):
            events.drop(table)
    return events.count("events")


def _check_every_file(files: LogFiles, rules: LogRules) -> None:
    """Columns are united over Parquet files, so one that lacks a column looks like null values."""
    for path in files.paths if files.kind == "parquet" else ():
        names = [*pq.read_schema(path).names, *files.partitions]
        for name in (rules.user, rules.item, rules.time):
            if name not in names:
                raise InputError(
                    f"{path} has no column {name}, only {', '.join(names)}; leave that file out, "
                    "or name the right column in columns.user, columns.item, columns.time"
                )
