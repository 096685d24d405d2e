"""DuckDB as the engine of conversion and grouping: out of core, the same at any thread count."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from data.errors import InputError


@contextmanager
def open_engine(
    folder: Path, memory_limit: str, threads: int | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB whose tables and spilled data lie in `folder`; the caller removes the folder.

    Raises InputError when the limits cannot be read, and, from inside the block, when the engine
    runs out of memory or disk, and KeyboardInterrupt for a query that Ctrl-C ended. The limit is
    the engine's own: the process takes some 0.3 GB more.
    """
    config = {
        "memory_limit": memory_limit,
        "temp_directory": str(folder / "spill"),
        "preserve_insertion_order": "true",  # false silently breaks ORDER BY for Arrow readers
        "autoinstall_known_extensions": "false",
        "python_enable_replacements": "false",
    }
    if threads is not None:
        config["threads"] = str(threads)
    try:
        connection = duckdb.connect(str(folder / "engine.duckdb"), config=config)
        connection.execute("SET TimeZone = 'UTC'")
    except (duckdb.ParserException, duckdb.InvalidInputException, duckdb.SyntaxException) as error:
        raise InputError(
            f"cannot use memory_limit={memory_limit} threads={threads} ({first_line(error)}); "
            "write for example memory_limit=4GB threads=2"
        ) from error
    try:
        yield connection
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise InputError(
            f"memory_limit={memory_limit} or the disk of the output is too small "
            f"({first_line(error)}); raise the limit or free space"
        ) from error
    except (duckdb.InterruptException, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "interrupted" not in str(error):
            raise
        raise KeyboardInterrupt from error
    finally:
        connection.close()


def scalar(connection: duckdb.DuckDBPyConnection, query: str) -> Any:
    """The one value that `query` gives."""
    return one_row(connection, query)[0]


def one_row(connection: duckdb.DuckDBPyConnection, query: str) -> tuple[Any, ...]:
    """The one row that `query` gives, fetched to its end: an open result blocks the connection."""
    (row,) = connection.execute(query).fetchall()
    return tuple(row)


def first_line(error: Exception) -> str:
    """The first line of an engine's message, without its class."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.split("Error: ", 1)[-1]


def quoted(name: str) -> str:
    """A column name for SQL."""
    return '"' + name.replace('"', '""') + '"'


def quoted_path(path: str) -> str:
    """A file's path for a table function of SQL, which would read it as a glob."""
    return quoted_text(glob.escape(path))


def quoted_text(text: str) -> str:
    """A string for SQL, as the path of a file to be written."""
    return "'" + text.replace("'", "''") + "'"
