"""The events of a log in Spark, for logs that one machine cannot hold.

Executors read the log with DuckDB (data/spark_part.py), so that ids, times, bad rows and `where`
are what they are on one machine, and write it as plain Parquet into a scratch folder that they
share with this process. Spark then counts, joins and sorts. What comes back comes as Parquet too:
counts by user and by item, and the sorted events, which this process streams. Neither log nor
events pass through its memory.

Spark sees times as whole microseconds or nanoseconds, or as floats, and a feature of a type that
is not in PLAIN as text: what comes back is cast to what it was.
"""

import functools
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from data import spark_part
from data.engine import quoted_path, quoted_text, scalar
from data.errors import InputError, reason
from data.events import LOADED, LOG_EVENTS, READ_ROWS, Loaded, Rows, damaged
from data.log_files import LogFiles
from data.log_query import FILE_COLUMN, FILTERED, LogRules, event_columns, log_query, select_rows
from data.spark_part import Part, PartReader, read_part

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PART_ROWS = 20_000_000  # of a file, at most, that one task reads
PLAIN = ("BOOLEAN", "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "FLOAT", "DOUBLE", "VARCHAR")


@contextmanager
def open_spark(
    connection: duckdb.DuckDBPyConnection, folder: Path, master: str | None, conf: dict[str, str]
) -> Iterator["SparkEvents"]:
    """A Spark session whose events lie in `folder`, which executors must see by the same name.

    master: where it runs; None as spark-submit or spark-defaults.conf say, else on this machine.
    conf: Spark's own options. Raises InputError where there is no Spark, and, from inside the
    block, when a job fails.
    """
    try:
        from py4j.protocol import Py4JError
        from pyspark.cloudpickle import register_pickle_by_value
        from pyspark.errors import AnalysisException, PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise InputError(
            f"engine=spark needs PySpark ({reason(error)}); install it with pip install '.[spark]'"
        ) from error
    options = {"spark.ui.showConsoleProgress": "false"} | conf  # its bar would cross our lines
    builder = SparkSession.builder.appName("convert_logs").config(map=options)
    try:
        session = (builder.master(master) if master else builder).getOrCreate()
    except (PySparkException, Py4JError) as error:
        raise InputError(
            f"cannot start Spark at spark.master={master} ({_cause(error)}); check it, "
            "spark.conf and that Java is installed"
        ) from error
    context = session.sparkContext
    if context.master.startswith("local"):
        context.pythonExec = sys.executable  # its default is the python3 of the PATH
    register_pickle_by_value(spark_part)
    try:
        yield SparkEvents(connection, session, folder)
    except AnalysisException:
        raise  # a query of ours that is wrong
    except (PySparkException, Py4JError) as error:
        raise InputError(
            f"a job of Spark failed ({_cause(error)}); its log says more, and spark.conf sets "
            "the memory and disk that it has"
        ) from error
    finally:
        session.stop()


def _cause(error: Exception) -> str:
    """The first line of what Java says, where it says anything."""
    java = getattr(error, "java_exception", None)
    return reason(error) if java is None else str(java.toString()).splitlines()[0]


@dataclass
class SparkEvents:
    """`Events` in Spark; `folder` holds its Parquet."""

    connection: duckdb.DuckDBPyConnection
    session: "SparkSession"
    folder: Path
    _kinds: dict[str, str] = field(default_factory=dict)  # DuckDB's, of the columns of `events`
    _tables: dict[str, Path] = field(default_factory=dict)
    _bad_parts: list[Part] = field(default_factory=list)
    _written: int = 0  # folders, which their names count

    def load(self, files: LogFiles, rules: LogRules) -> Loaded:
        if files.kind != "parquet":
            raise InputError(
                f"engine=spark reads Parquet, and {files.paths[0]} is none; convert it with "
                "engine=duckdb, or write the log as Parquet"
            )
        try:
            query = log_query(self.connection, files, rules)
            described = self.connection.execute(f"DESCRIBE {query.events}").fetchall()
            sizes = self._rows_by_file(files)
        except duckdb.Error as error:
            raise damaged(self.connection, files, error) from error
        self._kinds = {str(row[0]): str(row[1]) for row in described}
        events, raw = select_rows("FROM part", query.types, rules, False)
        columns = ", ".join(f"{sent(name, kind)} AS {name}" for name, kind in self._kinds.items())
        reader = PartReader(
            f"SELECT {columns} FROM ({events})",
            query.types,
            files.partitions,
            FILE_COLUMN,
            duckdb.__version__,
        )
        parts = _parts(files, sizes)
        marks, self._bad_parts = self._read_parts(LOADED, parts, reader)
        columns = event_columns(rules.features)
        self.view(LOG_EVENTS, f"SELECT {columns} FROM {LOADED} WHERE mark IS NULL")
        self._raw = replace(reader, query=f"SELECT * FROM ({raw}) WHERE mark > {FILTERED}")
        return Loaded(query, marks, sum(sizes.values()))

    def raw(self, loaded: Loaded) -> str:
        self._read_parts("raw_rows", self._bad_parts, self._raw)
        source = _read_parquet(self._tables["raw_rows"])
        return f'SELECT "user", item, "time", file, mark FROM {source}'

    def kind(self, column: str) -> str:
        return self._kinds[column]

    def literal(self, value: str) -> str:
        kind = "DOUBLE" if self._kinds["time"] == "DOUBLE" else "BIGINT"
        text = f"SELECT CAST({sent('time', self._kinds['time'], value)} AS VARCHAR)"
        return f"CAST('{scalar(self.connection, text)}' AS {kind})"

    def view(self, name: str, query: str) -> None:
        self.session.sql(query).createOrReplaceTempView(name)

    def keep(self, name: str, *queries: str) -> None:
        self._show(name, self._write(name, " UNION ALL ".join(queries)))

    def drop(self, name: str) -> None:
        if name in self._tables:
            shutil.rmtree(self._tables.pop(name))

    def count(self, name: str) -> int:
        return int(self.session.table(name).count())

    def fetch(self, name: str, query: str) -> None:
        folder = self._write(name, query)
        self.connection.execute(f"CREATE OR REPLACE TABLE {name} AS {self._received(folder)}")
        shutil.rmtree(folder)

    def lend(self, name: str) -> None:
        folder = self._new_folder(name)
        folder.mkdir()
        path = quoted_text(str(folder / "part-00000.parquet"))
        self.connection.execute(f"COPY (FROM {name}) TO {path} (FORMAT parquet)")
        self._show(name, folder)

    def sorts(self, rows: int, row_bytes: int) -> int:
        return 1  # its executors cut a sort themselves

    def rows(self, *queries: str) -> Rows:
        sources = (self._received(self._write("rows", query)) for query in queries)
        return Rows(self.connection.sql(source).to_arrow_reader(READ_ROWS) for source in sources)

    def progress(self) -> float:
        return -1.0

    def _rows_by_file(self, files: LogFiles) -> dict[str, int]:
        names = ", ".join(quoted_path(path) for path in files.paths)
        sizes = f"SELECT file_name, num_rows FROM parquet_file_metadata([{names}])"
        return dict(self.connection.execute(sizes).fetchall())

    def _read_parts(
        self, name: str, parts: list[Part], reader: PartReader
    ) -> tuple[dict[int | None, int], list[Part]]:
        """Create the table `name`; its rows by mark, and the parts that have marked ones."""
        folder = self._new_folder(name)
        folder.mkdir()
        todo = self.session.sparkContext.parallelize(parts, len(parts))
        read = functools.partial(read_part, reader, str(folder))
        marks: Counter[int | None] = Counter()
        marked = []
        for part, (one, problem) in zip(parts, todo.map(read).collect(), strict=True):
            if problem:
                raise InputError(problem)
            marks.update(one)
            marked += [part] if one.keys() - {None} else []
        if len(list(folder.glob("part-*"))) < len(parts):
            raise InputError(
                f"what executors write into {folder} is not seen here: output must lie on a file "
                "system that this process and all executors share; name another"
            )
        self._show(name, folder)
        return dict(marks), marked

    def _new_folder(self, name: str) -> Path:
        self._written += 1
        return self.folder / f"{self._written:04d}-{name}"

    def _write(self, name: str, query: str) -> Path:
        """Run a query; its rows lie in the files of the folder, in the order of their names."""
        folder = self._new_folder(name)
        self.session.sql(query).write.parquet(f"file://{folder}")
        return folder

    def _show(self, name: str, folder: Path) -> None:
        self._tables[name] = folder
        path = re.sub(r"([\\{}*?\[\],^])", r"\\\1", str(folder))  # Spark takes it for a glob
        self.session.read.parquet(f"file://{path}").createOrReplaceTempView(name)

    def _received(self, folder: Path) -> str:
        """SQL for the rows of a folder that Spark wrote, in their order and as they were sent."""
        source = _read_parquet(folder)
        described = self.connection.execute(f"DESCRIBE FROM {source}").fetchall()
        columns = [received(str(row[0]), self._kinds) for row in described]
        return f"SELECT {', '.join(columns)} FROM {source}"


def _parts(files: LogFiles, sizes: dict[str, int]) -> list[Part]:
    """The files in their order, cut where they are long; an empty one is a part as well."""
    parts: list[Part] = []
    for path in files.paths:
        for first in range(0, max(sizes[path], 1), PART_ROWS):
            parts.append(Part(len(parts), path, first, first + PART_ROWS))
    return parts


def _part_number(path: Path) -> int:
    """Of `part-NNNNN-….parquet`, which has more digits where there are more parts."""
    return int(path.name.split("-")[1].split(".")[0])


def _read_parquet(folder: Path) -> str:
    paths = sorted(folder.glob("part-*"), key=_part_number)
    names = ", ".join(quoted_path(str(path)) for path in paths)
    return f"read_parquet([{names}], hive_partitioning=false)"


def sent(name: str, kind: str, value: str | None = None) -> str:
    """SQL of `value`, or the column, as Spark gets it."""
    value = value or name
    if name == "time" and kind not in ("BIGINT", "DOUBLE"):
        unit = "epoch_ns" if "_NS" in kind else "epoch_us"
        return f"CASE WHEN isfinite({value}) THEN {unit}({value}) END"
    is_feature = name.startswith("f")
    return f"CAST({value} AS VARCHAR)" if is_feature and kind not in PLAIN else value


def received(name: str, kinds: dict[str, str]) -> str:
    """SQL of a column from Spark as it was sent; what `events` lacks stays as it is."""
    kind = kinds.get(name)
    if kind is None or name in ("user_id", "item_id"):
        return name
    value = name
    if name == "time" and kind not in ("BIGINT", "DOUBLE"):
        value = f"make_timestamp_ns({name})" if "_NS" in kind else f"make_timestamp({name})"
    return f"CAST({value} AS {kind}) AS {name}"
