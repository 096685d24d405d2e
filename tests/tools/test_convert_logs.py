"""The converter against a slow transcription, and options that cannot be used."""

import datetime
import itertools
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from configs.command import plain_config
from data import grouping
from data.engine import open_engine
from data.errors import InputError
from data.events import LocalEvents
from data.grouping import group_users, stream_users, use_vocabulary
from data.k_core import count_events
from data.log_files import find_files
from data.log_query import LogRules
from data.logs import drop_repeats, read_events
from data.schema import RESERVED_ROWS, VOCABULARY, Manifest
from data.split import Split
from data.vocabulary import Vocabulary
from tests.tools.conversion_cases import (
    LEAVE_ONE_OUT,
    ROOT,
    as_events,
    check,
    digest,
    histories,
    run,
    some_events,
    write,
)
from tests.tools.reference_conversion import reference
from tools.convert_config import ConvertConfig


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write(tmp_path / "log.parquet", some_events(3, 200))


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


def test_another_log_is_grouped_with_the_vocabulary(tmp_path: Path) -> None:
    """What scoring does with a raw log: same rules, same order, unknown items left out."""
    events = some_events(4, 500)
    log = write(tmp_path / "log.parquet", events)
    run(log, tmp_path / "out", min_item_events=3, deduplicate="consecutive")
    rules = LogRules.from_options(Manifest.read(tmp_path / "out").options)
    (tmp_path / "engine").mkdir()
    with open_engine(tmp_path / "engine", "1GB") as connection:
        logged = LocalEvents(connection)
        read_events(logged, find_files(str(log)), rules)
        drop_repeats(logged, rules)
        use_vocabulary(logged, tmp_path / "out")
        count_events(logged, "user_id", Split(), "SEMI JOIN vocabulary USING (item_id)")
        group_users(connection, 2, Split())
        parts = list(stream_users(logged, (), 100))
    assert {shard for shard, _ in parts} == {0, 1}
    found = pa.concat_tables(table for _, table in parts).sort_by("user_id")
    expected = histories(tmp_path / "out").sort_by("user_id")
    assert found["items"].to_pylist() == expected["items"].to_pylist()
    with open_engine(tmp_path, "1GB") as connection:
        strings = write(tmp_path / "strings.parquet", some_events(4, 50, str))
        logged = LocalEvents(connection)
        read_events(logged, find_files(str(strings)), rules)
        with pytest.raises(InputError, match="item ids are VARCHAR in the log but BIGINT"):
            use_vocabulary(logged, tmp_path / "out")
        with pytest.raises(InputError, match=r"none/vocabulary\.parquet does not exist; make a"):
            use_vocabulary(logged, tmp_path / "none")


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
        ({"features": ("price", "price")}, "columns.features names 'price' twice; name it once"),
        ({"overwrite": "yes"}, "overwrite=yes must be true or false"),
        ({"engine": "flink"}, r"engine=flink is unknown; choose duckdb \| spark"),
        ({"spark_master": "yarn"}, "spark.master and spark.conf are for engine=spark, not duckdb"),
        ({"spark_conf": {"a": "b"}}, "spark.master and spark.conf are for engine=spark"),
        ({"engine": "spark", "append": Path("a")}, "append=a is for engine=duckdb; .*vocabulary=a"),
    ],
)
def test_option_errors(log: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.parquet"]


def test_features_are_a_list() -> None:
    options = plain_config("convert", ["input=L", "output=D", "columns.features=price"])
    with pytest.raises(InputError, match=r"features=price is no list; write \[price\]"):
        ConvertConfig.from_dict(options)


def test_threads_are_bounded() -> None:
    """The options alone: an engine with so many could stall the machine."""
    options = plain_config("convert", ["input=L", "output=D", "threads=100000"])
    with pytest.raises(InputError, match="threads=100000 is above 1,024; give one a core or so"):
        ConvertConfig.from_dict(options)


def test_options_of_spark_are_its_own_names() -> None:
    """Dots of the command line nest, and Spark's true is lower case."""
    given = ["spark.conf.spark.ui.enabled=true", "spark.conf={spark.executor.memory: 8g}"]
    given += ["input=L", "output=D", "engine=spark", "spark.conf.spark.cores.max=4"]
    config = ConvertConfig.from_dict(plain_config("convert", given))
    expected = {"spark.ui.enabled": "true", "spark.executor.memory": "8g", "spark.cores.max": "4"}
    assert config.spark_conf == expected
    assert config.spark_master is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"item": "price"}, "columns.item=price has type DOUBLE; ids are .* so cast them"),
        ({"time": "flag"}, "columns.time=flag has type BOOLEAN; times are .* so cast them"),
        ({"features": ("tags",)}, r"features=tags has type BIGINT\[\]; .* so leave it out"),
    ],
)
def test_types_that_cannot_be_used(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    extra: dict[str, list[Any]] = {"price": [0.5] * 9, "flag": [True] * 9, "tags": [[1]] * 9}
    log = write(tmp_path / "log.parquet", some_events(1, 9), **extra)
    with pytest.raises(InputError, match=message):
        run(log, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_memory_that_is_too_small_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match=r"memory_limit=20MB or the disk .*; raise the limit or fr"),
        open_engine(tmp_path, "20MB") as connection,
    ):
        connection.execute("SELECT list(range) FROM range(10_000_000)")


def test_a_row_group_beyond_its_lists_is_refused(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "MOST_EVENTS", 20)
    with pytest.raises(InputError, match=r"a row group above 20 events; .*row_group_events.*where"):
        run(log, tmp_path / "out", row_group_events=50)
    assert not (tmp_path / "out").exists()


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
