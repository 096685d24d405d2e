"""Raw event logs into one table of the engine, by rules that scoring can repeat.

`read_events` leaves a view `events(seq, user_id, item_id, time, f0, f1, …)`. Ids are BIGINT or
VARCHAR. `seq` is the input order (file in sorted path order, then row) and breaks ties in time.
f0, f1, … are the feature columns. The log never lies in memory whole.
"""

import re
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow.parquet as pq

from data.engine import first_line, one_row, quoted_path, scalar
from data.errors import InputError
from data.log_files import LogFiles
from data.log_query import BAD_REASONS, FILTERED, LogQuery, LogRules, log_query


@dataclass(frozen=True)
class ReadCounts:
    """What `read_events` met: read = filtered + bad + duplicates + kept."""

    read: int
    filtered: int  # dropped by `where`
    bad: dict[str, int]  # by reason
    duplicates: int
    kept: int


def read_events(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, rules: LogRules, max_bad_rows: int = 0
) -> ReadCounts:
    """Read the log into the view `events` (see the module), filtered and de-duplicated.

    `where` comes first, so it can drop bad rows by name; a bad row has a null or unreadable user,
    item or time, or is a malformed CSV line. Raises InputError for more bad rows than
    `max_bad_rows`, unusable columns, a `where` that is no condition, and damaged files.
    """
    query, marks, total = _load(connection, files, rules)
    bad = {name: marks[mark] for mark, name in BAD_REASONS.items() if mark in marks}
    if files.kind == "csv":
        lines = scalar(connection, "SELECT count(DISTINCT (file_id, line)) FROM reject_errors")
        bad |= {"malformed_line": lines} if lines else {}
    bad_rows, good = sum(bad.values()), marks.get(None, 0)
    read = marks.get(FILTERED, 0) + bad_rows + good if total is None else total
    if read == 0:
        raise InputError(f"the log is empty: no row in {_named(files)}")
    if bad_rows > max_bad_rows:
        _check_every_file(files, rules)
        reasons = ", ".join(f"{count:,} {name}" for name, count in bad.items())
        raise InputError(
            f"{bad_rows:,} of {read:,} rows are bad ({reasons}), above "
            f"max_bad_rows={max_bad_rows}{_example(connection, files, rules, query, bad)}; mend "
            "them, drop them with where=…, or raise the limit"
        )
    if good == 0:
        raise InputError(f"no event is left of {read:,} rows; check where={rules.where}")
    features = "".join(f", f{place}" for place in range(len(rules.features)))
    connection.execute(
        f"CREATE VIEW events AS SELECT rowid AS seq, user_id, item_id, time{features} "
        "FROM loaded WHERE mark IS NULL"
    )
    kept = good if rules.deduplicate == "none" else _deduplicate(connection, rules.deduplicate)
    return ReadCounts(read, read - bad_rows - good, bad, good - kept, kept)


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


def _example(
    connection: duckdb.DuckDBPyConnection,
    files: LogFiles,
    rules: LogRules,
    query: LogQuery,
    bad: dict[str, int],
) -> str:
    """The most frequent unreadable value or malformed line, and what makes it readable."""
    reason = max(bad, key=lambda name: bad[name])
    if reason == "malformed_line":
        # The reader does not repeat itself: its last words on the line are kept in this table.
        line, error = one_row(connection, "SELECT line, error_message FROM reject_errors LIMIT 1")
        return f", for example line {line} ({first_line(ValueError(error))})"
    kind, _, role = reason.partition("_")
    if kind != "unreadable":
        return ""
    mark = next(number for number, name in BAD_REASONS.items() if name == reason)
    (value,) = one_row(connection, f"SELECT {role} FROM ({query.raw}) WHERE mark = {mark} LIMIT 1")
    name = getattr(rules, role)
    right = "BIGINT or TIMESTAMP" if role == "time" else "VARCHAR"
    fix = f"cast the column to {right}"
    if files.kind == "csv":
        fix = f"name another type, 'csv.types={{{name}: {right.split()[0]}}}', where that is wrong"
    return f": columns.{role}={name} is {query.types[name]} and has for example {value!r}; {fix}"


def _deduplicate(connection: duckdb.DuckDBPyConnection, kind: str) -> int:
    """Drop repeats; the first in time order stays. Returns how many events are left.

    consecutive: an event whose item is also that of the user's event before it.
    user_item: every event but the first of a (user, item) pair.
    """
    order = "ORDER BY time, seq"
    kept = {
        "consecutive": f"lag(item_id) OVER (PARTITION BY user_id {order}) IS DISTINCT FROM item_id",
        "user_item": f"row_number() OVER (PARTITION BY user_id, item_id {order}) = 1",
    }[kind]
    connection.execute(f"CREATE TABLE distinct_events AS SELECT * FROM events QUALIFY {kept}")
    connection.execute("CREATE OR REPLACE VIEW events AS SELECT * FROM distinct_events")
    connection.execute("DROP TABLE loaded")
    return int(scalar(connection, "SELECT count(*) FROM events"))


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
