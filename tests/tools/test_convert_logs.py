"""The converter against a slow transcription, and everything that users can do wrong."""

import datetime
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data.engine import open_engine
from data.errors import InputError
from data.grouping import group_users, stream_users, use_vocabulary
from data.log_files import find_files
from data.log_query import LogRules
from data.logs import read_events
from data.output_folder import LOCK
from data.schema import HISTORIES, MANIFEST, RESERVED_ROWS, VOCABULARY, Manifest
from data.split import Split
from data.vocabulary import Vocabulary
from tests.tools.reference_conversion import Event, reference
from tools.convert_logs import Conversion, ConvertConfig, convert

ROOT = Path(__file__).parents[2]
LEAVE_ONE_OUT = {"kind": "leave_one_out"}


def run(log: Any, output: Path, split: dict[str, Any] | None = None, **more: Any) -> Conversion:
    rules = {name: more.pop(name) for name in list(more) if name in LogRules.__annotations__}
    options = {"min_user_events": 1, "min_item_events": 1} | more
    inputs = [str(one) for one in log] if isinstance(log, list) else str(log)
    return convert(
        ConvertConfig(inputs, output, LogRules(**rules), split or LEAVE_ONE_OUT, **options)
    )


def write(path: Path, events: list[Event], **extra: list[Any]) -> Path:
    columns = {
        "user_id": [event["user"] for event in events],
        "item_id": [event["item"] for event in events],
        "timestamp": [event["time"] for event in events],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | extra), path)
    return path


def some_events(seed: int, count: int, kind: type = int, times: int = 30) -> list[Event]:
    """A random log with many ties, repeats, rare users and rare items."""
    draw = random.Random(seed)
    events = []
    for seq in range(count):
        user, item = int(draw.paretovariate(0.6)) % 40, int(draw.paretovariate(0.5)) % 60
        if kind is str:
            user, item = f"u{user}ü", f"i{item}"
        events.append({"user": user, "item": item, "time": draw.randrange(times), "seq": seq})
    return events


def histories(folder: Path) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(path) for path in sorted((folder / HISTORIES).iterdir())]
    )


def check(folder: Path, expected: dict[str, Any]) -> None:
    table = histories(folder)
    found = {
        row["user_id"]: (row["items"], row["timestamps"], row["n_train"], row["n_validation"])
        for row in table.to_pylist()
    }
    assert len(found) == table.num_rows
    assert found == expected["users"]
    vocabulary = pq.read_table(folder / VOCABULARY).to_pylist()
    assert [(row["item_id"], row["count"]) for row in vocabulary] == expected["vocabulary"]
    assert [row["item"] for row in vocabulary] == list(range(8, 8 + len(vocabulary)))


def digest(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("deduplicate", ["none", "consecutive", "user_item"])
@pytest.mark.parametrize("bounds", [None, (18, 24)])
def test_equals_the_slow_transcription(
    tmp_path: Path, seed: int, deduplicate: str, bounds: tuple[int, int] | None
) -> None:
    events = some_events(seed, 600, kind=str if seed % 2 else int)
    cut = random.Random(seed).randrange(600)
    write(tmp_path / "log/a.parquet", events[:cut])
    write(tmp_path / "log/b/c.parquet", events[cut:])
    split = LEAVE_ONE_OUT
    if bounds:
        split = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}
    options = {"deduplicate": deduplicate, "shards": 3, "row_group_events": 50}
    minima = {"min_user_events": 3, "min_item_events": 3}
    made = run(tmp_path / "log", tmp_path / "out", split, **options, **minima)
    expected = reference(events, 3, 3, deduplicate, bounds)
    check(tmp_path / "out", expected)
    users = expected["users"].values()
    counts = made.manifest.counts
    assert counts["events"] == sum(len(items) for items, *_ in users)
    assert counts["train_events"] == sum(n_train for *_, n_train, _ in users)
    assert counts["validation_events"] == sum(n_validation for *_, n_validation in users)
    pairs = [pair for _, times, *_ in users for pair in itertools.pairwise(times)]
    assert counts["tied_events"] == sum(first == second for first, second in pairs)
    dropped = ("filtered", "bad", "duplicate", "below_minimum")
    assert counts["events_read"] == 600
    assert 600 - sum(counts[f"events_{name}"] for name in dropped) == counts["events"]
    assert made.manifest.longest_history == max(len(items) for items, *_ in users)
    assert counts["users_without_training"] == sum(n_train == 0 for *_, n_train, _ in users)
    unseen = [item for item, count in expected["vocabulary"] if count == 0]
    assert counts["items_without_training"] == len(unseen)
    if bounds:  # items without a training event stand behind all others
        assert [item for item, _ in expected["vocabulary"]][-len(unseen) or 10**9 :] == unseen


def test_command_line(tmp_path: Path) -> None:
    """As a user does it: Hive partitions, quoting, a filter on the partition, a feature."""
    events = some_events(1, 300)
    for day in (1, 2, 3):
        part = [event | {"seq": 0} for event in events[day * 100 - 100 : day * 100]]
        path = tmp_path / f"log/day=2024-01-0{day}/x.parquet"
        write(path, part, price=[event["item"] / 2 for event in part])
    output = tmp_path / "out"
    arguments = [
        f'input="{tmp_path}/log/day=*/*.parquet"',
        f"output={output}",
        "where=\"day >= DATE '2024-01-02' and price < 20\"",
        "columns.features=[price,day]",
        "min_user_events=2",
        "min_item_events=1",
        "split=temporal",
        "split.validation_from=18",
        "split.test_from=24",
    ]
    command = [sys.executable, "-m", "tools.convert_logs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dropped by where   1" in done.stdout
    assert "ties in time" in done.stdout
    kept = [event for event in events[100:] if event["item"] < 40]
    check(output, reference(kept, 2, 1, bounds=(18, 24)))
    raw = pq.read_table(output / VOCABULARY)["item_id"].to_pylist()
    for row in histories(output).to_pylist():
        assert row["price"] == [raw[item - RESERVED_ROWS] / 2 for item in row["items"]]
        assert set(row["day"]) <= {datetime.date(2024, 1, 2), datetime.date(2024, 1, 3)}
    options = Manifest.read(output).options
    assert LogRules.from_options(options).where == "day >= DATE '2024-01-02' and price < 20"
    assert LogRules.from_options(options).features == ("price", "day")

    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.strip().count("\n") == 0
    assert "already exists" in again.stderr


def test_bytes_do_not_depend_on_threads_or_the_machine(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    size = 400_000  # above three of the engine's row groups
    log = {"user_id": rng.zipf(1.5, size) % 5_000, "item_id": rng.zipf(1.3, size) % 3_000}
    log["timestamp"] = rng.integers(0, 500, size)
    (tmp_path / "log").mkdir()
    for part in range(3):
        rows = slice(part * size // 3, (part + 1) * size // 3)
        table = pa.table({name: values[rows] for name, values in log.items()})
        pq.write_table(table, tmp_path / f"log/{part}.parquet", row_group_size=20_000)
    made = []
    for threads, memory_limit in ((1, "2GB"), (4, "2GB"), (2, "300MB")):
        output = tmp_path / f"out{threads}"
        options = {"min_user_events": 5, "min_item_events": 5, "deduplicate": "consecutive"}
        run(tmp_path / "log", output, threads=threads, memory_limit=memory_limit, **options)
        made.append(digest(output))
    assert made[0] == made[1] == made[2]

    run(tmp_path / "log", tmp_path / "all")  # no filter: a stable sort is the whole truth
    order = np.lexsort((log["timestamp"], log["user_id"]))
    items = Vocabulary.read(tmp_path / "all").rows(pa.array(log["item_id"][order]))
    table = histories(tmp_path / "all").sort_by("user_id")
    assert np.array_equal(table["items"].combine_chunks().flatten().to_numpy(), items)
    assert np.array_equal(table["user_id"].to_numpy(), np.unique(log["user_id"]))


def as_events(pairs: list[tuple[int, int]]) -> list[Event]:
    return [
        {"user": user, "item": item, "time": seq, "seq": seq}
        for seq, (user, item) in enumerate(pairs)
    ]


def test_k_core_runs_to_the_fixpoint(tmp_path: Path) -> None:
    """A chain of users and items that falls apart from its ends, a link a round."""
    chain = [(user, item) for user in range(20) for item in (user, user + 1)]
    block = [(user, item) for user in (100, 101) for item in (200, 201)]
    events = as_events(chain + block)
    log = write(tmp_path / "log.parquet", events)
    run(log, tmp_path / "out", min_user_events=2, min_item_events=2)
    check(tmp_path / "out", reference(events, 2, 2))
    assert histories(tmp_path / "out")["user_id"].to_pylist() == [100, 101]


def test_users_with_fewer_than_three_events_only_train(tmp_path: Path) -> None:
    events = as_events([(user, item) for user in (1, 2, 3, 4) for item in range(user)])
    run(write(tmp_path / "log.parquet", events), tmp_path / "out")
    check(tmp_path / "out", reference(events, 1, 1))
    rows = histories(tmp_path / "out").sort_by("user_id").to_pylist()
    assert [(row["n_train"], row["n_validation"]) for row in rows] == [
        (1, 0),
        (2, 0),
        (1, 1),
        (2, 1),
    ]


@pytest.mark.parametrize("row_group_events", [60, 100_000])
def test_shards_are_balanced_and_row_groups_bounded(tmp_path: Path, row_group_events: int) -> None:
    log = write(tmp_path / "log.parquet", some_events(5, 2_000))
    made = run(log, tmp_path / "out", shards=4, row_group_events=row_group_events)
    longest = made.manifest.longest_history
    sizes = []
    for one in made.manifest.histories:
        file = pq.ParquetFile(tmp_path / "out" / one.path)
        lengths = [
            [len(items) for items in file.read_row_group(group)["items"].to_pylist()]
            for group in range(file.num_row_groups)
        ]
        assert all(sum(group) <= row_group_events or len(group) == 1 for group in lengths)
        sizes.append(sum(map(sum, lengths)))
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= longest


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


def test_another_log_is_grouped_with_the_vocabulary(tmp_path: Path) -> None:
    """What scoring does with a raw log: same rules, same order, unknown items left out."""
    events = some_events(4, 500)
    log = write(tmp_path / "log.parquet", events)
    run(log, tmp_path / "out", min_item_events=3, deduplicate="consecutive")
    rules = LogRules.from_options(Manifest.read(tmp_path / "out").options)
    (tmp_path / "engine").mkdir()
    with open_engine(tmp_path / "engine", "1GB") as connection:
        read_events(connection, find_files(str(log)), rules)
        use_vocabulary(connection, tmp_path / "out")
        group_users(connection, 2, Split())
        parts = list(stream_users(connection, (), 100))
    assert {shard for shard, _ in parts} == {0, 1}
    found = pa.concat_tables(table for _, table in parts).sort_by("user_id")
    expected = histories(tmp_path / "out").sort_by("user_id")
    assert found["items"].to_pylist() == expected["items"].to_pylist()
    with open_engine(tmp_path, "1GB") as connection:
        strings = write(tmp_path / "strings.parquet", some_events(4, 50, str))
        read_events(connection, find_files(str(strings)), rules)
        with pytest.raises(InputError, match="item ids are VARCHAR in the log but BIGINT"):
            use_vocabulary(connection, tmp_path / "out")


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


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.parquet", some_events(3, 200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": "uid"}, "columns.user=uid is not a column.*user_id, item_id, timestamp"),
        ({"features": ("color",)}, "columns.features=color is not a column"),
        ({"features": ("items",)}, "columns.features has 'items'"),
        ({"where": "nothing > 1"}, "where=nothing > 1 is no SQL condition.*nothing"),
        ({"where": "true) or (true"}, "is no SQL condition"),
        ({"where": "item_id < 0"}, "no event is left of 200 rows"),
        ({"min_user_events": 500}, "nothing is left.*500 training events"),
        ({"min_user_events": 0}, "min_user_events=0 must be a whole number, 1 or more"),
        ({"deduplicate": "all"}, "deduplicate=all is unknown"),
        ({"memory_limit": "lots"}, "memory_limit=lots"),
        ({"memory_limit": "1MB"}, "memory_limit=1MB"),
        ({"csv_types": {"user_id": "NUMBER"}}, "csv.types"),
        ({"item": "user_id"}, "columns.user and columns.item are both user_id"),
        ({"time": "item_id"}, "columns.item and columns.time are both item_id"),
    ],
)
def test_option_errors(log: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet"]


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (("noon", 9), "split.validation_from=noon is no BIGINT"),
        ((5.5, 9), "split.validation_from=5.5 is no BIGINT"),
        ((9, 5), "lies after split.test_from=5"),
        ((-5, 9), "leaves no event before it; the log runs from 0 to 29"),
        ((100, 100), "leaves no event after it"),
    ],
)
def test_split_errors(log: Path, tmp_path: Path, bounds: tuple[Any, Any], message: str) -> None:
    split = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out", split)


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
    write(tmp_path / "hive/a=1/x.parquet", some_events(1, 5))
    with pytest.raises(InputError, match="Hive partitions"):
        run([tmp_path / "hive", log], out)
    for empty in ("", " ", ["", str(log)]):
        with pytest.raises(InputError, match="input is empty"):
            run(empty, out)
    with pytest.raises(InputError, match=r"split.kind=temporal has no bounds"):
        run(log, out, {"kind": "temporal"})
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


def test_damaged_parquet_is_named(log: Path, tmp_path: Path) -> None:
    content = log.read_bytes()
    for name, damaged in (
        ("cut", content[:-30]),
        ("mid", content[:4] + b"\xff" * 200 + content[204:]),
    ):
        (tmp_path / f"{name}.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match=rf"{name}.parquet is damaged or unreadable"):
            run([log, tmp_path / f"{name}.parquet"], tmp_path / "out")


def test_output_is_replaced_only_when_it_is_ours(log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(log, out)
    first = digest(out)
    with pytest.raises(InputError, match=r"already exists.*overwrite=true"):
        run(log, out)
    with pytest.raises(InputError, match="lies after"):  # a failed run leaves the old one whole
        run(log, out, {"kind": "temporal", "validation_from": 9, "test_from": 5}, overwrite=True)
    assert digest(out) == first
    run(log, out, overwrite=True, min_user_events=4)
    assert digest(out) != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds 'notes.txt'"):
        run(log, out, overwrite=True)
    with pytest.raises(InputError, match=r"already exists; remove it or choose another name$"):
        run(log, out)
    assert (out / MANIFEST).exists()
    with pytest.raises(InputError, match="cannot write"):
        run(log, tmp_path / "log.parquet/out")


def test_killed_run_leaves_nothing_finished_and_is_cleaned_up(tmp_path: Path, log: Path) -> None:
    out, unfinished = tmp_path / "out", tmp_path / ".out.unfinished"
    script = (
        "import os, sys\nfrom tests.tools import test_convert_logs as t\n"
        "import tools.convert_logs as c\n"
        "c.write_vocabulary = lambda *_: os.kill(os.getpid(), 9)\n"
        f"t.run({str(log)!r}, t.Path({str(out)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == -9, done.stderr
    assert unfinished.exists()
    assert not out.exists()
    run(log, out)
    assert Manifest.read(out).counts["events"] == 200
    assert not unfinished.exists()
    unfinished.mkdir()
    (unfinished / "precious.txt").write_text("not ours")
    with pytest.raises(InputError, match="in the way"):
        run(log, out, overwrite=True)
    assert (unfinished / "precious.txt").exists()


def test_two_runs_at_once_are_kept_apart(tmp_path: Path, log: Path) -> None:
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    with (unfinished / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing"):
            run(log, tmp_path / "out")
    run(log, tmp_path / "out")


def test_manifest_hashes_are_those_of_the_files(log: Path, tmp_path: Path) -> None:
    made = run(log, tmp_path / "out").manifest
    assert Manifest.read(tmp_path / "out") == made
    for one in [made.vocabulary, *made.histories]:
        content = (tmp_path / "out" / one.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one.bytes, one.sha256)
    text = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert str(tmp_path) not in json.dumps(text)
    assert os.listdir(tmp_path / "out" / HISTORIES) == ["part-00000.parquet"]
    counted = Counter(event["item"] for event in some_events(3, 200))
    assert len(counted) == made.table_rows - RESERVED_ROWS
