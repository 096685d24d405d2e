"""engine=spark beside engine=duckdb: every byte of the data set is the same."""

import datetime
import itertools
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data import spark_events, spark_part
from data.errors import InputError
from data.schema import BAD_ROWS, RESIDUAL, Manifest
from data.synthetic import Process
from tests.tools.conversion_cases import digest, run, some_events, write
from tools.make_synthetic import SyntheticConfig, make_log

pytest.importorskip("pyspark", reason="needs pip install '.[spark]'")
if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
    pytest.skip("needs Java", allow_module_level=True)

SPARK: dict[str, Any] = {
    "engine": "spark",
    "spark_master": "local[2]",
    "spark_conf": {
        "spark.sql.shuffle.partitions": "3",
        "spark.sql.adaptive.coalescePartitions.enabled": "false",  # results come in several files
        "spark.ui.enabled": "false",
    },
}
TEMPORAL = {"kind": "temporal", "validation_from": 18, "test_from": 24}


def same(log: Any, folder: Path, **options: Any) -> Manifest:
    """Convert with both engines and compare all files; the manifest of the data set."""
    out = folder / "it's {an} [odd]=1 *output"
    run(log, folder / "duckdb", **options)
    made = run(log, out, **options, **SPARK)
    expected, found = digest(folder / "duckdb"), digest(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    return made.manifest


def odd_log(folder: Path, kind: type) -> list[Path]:
    """Three files of 600 rows: ties within and across them, repeats, nulls, odd features."""
    paths = []
    for number in range(3):
        draw = random.Random(number)
        events = some_events(number, 600, kind, times=30)
        features: dict[str, Any] = {
            "price": [draw.choice([0.0, -0.0, float("nan"), 0.1, None]) for _ in events],
            "text": [f"{number}/{place} é" for place in range(len(events))],
            "small": pa.array([place % 256 for place in range(len(events))], pa.uint8()),
            "day": [datetime.date(2024, 1, 1 + place % 31) for place in range(len(events))],
            "raw": [bytes([place % 256]) for place in range(len(events))],
            "nano": pa.array(range(len(events)), pa.timestamp("ns", "UTC")),
        }
        events[number]["item"] = events[7]["time"] = events[9]["user"] = None
        paths.append(write(folder / "log" / f"{number}.parquet", events, **features))
    return paths


@pytest.mark.parametrize(("kind", "deduplicate"), [(int, "consecutive"), (str, "user_item")])
def test_an_odd_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, deduplicate: str
) -> None:
    monkeypatch.setattr(spark_events, "PART_ROWS", 250)
    manifest = same(
        odd_log(tmp_path, kind),
        tmp_path,
        split=TEMPORAL if kind is int else None,
        features=("price", "text", "small", "day", "raw", "nano"),
        where="small IS NULL OR small % 10 <> 3",
        deduplicate=deduplicate,
        min_user_events=4,
        min_item_events=4,
        max_bad_rows=9,
        shards=3,
        row_group_events=100,
    )
    counts = manifest.counts
    assert counts["events_bad_null_user"] == counts["events_bad_null_item"] == 3
    assert min(counts[f"events_{why}"] for why in ("filtered", "duplicate", "below_minimum")) > 0
    assert min(counts[f"{part}_events"] for part in ("train", "validation", "test")) > 0
    assert len(manifest.histories) == 3
    assert manifest.residual is not None
    assert manifest.bad_rows is not None
    assert (tmp_path / "duckdb" / BAD_ROWS).exists()
    assert (tmp_path / "duckdb" / RESIDUAL).exists()


def test_ties_keep_the_input_order_and_an_older_vocabulary_its_rows(tmp_path: Path) -> None:
    """All of a user's events at one time, over Hive partitions, one of them without a row."""
    for number in range(4):
        place = tmp_path / "log" / f"day=2024-01-0{4 - number}" / f"{number}.parquet"
        write(place, some_events(number, 0 if number == 2 else 300, str, times=1))
    run(tmp_path / "log" / "day=2024-01-03", tmp_path / "old")
    manifest = same(
        tmp_path / "log",
        tmp_path,
        features=("day",),
        vocabulary=tmp_path / "old",
        min_item_events=3,
    )
    counts = manifest.counts
    assert counts["tied_events"] == counts["events"] - counts["users"]
    assert counts["items_new"] > 0


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        (pa.timestamp("ns"), ("1970-01-01 00:00:00.000000018", "1970-01-01 00:00:00.000000024")),
        (pa.timestamp("us", "Europe/Paris"), ("1970-01-01 00:00:00.000018+00", "1970-01-02")),
        (pa.float64(), (17.5, 1e300)),
    ],
    ids=str,
)
def test_times(tmp_path: Path, kind: pa.DataType, bounds: tuple[Any, Any]) -> None:
    events = some_events(5, 400)
    table = pq.read_table(write(tmp_path / "log.parquet", events))
    times = table["timestamp"].cast(kind)
    if kind == pa.float64():
        zeros = itertools.cycle([0.0, -0.0])
        some = [time.as_py() or next(zeros) for time in times[:-1]]
        times = pa.chunked_array([[*some, 1e301]])
    elif kind.tz:
        last = datetime.datetime(1971, 1, 1, tzinfo=datetime.UTC)
        times = pa.chunked_array([[*times[:-1].to_pylist(), last]], kind)
    pq.write_table(table.set_column(2, "timestamp", times), tmp_path / "log.parquet")
    split = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}
    manifest = same(tmp_path / "log.parquet", tmp_path, split=split, min_user_events=3)
    assert min(manifest.counts[f"{part}_events"] for part in ("validation", "test")) > 0


def test_a_log_with_structure(tmp_path: Path) -> None:
    """Many users, a long tail, and a k-core that takes several rounds."""
    process = Process(events=20_000, users=1_500, items=900, seed=3)
    make_log(SyntheticConfig(tmp_path / "log", process, files=3, ids="string"))
    manifest = same(tmp_path / "log", tmp_path, min_user_events=9, min_item_events=9, shards=2)
    assert manifest.counts["events_below_minimum"] > 1_000


def test_a_refused_log_leaves_nothing(tmp_path: Path) -> None:
    log = odd_log(tmp_path, int)
    with pytest.raises(InputError, match=r"9 of 1,800 rows are bad \(3 null_user, .* max_bad_rows"):
        run(log, tmp_path / "out", **SPARK)
    csv = tmp_path / "log.csv"
    csv.write_text("user_id,item_id,timestamp\n1,2,3\n")
    with pytest.raises(InputError, match=r"engine=spark reads Parquet, and .*log\.csv is none"):
        run(csv, tmp_path / "out", **SPARK)
    log[1].write_bytes(b"PAR1" + b"x" * 500 + log[1].read_bytes()[504:])  # its first column
    with pytest.raises(InputError, match=r"1\.parquet is damaged or unreadable on"):
        run(log, tmp_path / "out", max_bad_rows=9, **SPARK)
    assert not list(tmp_path.glob("*out*"))


def test_a_spark_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = write(tmp_path / "log.parquet", some_events(1, 50))
    with pytest.raises(InputError, match=r"cannot start Spark at spark\.master=nowhere"):
        run(log, tmp_path / "out", **SPARK | {"spark_master": "nowhere"})
    short = SPARK["spark_conf"] | {"spark.driver.maxResultSize": "1"}
    with pytest.raises(InputError, match=r"a job of Spark failed \(.*maxResultSize"):
        run(log, tmp_path / "out", **SPARK | {"spark_conf": short})
    with monkeypatch.context() as patch:
        patch.setattr(spark_events, "read_part", lambda reader, folder, part: ({None: 50}, None))
        with pytest.raises(InputError, match=r"write into .* is not seen here: output must lie on"):
            run(log, tmp_path / "out", **SPARK)
    assert not list(tmp_path.glob("*out*"))


def test_executors_need_nothing_of_this_project(tmp_path: Path) -> None:
    from pyspark.cloudpickle import dumps, register_pickle_by_value

    register_pickle_by_value(spark_part)
    reader = spark_part.PartReader("SELECT 1", {}, (), "f", "0.1")
    sent = dumps((spark_part.read_part, reader, spark_part.Part(0, "none", 0, 1)))
    script = (
        "import pickle, sys; sys.modules['data'] = None\n"
        "read, reader, part = pickle.load(sys.stdin.buffer)\n"
        "print(read(reader, 'none', part)[1])"
    )
    done = subprocess.run([sys.executable, "-c", script], input=sent, capture_output=True)
    assert b"has another DuckDB" in done.stdout, done.stderr
