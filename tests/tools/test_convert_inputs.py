"""Logs of every layout and type, and those that cannot be read."""

import datetime
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.conversion import HistoryCounts, write_histories
from data.errors import InputError
from data.vocabulary import Vocabulary
from tests.tools.conversion_cases import (
    digest,
    histories,
    run,
    some_events,
    write,
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.parquet", some_events(3, 200))


@pytest.mark.parametrize(
    "first", [1.5, datetime.datetime(2024, 1, 1, 12), datetime.date(2024, 1, 1)]
)
def test_other_kinds_of_time(tmp_path: Path, first: Any) -> None:
    step = 0.25 if isinstance(first, float) else datetime.timedelta(days=2)
    events = [
        {"user": user, "item": item, "time": first + step * item, "seq": 0}
        for user in range(3)
        for item in (5, 1, 4, 0, 2)
    ]
    log = write(tmp_path / "log.parquet", events)
    bounds = [str(first + step * place) for place in (2, 5)]
    split = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}
    run(log, tmp_path / "out", split)
    for row in histories(tmp_path / "out").to_pylist():
        assert row["timestamps"] == sorted(row["timestamps"])
        assert (row["n_train"], row["n_validation"], len(row["items"])) == (2, 2, 5)


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_timestamps_keep_their_unit(tmp_path: Path, unit: str, zone: str | None) -> None:
    log = write(tmp_path / "log.parquet", some_events(3, 100))
    table = pq.read_table(log)
    times = table["timestamp"].cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))
    pq.write_table(table.set_column(2, "timestamp", times), tmp_path / "times.parquet")
    run(log, tmp_path / "numbers")
    run(tmp_path / "times.parquet", tmp_path / "times")
    numbers, stamps = histories(tmp_path / "numbers"), histories(tmp_path / "times")
    assert numbers["items"].equals(stamps["items"])
    kind = stamps["timestamps"].type.value_type
    assert pa.types.is_timestamp(kind)
    assert (kind.tz is None) == (zone is None)


def test_csv_equals_parquet(tmp_path: Path) -> None:
    events = some_events(2, 300)
    log = write(tmp_path / "log.parquet", events)
    table = pq.read_table(log)
    pa.csv.write_csv(table, tmp_path / "log.csv")
    text = (tmp_path / "log.csv").read_text()
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "log.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "bars.csv").write_text(text.replace(",", "|"))
    run(log, tmp_path / "out", where="item_id < 50")
    expected = digest(tmp_path / "out")
    for name, delimiter in (("log.csv", None), ("log.csv.gz", None), ("log.tsv", None)):
        made = run(
            tmp_path / name, tmp_path / name[-3:], where="item_id < 50", csv_delimiter=delimiter
        )
        assert made.manifest.counts["events_read"] == 300
        assert digest(tmp_path / name[-3:]) == expected
    run(tmp_path / "bars.csv", tmp_path / "bars", where="item_id < 50", csv_delimiter="|")
    assert histories(tmp_path / "bars").equals(histories(tmp_path / "out"))


def test_csv_types_keep_leading_zeros(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("user_id,item_id,timestamp\n1,007,1\n1,7,2\n")
    run(log, tmp_path / "out", csv_types={"item_id": "VARCHAR"})
    assert Vocabulary.read(tmp_path / "out").item_ids.to_pylist() == ["007", "7"]


def test_files_in_path_order_break_ties(tmp_path: Path) -> None:
    for name, item in (("b[1]*.parquet", 2), ("a.parquet", 1), ("c.pq", 3), ("_d.parquet", 4)):
        write(tmp_path / "log" / name, [{"user": 1, "item": item, "time": 0, "seq": 0}])
    (tmp_path / "log/notes.txt").write_text("not a log")
    run([tmp_path / "log/c.pq", tmp_path / "log"], tmp_path / "out")
    vocabulary = Vocabulary.read(tmp_path / "out")
    rows = np.array(histories(tmp_path / "out")["items"][0].as_py())
    assert vocabulary.raw(rows).to_pylist() == [1, 2, 3]


def test_columns_and_integer_widths_are_united_over_files(tmp_path: Path) -> None:
    write(tmp_path / "log/a.parquet", some_events(1, 50))
    small = pq.read_table(tmp_path / "log/a.parquet")
    small = small.cast(pa.schema([(name, pa.uint16()) for name in small.column_names]))
    pq.write_table(
        small.append_column("extra", pa.nulls(50, pa.string())), tmp_path / "log/a.parquet"
    )
    write(tmp_path / "log/b.parquet", [{"user": 2**40, "item": 2**50, "time": 1, "seq": 0}])
    run(tmp_path / "log", tmp_path / "out", features=("extra",))
    assert 2**40 in histories(tmp_path / "out")["user_id"].to_pylist()


def test_input_errors(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no file matches"):
        run(tmp_path / "*.pq", out)
    with pytest.raises(InputError, match="is a URL, and only files are read"):
        run("s3://bucket/log.parquet", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no .parquet"):
        run(tmp_path / "empty", out)
    with pytest.raises(InputError, match="the log is empty"):
        run(write(tmp_path / "none/x.parquet", some_events(1, 1)[:0]), out)
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    with pytest.raises(InputError, match="mixes Parquet and CSV"):
        run([log, tmp_path / "log.csv"], out)
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match=r"other.parquet has no column user_id, only item_id"):
        run([log, tmp_path / "other.parquet"], out)
    text = write(tmp_path / "text.parquet", some_events(1, 5, str))
    with pytest.raises(InputError, match=r"_id is int64 in .*log.* and text in another file; cast"):
        run([log, text], out)
    write(tmp_path / "hive/a=1/x.parquet", some_events(1, 5))
    with pytest.raises(InputError, match="Hive partitions"):
        run([tmp_path / "hive", log], out)
    for empty in ("", " ", ["", str(log)]):
        with pytest.raises(InputError, match="input is empty"):
            run(empty, out)
    with pytest.raises(InputError, match=r"input names no file; give input=PATH"):
        run([], out)
    (tmp_path / "log.json").touch()
    with pytest.raises(InputError, match=r"log\.json is not known; .* ends in \.parquet"):
        run(tmp_path / "log.json", out)
    with pytest.raises(InputError, match=r"split.kind=temporal has no bounds"):
        run(log, out, {"kind": "temporal"})
    with pytest.raises(InputError, match=r"split\.kind=random is unknown; choose split=leave_one"):
        run(log, out, {"kind": "random"})
    assert not out.exists()


def test_partitions_begin_at_the_input(tmp_path: Path) -> None:
    """A folder above the input says where the log lies; one at or below it is a column."""
    top = tmp_path / "user_id=7"
    plain = write(top / "plain/x.parquet", some_events(1, 50))
    users = {event["user"] for event in some_events(1, 50)}
    for number, one in enumerate((plain, top / "plain", top / "plain/*.parquet", top / "*/x.*")):
        if number == 3:  # the first wildcard stands in the folder user_id=7
            with pytest.raises(InputError, match=r"user_id=.* would replace the column user_id"):
                run(one, tmp_path / "out")
            continue
        run(one, tmp_path / f"out{number}")
        assert set(histories(tmp_path / f"out{number}")["user_id"].to_pylist()) == users
    with pytest.raises(InputError, match=r"user_id=.* would replace the column user_id"):
        run(top, tmp_path / "out")

    for day in (1, 2):
        for above in ("user_id=7/hive", "ver=3/hive", "day=9/hive", "plain"):
            write(tmp_path / above / f"day={day}/x.parquet", some_events(day, 50))
    for log in (tmp_path / "plain/day=1/x.parquet", tmp_path / "plain/day=1"):
        made = run(log, tmp_path / f"{log.name}-1", where="day = 1").manifest.counts
        assert made["events"] == 50
    for number, log in enumerate((tmp_path / "ver=3/hive", tmp_path / "ver=3/hive/day=*/*")):
        counts = run(log, tmp_path / f"hive{number}", where="day = 2").manifest.counts
        assert (counts["events"], counts["events_read"]) == (50, 100)
        with pytest.raises(InputError, match=r"columns.features=ver is not a column"):
            run(log, tmp_path / "out", features=("ver",))
    with pytest.raises(InputError, match=r"user_id=… above the input.*the column user_id"):
        run(tmp_path / "user_id=7/hive", tmp_path / "out")
    with pytest.raises(InputError, match=r"day=… above the input.*the partition day"):
        run(tmp_path / "day=9/hive", tmp_path / "out")
    (tmp_path / "csv/item_id=1").mkdir(parents=True)
    (tmp_path / "csv/item_id=1/x.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    with pytest.raises(InputError, match=r"item_id=.* would replace the column item_id"):
        run(tmp_path / "csv", tmp_path / "out")


def test_csv_that_cannot_be_read_is_explained(tmp_path: Path) -> None:
    header, log = "user_id,item_id,timestamp\n", tmp_path / "log/b.csv"
    log.parent.mkdir()
    log.write_text(header + "1,2,3\n" * 9 + '1,"2,3\n' + "1,2,3\n" * 9)
    with pytest.raises(InputError, match=r"cannot read .*b\.csv as CSV: a quote is not closed"):
        run(log, tmp_path / "out")
    log.write_text(header + "1,2,3\n" * 30_000 + '1,"2,3\n' + "1,2,3\n" * 9)
    with pytest.raises(InputError, match=r"for example line 30002 \(.*quote"):
        run(log, tmp_path / "out")
    log.write_text("")
    with pytest.raises(InputError, match=r"the log is empty: .*b\.csv has not one byte"):
        run(log, tmp_path / "out")
    (tmp_path / "log/c.csv").write_text(header + "1,2,3\n")  # behind an empty part, as Spark has
    assert run(tmp_path / "log", tmp_path / "out").manifest.counts["events_read"] == 1


def test_damaged_parquet_is_named(log: Path, tmp_path: Path) -> None:
    content = log.read_bytes()
    for name, damaged in (
        ("cut", content[:-30]),
        ("mid", content[:4] + b"\xff" * 200 + content[204:]),
    ):
        (tmp_path / f"{name}.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{name}.parquet is damaged or unreadable"):
            run([log, tmp_path / f"{name}.parquet"], tmp_path / "out")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_named_or_harmless(
    log: Path, tmp_path: Path, share: float, bit: int, cut: bool
) -> None:
    """A log has no checksum to tell a flipped value by, but nothing else than InputError comes."""
    content = log.read_bytes()
    place = int(share * len(content))
    flipped = bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content[:place] + (b"" if cut else flipped))
    message = ""
    try:
        run(damaged, tmp_path / "out", overwrite=True, max_bad_rows=200)
    except InputError as error:
        message = str(error)
    assert not cut or f"{damaged} is damaged" in message
    assert "\n" not in message


def test_a_null_that_statistics_deny_is_damage(tmp_path: Path) -> None:
    """A flipped bit in a file's statistics: the engine then looks for no null there."""
    columns = {"items": [[8, 9]], "timestamps": [[1, None]], "n_train": [2], "n_validation": [0]}
    table = pa.table({"user_id": ["a"], **columns})
    counts = HistoryCounts(np.zeros(12, np.int64))
    with pytest.raises(InputError, match=r"timestamps hold a null .* that file is damaged"):
        list(write_histories(tmp_path, [(0, table)], counts))
