"""The rows of a log that cannot be used: counted by reason, described, and written aside.

The file bad_rows.parquet of a data set lies beside what is read as data, and nothing reads it but a
person who mends the log.
"""

import os.path
from pathlib import Path

import duckdb

from data.engine import first_line, one_row, quoted_text, scalar
from data.events import Events, Loaded
from data.log_files import LogFiles
from data.log_query import BAD_REASONS, FILTERED, LogQuery, LogRules
from data.schema import BAD_ROWS

_MALFORMED = "malformed_line"


def count_bad_rows(
    connection: duckdb.DuckDBPyConnection, files: LogFiles, marks: dict[int | None, int]
) -> dict[str, int]:
    """The counts by reason, from rows by mark and the CSV lines that the reader rejected."""
    bad = {name: marks[mark] for mark, name in BAD_REASONS.items() if mark in marks}
    if files.kind == "csv":
        lines = scalar(connection, "SELECT count(DISTINCT (file_id, line)) FROM reject_errors")
        bad |= {_MALFORMED: lines} if lines else {}
    return bad


def collect_bad_rows(events: Events, files: LogFiles, loaded: Loaded, bad: dict[str, int]) -> None:
    """Create the table `bad_rows(reason, file, line, user, item, time, text)` in input order.

    file is relative to the folder that holds all files; user, item and time are text as they stand
    in the log. A malformed CSV line has its line and text instead. Reads the log again.
    """
    above = os.path.commonpath([os.path.dirname(path) for path in files.paths])
    start = len(os.path.join(above, "")) + 1
    connection = events.connection
    connection.execute(
        'CREATE TABLE bad_rows (reason VARCHAR, file VARCHAR, line BIGINT, "user" VARCHAR, '
        'item VARCHAR, "time" VARCHAR, text VARCHAR)'
    )
    if _MALFORMED in bad:  # before the reader adds to what it rejected
        connection.execute(
            """CREATE TABLE malformed AS SELECT file_path, line, any_value(csv_line) AS text
            FROM reject_errors JOIN reject_scans USING (scan_id, file_id)
            GROUP BY file_path, line"""
        )
    if bad.keys() - {_MALFORMED}:
        names = " ".join(f"WHEN {mark} THEN '{name}'" for mark, name in BAD_REASONS.items())
        connection.execute(
            f"""INSERT INTO bad_rows SELECT CASE mark {names} END, substr(file, {start}), NULL,
                "user", item, "time", NULL
            FROM ({events.raw(loaded)}) WHERE mark > {FILTERED}"""
        )
    if _MALFORMED in bad:
        connection.execute(
            f"""INSERT INTO bad_rows
            SELECT '{_MALFORMED}', substr(file_path, {start}), line, NULL, NULL, NULL, text
            FROM malformed ORDER BY file_path, line"""
        )


def example(
    connection: duckdb.DuckDBPyConnection,
    files: LogFiles,
    rules: LogRules,
    query: LogQuery,
    bad: dict[str, int],
) -> str:
    """An example of what is bad most often: its file, or a line or value and what mends it."""
    reason = max(bad, key=lambda name: bad[name])
    if reason == _MALFORMED:
        # The reader does not repeat itself: its last words on the line are kept in this table.
        line, error = one_row(connection, "SELECT line, error_message FROM reject_errors LIMIT 1")
        return f", for example line {line} ({first_line(ValueError(error))})"
    kind, _, role = reason.partition("_")
    mark = next(number for number, name in BAD_REASONS.items() if name == reason)
    value, file = one_row(
        connection, f'SELECT "{role}", file FROM ({query.raw}) WHERE mark = {mark} LIMIT 1'
    )
    if kind != "unreadable":
        return f", for example in {file}"
    name = getattr(rules, role)
    right = "BIGINT or TIMESTAMP" if role == "time" else "VARCHAR"
    fix = f"cast the column to {right}"
    if files.kind == "csv":
        fix = f"name another type, 'csv.types={{{name}: {right.split()[0]}}}', where that is wrong"
    return f": columns.{role}={name} is {query.types[name]} and has for example {value!r}; {fix}"


def write_bad_rows(folder: Path, connection: duckdb.DuckDBPyConnection) -> None:
    """Write `bad_rows.parquet` from the table `bad_rows`."""
    path = quoted_text(str(folder / BAD_ROWS))
    connection.execute(f"COPY (FROM bad_rows) TO {path} (FORMAT parquet, COMPRESSION zstd)")
