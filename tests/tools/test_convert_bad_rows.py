"""Rows that cannot be used: counted by reason, written aside, limited."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.reader import HistoryDataset
from data.schema import BAD_ROWS
from tests.tools.conversion_cases import digest, run, some_events, write


def test_bad_rows_are_counted_by_reason(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    good = "".join(f"{user},{item},{item}\n" for user in range(2) for item in range(30_000))
    bad = ",1,1\n1,,1\n1,1,\nx,1,1\n1,x,1\n1,1,x\n1,1\n1,1,1,1\n"
    log.write_text("user_id,item_id,timestamp\n" + good + bad)
    with pytest.raises(
        InputError, match=r"8 of 60,008 rows are bad .*2 malformed_line.*max_bad_rows=7"
    ):
        run(log, tmp_path / "out", max_bad_rows=7)
    counts = run(log, tmp_path / "out", max_bad_rows=8).manifest.counts
    assert counts["events_bad"] == 8
    assert counts["events"] == 60_000
    for reason in ("null_user", "null_item", "null_time", "unreadable_user", "unreadable_time"):
        assert counts[f"events_bad_{reason}"] == 1

    times = pa.array([1.0, float("nan"), float("inf"), None])
    ids = pa.array([1, 1, 1, 1])
    pq.write_table(
        pa.table([ids, ids, times], ["user_id", "item_id", "timestamp"]), tmp_path / "f.pq"
    )
    with pytest.raises(InputError, match=r"3 of 4 rows are bad .1 null_time, 2 unreadable_time"):
        run(tmp_path / "f.pq", tmp_path / "out2")
    run(tmp_path / "f.pq", tmp_path / "out2", where="isfinite(timestamp)")


def bad_rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / BAD_ROWS).to_pylist()


def test_bad_rows_are_written_aside(tmp_path: Path) -> None:
    """As they stand in the log, each with its file; the data set is read without them."""
    logs = {
        "day=1/a.csv": "user_id,item_id,timestamp\n1,1,1\nx,2,7\n1,5,2\n,3,\n",
        "day=2/b.csv": "user_id,item_id,timestamp\n1,7,1\n1,2\n1,8,noon\n2,,3\n",
    }
    for name, text in logs.items():
        (tmp_path / "log" / name).parent.mkdir(parents=True)
        (tmp_path / "log" / name).write_text(text)
    types = {"csv_types": dict.fromkeys(("user_id", "item_id", "timestamp"), "BIGINT")}
    made = run(tmp_path / "log", tmp_path / "out", max_bad_rows=5, **types).manifest
    nothing = {"line": None, "text": None}
    cells = {"user": None, "item": None, "time": None}
    assert bad_rows(tmp_path / "out") == [
        {"reason": "unreadable_user", "file": "day=1/a.csv", "user": "x", "item": "2", "time": "7"}
        | nothing,
        {"reason": "null_user", "file": "day=1/a.csv", "user": None, "item": "3", "time": None}
        | nothing,
        {"reason": "unreadable_time", "file": "day=2/b.csv", "user": "1", "item": "8"}
        | {"time": "noon"}
        | nothing,
        {"reason": "null_item", "file": "day=2/b.csv", "user": "2", "item": None, "time": "3"}
        | nothing,
        {"reason": "malformed_line", "file": "day=2/b.csv", "line": 3, "text": "1,2"} | cells,
    ]
    assert made.bad_rows is not None
    assert made.bad_rows.rows == made.counts["events_bad"] == 5
    assert len(HistoryDataset(tmp_path / "out")) == 1
    assert made.counts["events"] == 3

    again = run(tmp_path / "log", tmp_path / "again", max_bad_rows=9, threads=1, **types).manifest
    assert again.bad_rows == made.bad_rows
    clean = run(tmp_path / "log/day=1", tmp_path / "clean", where="item_id IN (1, 5)", **types)
    assert clean.manifest.bad_rows is None
    assert not (tmp_path / "clean" / BAD_ROWS).exists()


def test_bad_rows_of_parquet_show_what_stands_there(tmp_path: Path) -> None:
    columns = {
        "user_id": pa.array([1, 2**63 + 5, 3, None], pa.uint64()),
        "item_id": pa.array(["a", "b", None, "c"]),
        "timestamp": pa.array([1.5, 2.5, 3.5, float("nan")]),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    run(tmp_path / "log.parquet", tmp_path / "out", max_bad_rows=3)
    rows = bad_rows(tmp_path / "out")
    assert [row["reason"] for row in rows] == ["unreadable_user", "null_item", "null_user"]
    assert [row["user"] for row in rows] == [str(2**63 + 5), "3", None]
    assert [row["time"] for row in rows] == ["2.5", "3.5", "nan"]
    assert {row["file"] for row in rows} == {"log.parquet"}


def test_too_many_bad_rows_leave_what_was_there(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n1,1,1\n")
    run(log, tmp_path / "out")
    before = digest(tmp_path / "out")
    log.write_text("user_id,item_id,timestamp\n1,1,1\n,1,1\n")
    with pytest.raises(
        InputError, match=r"1 of 2 rows are bad .1 null_user., above max_bad_rows=0, .* where=…, or"
    ):
        run(log, tmp_path / "out", overwrite=True)
    assert digest(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "out"]


def test_a_file_with_a_null_is_named(tmp_path: Path) -> None:
    for name, user in (("a", "1"), ("b", ""), ("c", "1")):
        (tmp_path / f"{name}.csv").write_text(f"user_id,item_id,timestamp\n{user},1,1\n")
    with pytest.raises(InputError, match=r"1 null_user.*max_bad_rows=0, for example in .*b\.csv;"):
        run(tmp_path, tmp_path / "out")


def test_an_unreadable_value_is_shown(tmp_path: Path) -> None:
    events = [event | {"time": f"17{event['time']:08}"} for event in some_events(1, 50)]
    log = write(tmp_path / "log.parquet", events)
    message = r"columns.time=timestamp is VARCHAR and has for example '17\d{8}'; cast the column"
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out")
    pa.csv.write_csv(pq.read_table(log), tmp_path / "log.csv")
    with pytest.raises(InputError, match=r"'17\d{8}'.*'csv.types={timestamp: BIGINT}'"):
        run(tmp_path / "log.csv", tmp_path / "out", csv_types={"timestamp": "VARCHAR"})
    run(tmp_path / "log.csv", tmp_path / "out", csv_types={"timestamp": "BIGINT"})
