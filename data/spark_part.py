"""What an executor of Spark does with a part of a log: DuckDB reads it, as it does on one machine.

Sent to executors by value: they need Python and DuckDB, and nothing of this project.
"""

import glob
import os
import socket
import uuid
from dataclasses import dataclass
from typing import Any

BASE_BITS = 40  # `seq` is the part's number above so many bits, and the row in the part
MEMORY_LIMIT = "1GB"  # of the DuckDB of a task, which only passes rows on


@dataclass(frozen=True)
class Part:
    """Rows of one Parquet file; parts are numbered in input order."""

    number: int
    path: str
    first_row: int
    end_row: int


@dataclass(frozen=True)
class PartReader:
    """How parts are read: `query` is SQL over the view `part`, and gives a column `mark`.

    columns: of the view, the whole log's with their types, whether a file has them or not.
    partitions: which of them are folders KEY=VALUE. file_column: a further one, the file's path.
    """

    query: str
    columns: dict[str, str]
    partitions: tuple[str, ...]
    file_column: str
    duckdb_version: str


def read_part(
    reader: PartReader, folder: str, part: Part
) -> tuple[dict[int | None, int], str | None]:
    """Write the part's rows with `seq` into `folder`/part-NNNNN.parquet.

    Returns the rows by mark, and the sentence on what is wrong, if anything is.
    """
    host = socket.gethostname()
    try:
        import duckdb
    except ImportError:
        return {}, _other_engine(host, "none", reader.duckdb_version)
    if duckdb.__version__ != reader.duckdb_version:
        return {}, _other_engine(host, duckdb.__version__, reader.duckdb_version)
    if not os.path.isdir(folder):
        return {}, (
            f"the executor on {host} does not see {folder}: output must lie on a file system that "
            "this process and all executors share; name another"
        )
    with duckdb.connect(config={"threads": "1", "memory_limit": MEMORY_LIMIT}) as connection:
        try:
            connection.execute("SET TimeZone = 'UTC'")
            _create_view(connection, reader, part)
            return _write(connection, reader, folder, part.number), None
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            message = next(iter(str(error).splitlines()), "")
            return {}, (
                f"{part.path} is damaged or unreadable on {host} ({message}); replace it, or put "
                "it where all executors see it"
            )


def _other_engine(host: str, found: str, wanted: str) -> str:
    return (
        f"the executor on {host} has another DuckDB ({found}) than this process ({wanted}); "
        f"install duckdb=={wanted} for its Python"
    )


def _create_view(connection: Any, reader: PartReader, part: Part) -> None:
    """The view `part`, its columns those of the whole log."""
    kinds = ", ".join(f"{_quoted(key)}: {reader.columns[key]}" for key in reader.partitions)
    hive = f"true, hive_types={{{kinds}}}" if kinds else "false"
    path = _text(glob.escape(part.path))
    file = _quoted(reader.file_column)
    source = (
        f"read_parquet({path}, hive_partitioning={hive}, filename={_text(reader.file_column)}, "
        "file_row_number=true)"
    )
    described = connection.execute(f"DESCRIBE FROM {source}").fetchall()
    there = {str(row[0]).lower() for row in described}
    casts = []
    for name, kind in reader.columns.items():
        value = _quoted(name) if name.lower() in there else "NULL"
        casts.append(f"CAST({value} AS {kind}) AS {_quoted(name)}")
    connection.execute(
        f"CREATE VIEW part AS SELECT {', '.join(casts)}, {file} FROM {source} "
        f"WHERE file_row_number >= {part.first_row} AND file_row_number < {part.end_row}"
    )


def _write(connection: Any, reader: PartReader, folder: str, number: int) -> dict[int | None, int]:
    target = os.path.join(folder, f"part-{number:05d}.parquet")
    unfinished = os.path.join(folder, f".{uuid.uuid4().hex}")
    connection.execute(
        f"COPY (SELECT {number << BASE_BITS} + row_number() OVER () AS seq, * "
        f"FROM ({reader.query})) TO {_text(unfinished)} (FORMAT parquet)"
    )
    written = f"read_parquet({_text(glob.escape(unfinished))}, hive_partitioning=false)"
    marks = connection.execute(f"SELECT mark, count(*) FROM {written} GROUP BY mark").fetchall()
    os.replace(unfinished, target)  # whole, and the same from every attempt
    return dict(marks)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
