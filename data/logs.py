"""Raw event logs into one table of the engine, by rules that scoring can repeat.

`read_events` leaves a view `events(seq, user_id, item_id, time, f0, f1, …)`, which `drop_repeats`
narrows. Ids are BIGINT or VARCHAR. `seq` is the input order (file in sorted path order, then row)
and breaks ties in time. f0, f1, … are the feature columns. The log never lies in memory whole.
"""

import re
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow.parquet as pq

from data.bad_rows import collect_bad_rows, count_bad_rows, example
from data.engine import first_line, quoted_path, scalar
from data.errors import InputError
from data.log_files import LogFiles
from data.log_query import FILTERED, LogQuery, LogRules, log_query

LOG_EVENTS = "log_events"  # what was read, as a view
EARLIER_EVENTS = "earlier_events"  # a table of data.append: events of an older data set


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
    connection: duckdb.DuckDBPyConnection, files: LogFiles, rules: LogRules, max_bad_rows: int = 0
) -> ReadCounts:
    """Read the log into the view `events` (see the module), filtered, repeats and all.

    `where` comes first, so it can drop bad rows by name; a bad row has a null or unreadable user,
    item or time, or is a malformed CSV line, and stands in the table `bad_rows`. Raises InputError
    for more of them than `max_bad_rows`, unusable columns, a `where` that is no condition, and
    damaged files.
    """
    query, marks, total = _load(connection, files, rules)
    bad = count_bad_rows(connection, files, marks)
    bad_rows, good = sum(bad.values()), marks.get(None, 0)
    read = marks.get(FILTERED, 0) + bad_rows + good if total is None else total
    if read == 0:
        raise InputError(f"the log is empty: no row in {_named(files)}; name another input")
    if bad_rows > max_bad_rows:
        _check_every_file(files, rules)
        reasons = ", ".join(f"{count:,} {name}" for name, count in bad.items())
        raise InputError(
            f"{bad_rows:,} of {read:,} rows are bad ({reasons}), above "
            f"max_bad_rows={max_bad_rows}{example(connection, files, rules, query, bad)}; "
            "mend them, drop them with where=…, or raise the limit"
        )
    if good == 0:
        raise InputError(f"no event is left of {read:,} rows; check where={rules.where}")
    collect_bad_rows(connection, files, query, bad)
    features = "".join(f", f{place}" for place in range(len(rules.features)))
    connection.execute(
        f"CREATE VIEW {LOG_EVENTS} AS SELECT rowid AS seq, user_id, item_id, time{features} "
        "FROM loaded WHERE mark IS NULL"
    )
    connection.execute(f"CREATE VIEW events AS FROM {LOG_EVENTS}")
    return ReadCounts(read, read - bad_rows - good, bad, good)


def drop_repeats(connection: duckdb.DuckDBPyConnection, deduplicate: str) -> int:
    """Narrow `events` by a rule of DEDUPLICATE; the first in time order stays. Returns the rest.

    consecutive: an event whose item is also that of the user's event before it is dropped.
    user_item: every event but the first of a (user, item) pair is dropped.
    What was dropped is the view `repeats`, of the same columns.
    """
    if deduplicate == "none":
        connection.execute("CREATE VIEW repeats AS SELECT * FROM events LIMIT 0")
    else:
        order = "ORDER BY time, seq"
        kept = {
            "consecutive": f"lag(item_id) OVER (PARTITION BY user_id {order}) "
            "IS DISTINCT FROM item_id",
            "user_item": f"row_number() OVER (PARTITION BY user_id, item_id {order}) = 1",
        }[deduplicate]
        connection.execute(f"CREATE TABLE marked_events AS SELECT *, {kept} AS kept FROM events")
        for view, condition in (("events", "kept"), ("repeats", "NOT kept")):
            connection.execute(
                f"CREATE OR REPLACE VIEW {view} AS SELECT * EXCLUDE (kept) FROM marked_events "
                f"WHERE {condition}"
            )
        for table in ("loaded", EARLIER_EVENTS):
            connection.execute(f"DROP TABLE IF EXISTS {table}")
    return int(scalar(connection, "SELECT count(*) FROM events"))


def time_type(connection: duckdb.DuckDBPyConnection) -> str:
    """The engine's type of `events.time`: BIGINT, DOUBLE or a TIMESTAMP."""
    return str(connection.sql("SELECT time FROM events").types[0])


def _load(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, rules: LogRules
) -> tuple[LogQuery, dict[int | None, int], int | None]:
    """Create the table `loaded`; its rows counted by mark, and all rows where those are fewer."""
    try:
        query = log_query(connection, files, rules)
        connection.execute(f"CREATE TABLE loaded AS {query.events}")
        total = None if query.total is None else int(scalar(connection, query.total) or 0)
    except (duckdb.OutOfMemoryException, duckdb.InterruptException):
        raise
    except duckdb.Error as error:
        raise _damaged(connection, files, error) from error
    rows: Any = connection.execute("SELECT mark, count(*) FROM loaded GROUP BY mark").fetchall()
    return query, dict(rows), total


def _check_every_file(files: LogFiles, rules: LogRules) -> None:
    """Columns are united over Parquet files, so one that lacks a column looks like null values."""
    for path in files.paths if files.kind == "parquet" else ():
        names = [*pq.read_schema(path).names, *files.partitions]
        for name in (rules.user, rules.item, rules.time):
            if name not in names:
                raise InputError(
                    f"{path} has no column {name}, only {', '.join(names)}; leave it out of input, "
                    "or name the right column in columns.user, columns.item, columns.time"
                )


def _named(files: LogFiles) -> str:
    return files.paths[0] if len(files.paths) == 1 else f"{len(files.paths)} files"


def _damaged(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, error: Exception
) -> InputError:
    """Name the file that cannot be read; only now is each file read by itself."""
    options = "" if files.kind == "parquet" else ", all_varchar=true, ignore_errors=true"
    if "sniffing file" in str(error):
        sniffed = re.search(r'sniffing file "(.*?)"', str(error))
        return InputError(
            f"cannot read {sniffed[1] if sniffed else _named(files)} as CSV: a quote is not closed "
            "or not doubled, or the delimiter is another; mend the quotes or name csv.delimiter"
        )
    for path in files.paths:
        try:
            if files.kind == "parquet":
                pq.read_metadata(path)
            query = f"FROM read_{files.kind}({quoted_path(path)}{options})"
            for _ in connection.sql(query).to_arrow_reader(100_000):
                pass
        except Exception as cause:
            return InputError(f"{path} is damaged or unreadable ({first_line(cause)}); replace it")
    return InputError(f"cannot read the log: {first_line(error)}")
