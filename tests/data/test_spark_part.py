"""What executors do, and what is sent to Spark and back: all of engine=spark but Spark."""

import sys
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.engine import open_engine
from data.errors import InputError
from data.log_files import find_files
from data.log_query import FILE_COLUMN, LogRules, log_query, select_rows
from data.spark_events import open_spark, received, sent
from data.spark_part import Part, PartReader, read_part

SENT_KINDS = {
    "time": [
        "'1960-01-02 03:04:05.678901'::TIMESTAMP",
        "'2024-01-02 03:04:05.678901234'::TIMESTAMP_NS",
        "'2024-01-02 03:04:05'::TIMESTAMP_S",
        "'1960-01-02 03:04:05.678'::TIMESTAMP_MS",
        "'2024-01-02 03:04:05.678901+02'::TIMESTAMPTZ",
        "-5::BIGINT",
        "0.1::DOUBLE",
    ],
    "f0": [
        "true",
        "0.1::FLOAT",
        "0.1::DOUBLE",
        "'nan'::DOUBLE",
        "'é'",
        "255::UTINYINT",
        "18446744073709551615::UBIGINT",
        "170141183460469231731687303715884105727::HUGEINT",
        "12.30::DECIMAL(38, 2)",
        "'1500-02-03'::DATE",
        "'2024-01-02 03:04:05.678901234'::TIMESTAMP_NS",
        "'2024-01-02 03:04:05.678901+02'::TIMESTAMPTZ",
        "'12:34:56.789'::TIME",
        "INTERVAL '3 months 2 days'",
        "'12345678-1234-5678-1234-567812345678'::UUID",
        "'\\x00\\xFF'::BLOB",
        "NULL::DATE",
    ],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in SENT_KINDS.items() for value in values]
)
def test_values_come_back_as_they_were_sent(name: str, value: str) -> None:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        kind = str(connection.sql(f"SELECT {value}").types[0])
        connection.execute(f"CREATE TABLE a AS SELECT {value} AS {name}")
        connection.execute(f"CREATE TABLE b AS SELECT {sent(name, kind)} AS {name} FROM a")
        connection.execute(f"CREATE TABLE c AS SELECT {received(name, {name: kind})} FROM b")
        assert [str(one) for one in connection.sql("FROM c").types] == [kind]
        same = connection.sql(f"SELECT a.{name} IS NOT DISTINCT FROM c.{name} FROM a, c")
        assert same.fetchall() == [(True,)]
        plain = {"BOOLEAN", "BIGINT", "FLOAT", "DOUBLE", "VARCHAR"}  # what Parquet keeps for Spark
        assert {str(one) for one in connection.sql("FROM b").types} <= plain


def a_reader(path: Path, rules: LogRules) -> PartReader:
    files = find_files(str(path))
    with duckdb.connect() as connection:
        types = log_query(connection, files, rules).types
    query, _ = select_rows("FROM part", types, rules, False)
    return PartReader(query, types, files.partitions, FILE_COLUMN, duckdb.__version__)


def test_parts_are_the_log_in_its_order(tmp_path: Path) -> None:
    """Files of other columns, widths and partitions, cut in the middle, give the same rows."""
    log = tmp_path / "it's [a] log" / "above=1"
    narrow = {"user_id": pa.array([1, 2, None, 4], pa.int32()), "timestamp": [1, 2, 3, 4]}
    wide = {"USER_ID": [2**40, 6, 7], "timestamp": [5, 6, None], "price": [0.5, 1.5, 2.5]}
    for name, table in (("day=2024-01-01/item_id=x", narrow), ("day=2024-01-02/item_id=7", wide)):
        (log / name).mkdir(parents=True)
        pq.write_table(pa.table(table), log / name / "a.parquet")
    rules = LogRules(features=("price", "day"), where="timestamp IS NULL OR timestamp <> 2")
    files = find_files(str(log))
    with open_engine(tmp_path, "1GB") as connection:
        whole = connection.execute(log_query(connection, files, rules).events).fetchall()
    reader = a_reader(log, rules)
    parts = [(0, 0, 3), (0, 3, 9), (1, 0, 2), (1, 2, 9), (1, 9, 18)]
    total: dict[Any, int] = {}
    for number, (file, first, end) in enumerate(parts):
        part = Part(number, files.paths[file], first, end)
        marks, problem = read_part(reader, str(tmp_path), part)
        assert problem is None
        for mark, rows in marks.items():
            total[mark] = total.get(mark, 0) + rows
    written = [pq.read_table(path).to_pylist() for path in sorted(tmp_path.glob("part-*"))]
    found = [row for rows in written for row in rows]
    assert [tuple(row.values())[1:] for row in found] == whole
    assert [row["seq"] for row in found] == sorted({row["seq"] for row in found})
    assert total == {None: 4, 1: 1, 3: 1}
    assert not list(tmp_path.glob(".*"))


def test_what_an_executor_cannot_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [1], "item_id": [2], "timestamp": [3]}), log)
    reader, part = a_reader(log, LogRules()), Part(0, str(log), 0, 9)

    def problem(folder: Path, part: Part) -> str:
        marks, sentence = read_part(reader, str(folder), part)
        assert not marks
        return str(sentence)

    unseen = problem(tmp_path / "none", part)
    assert "does not see" in unseen
    assert "output must lie on a file system that this process and all executors share" in unseen
    absent = problem(tmp_path, Part(0, str(tmp_path / "no.parquet"), 0, 9))
    assert "no.parquet is damaged or unreadable on" in absent
    assert "or put it where all executors see it" in absent
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(log.read_bytes()[:-20])
    assert "damaged.parquet is damaged or unreadable on" in problem(
        tmp_path, Part(0, str(damaged), 0, 9)
    )
    monkeypatch.setattr(duckdb, "__version__", "0.1")
    assert "has another DuckDB (0.1) than this process" in problem(tmp_path, part)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    assert "has another DuckDB (none) than this process" in problem(tmp_path, part)
    assert not list(tmp_path.glob("part-*"))


def test_without_pyspark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py4j.protocol", None)
    with (
        open_engine(tmp_path, "1GB") as connection,
        pytest.raises(InputError, match=r"engine=spark needs PySpark \(.*\); install it with pip"),
        open_spark(connection, tmp_path, None, {}),
    ):
        pass
