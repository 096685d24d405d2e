"""The sort of a conversion, cut into several: the same bytes, and next to nothing spilled."""

import random
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data import events
from data.engine import open_engine
from data.errors import InputError
from data.events import MOST_SORTS, LocalEvents, Rows
from data.grouping import group_users, stream_users
from data.k_core import count_events
from data.log_files import find_files
from data.log_query import LogRules
from data.logs import read_events
from data.split import Split
from tests.tools.conversion_cases import as_events, digest, run, some_events, write


def readers(parts: Iterable[list[int]]) -> Iterator[pa.RecordBatchReader]:
    schema = pa.schema([("x", pa.int64())])
    for part in parts:
        batches = [pa.record_batch([pa.array([value])], schema=schema) for value in part]
        yield pa.RecordBatchReader.from_batches(schema, batches)


def test_rows_run_on_through_readers_and_ask_for_one_at_a_time() -> None:
    begun = []

    def counted() -> Iterator[pa.RecordBatchReader]:
        for number, reader in enumerate(readers([[1, 2], [], [3], [4, 5, 6]])):
            begun.append(number)
            yield reader

    rows = Rows(counted())
    assert rows.types == [pa.int64()]
    assert rows.take(0).num_rows == 0
    assert rows.take(2)["x"].to_pylist() == [1, 2]
    assert begun == [0]
    assert rows.take(3)["x"].to_pylist() == [3, 4, 5]
    assert rows.take(1)["x"].to_pylist() == [6]
    with pytest.raises(StopIteration):
        rows.take(1)


@pytest.mark.parametrize("features", [(), ("price", "name")])
@pytest.mark.parametrize(
    ("kind", "deduplicate"), [(int, "none"), (str, "consecutive"), (int, "user_item")]
)
def test_bytes_do_not_depend_on_the_sorts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: tuple[str, ...],
    kind: type,
    deduplicate: str,
) -> None:
    draw = random.Random(1)
    extra = {"price": [draw.random() for _ in range(900)]}
    names = [draw.choice(["", "ü" * 40, None]) for _ in range(900)]
    log = write(tmp_path / "log.parquet", some_events(6, 900, kind), **extra, name=names)
    options = {"features": features, "deduplicate": deduplicate}
    options |= {"shards": 3, "row_group_events": 50, "min_item_events": 2}
    run(log, tmp_path / "one", **options)
    monkeypatch.setattr(events, "SORT_SHARE", 1e-7)  # 400 bytes
    run(log, tmp_path / "many", **options)
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def test_more_sorts_than_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write(tmp_path / "log.parquet", as_events([(user, 1) for user in (1, 2, 2)]))
    run(log, tmp_path / "one")
    monkeypatch.setattr(events, "SORT_SHARE", 1e-9)
    run(log, tmp_path / "many")
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def test_a_sort_gets_half_the_memory(tmp_path: Path) -> None:
    with open_engine(tmp_path, "1GB") as connection:
        local = LocalEvents(connection)
        many = {rows: local.sorts(rows, 32) for rows in (0, 1, 14_000_000, 40_000_000, 10**12)}
    assert many == {0: 1, 1: 1, 14_000_000: 1, 40_000_000: 3, 10**12: MOST_SORTS}


@pytest.mark.parametrize("most", [MOST_SORTS, 1])
def test_sorts_leave_the_disk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Of 4 M events one sort spills 40 MB at 100 MB of memory; several spill nothing."""
    size = 4_000_000
    rng = np.random.default_rng(0)
    log = {"user_id": rng.integers(0, 100_000, size), "item_id": rng.integers(0, 5_000, size)}
    log["timestamp"] = rng.integers(0, 1 << 40, size)
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    monkeypatch.setattr(events, "MOST_SORTS", most)
    expected = pytest.raises(InputError, match="disk") if most == 1 else nullcontext()
    with expected, open_engine(tmp_path, "100MB", 2) as connection:
        local = LocalEvents(connection)
        read_events(local, find_files(str(tmp_path / "log.parquet")), LogRules())
        count_events(local, "user_id", Split())
        connection.execute(
            "CREATE TABLE vocabulary AS SELECT range AS item_id, range::INTEGER AS item "
            "FROM range(5000)"
        )
        group_users(connection, 3, Split())
        connection.execute("SET max_temp_directory_size = '1MB'")
        tables = (table for _, table in stream_users(local, (), 1_000_000))
        lengths = (pc.sum(pc.list_value_length(table["items"])).as_py() for table in tables)
        assert sum(lengths) == size
