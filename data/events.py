"""The one interface to the events of a log, which lie in DuckDB here or in Spark elsewhere.

Whatever holds the events, their counts by user and by item, the vocabulary and the users lie in
a DuckDB of this process, `connection`. The SQL over events is of the kind that both read: bare
column names, no `SELECT *`, `FILTER (WHERE …)`, and never a window over all users.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from data.engine import first_line, quoted_path, scalar
from data.errors import InputError
from data.log_files import LogFiles
from data.log_query import LogQuery, LogRules, event_columns, log_query

LOG_EVENTS = "log_events"  # what was read, as a view
LOADED = "loaded"  # its table
READ_ROWS = 1 << 17  # rows that pass from DuckDB at a time
MARKED_EVENTS = "marked_events"  # events with the mark of a repeat
SORT_SHARE = 0.5  # of the memory limit, for the rows of a sort; joins and tables get the rest
FEATURE_BYTES = 32  # of a row in a sort: short text; a wrong guess spills, or scans once more
MOST_SORTS = 16  # each scans the table; beyond, a sixteenth of the rows spills at a time


class Rows:
    """Streams of record batches of one schema, one after the other, read by row counts.

    A reader is only asked for once the one before it has ended.
    """

    def __init__(self, readers: Iterator[pa.RecordBatchReader]) -> None:
        first = next(readers)
        self.types = first.schema.types
        self.batches = itertools.chain(first, itertools.chain.from_iterable(readers))
        self.batch = pa.RecordBatch.from_arrays(
            [pa.array([], kind) for kind in self.types], schema=first.schema
        )

    def take(self, rows: int) -> pa.RecordBatch:
        """The next `rows` rows as one batch."""
        parts = []
        while rows > self.batch.num_rows:
            parts.append(self.batch)
            rows -= self.batch.num_rows
            self.batch = next(self.batches)
        parts.append(self.batch.slice(0, rows))
        self.batch = self.batch.slice(rows)
        return pa.concat_batches([part for part in parts if part.num_rows] or parts[:1])


@dataclass(frozen=True)
class Loaded:
    """What `load` read: the rows by mark, and all rows of the log where those are fewer."""

    query: LogQuery
    marks: dict[int | None, int]
    total: int | None


class Events(Protocol):
    """Tables and views of events, each named, and what is asked of them."""

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The DuckDB of this process."""

    def load(self, files: LogFiles, rules: LogRules) -> Loaded:
        """Read the log into the view LOG_EVENTS of its good rows (columns: `event_columns`).

        Raises InputError as `log_query` does, and for damaged files.
        """

    def raw(self, loaded: Loaded) -> str:
        """SQL for `connection` that gives the bad rows of `LogQuery.raw` in input order."""

    def kind(self, column: str) -> str:
        """DuckDB's type of a column of `events`."""

    def literal(self, value: str) -> str:
        """A literal of the time's type, for DuckDB, as a query over events compares time with."""

    def view(self, name: str, query: str) -> None:
        """Create or replace a view of events."""

    def keep(self, name: str, *queries: str) -> None:
        """Create a table of events from the rows of queries, run one after the other."""

    def drop(self, name: str) -> None:
        """Drop a table of events, if it is there; its views must not be read again."""

    def count(self, name: str) -> int:
        """The rows of a table or view of events."""

    def fetch(self, name: str, query: str) -> None:
        """Create or replace a table of `connection` from a query over events."""

    def lend(self, name: str) -> None:
        """Let queries over events read a table or view of `connection` as it is now."""

    def sorts(self, rows: int, row_bytes: int) -> int:
        """How many sorts `rows` rows are best cut into, so that each fits in memory."""

    def rows(self, *queries: str) -> Rows:
        """The rows of queries over events, one query after the other, out of core.

        Each gives its rows in its order, and runs once those of the one before it are read.
        """

    def progress(self) -> float:
        """The percentage of the work in hand that is done; negative where it is not known."""


@dataclass(frozen=True)
class LocalEvents:
    """`Events` in the DuckDB of this process."""

    connection: duckdb.DuckDBPyConnection

    def load(self, files: LogFiles, rules: LogRules) -> Loaded:
        try:
            query = log_query(self.connection, files, rules)
            self.connection.execute(f"CREATE TABLE {LOADED} AS {query.events}")
            total = None if query.total is None else int(scalar(self.connection, query.total) or 0)
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            raise damaged(self.connection, files, error) from error
        columns = event_columns(rules.features).replace("seq", "rowid AS seq", 1)
        self.view(LOG_EVENTS, f"SELECT {columns} FROM {LOADED} WHERE mark IS NULL")
        marks = f"SELECT mark, count(*) FROM {LOADED} GROUP BY mark"
        rows: Any = self.connection.execute(marks).fetchall()
        return Loaded(query, dict(rows), total)

    def raw(self, loaded: Loaded) -> str:
        return loaded.query.raw

    def kind(self, column: str) -> str:
        return str(self.connection.sql(f"SELECT {column} FROM events").types[0])

    def literal(self, value: str) -> str:
        return value

    def view(self, name: str, query: str) -> None:
        self.connection.execute(f"CREATE OR REPLACE VIEW {name} AS {query}")

    def keep(self, name: str, *queries: str) -> None:
        for number, query in enumerate(queries):
            into = f"INSERT INTO {name}" if number else f"CREATE TABLE {name} AS"
            self.connection.execute(f"{into} {query}")

    def drop(self, name: str) -> None:
        self.connection.execute(f"DROP TABLE IF EXISTS {name}")

    def count(self, name: str) -> int:
        return int(scalar(self.connection, f"SELECT count(*) FROM {name}"))

    def fetch(self, name: str, query: str) -> None:
        self.connection.execute(f"CREATE OR REPLACE TABLE {name} AS {query}")

    def lend(self, name: str) -> None:
        pass  # the events lie beside it

    def sorts(self, rows: int, row_bytes: int) -> int:
        limit = scalar(
            self.connection, "SELECT parse_formatted_bytes(current_setting('memory_limit'))"
        )
        return min(max(1, -(-rows * row_bytes // int(limit * SORT_SHARE))), MOST_SORTS)

    def rows(self, *queries: str) -> Rows:
        return Rows(self.connection.sql(query).to_arrow_reader(READ_ROWS) for query in queries)

    def progress(self) -> float:
        return float(self.connection.query_progress())


def damaged(connection: duckdb.DuckDBPyConnection, files: LogFiles, error: Exception) -> InputError:
    """Name the file that cannot be read; only now is each file read by itself."""
    options = "" if files.kind == "parquet" else ", all_varchar=true, ignore_errors=true"
    if "sniffing file" in str(error):
        sniffed = re.search(r'sniffing file "(.*?)"', str(error))
        return InputError(
            f"cannot read {sniffed[1] if sniffed else files.name} as CSV: a quote is not closed "
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
