"""Appending a day to a data set equals converting both logs, whatever was dropped or came late."""

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.schema import BAD_ROWS, MANIFEST, RESIDUAL, VOCABULARY, Manifest
from tests.tools.conversion_cases import check, digest, histories, run, some_events, write
from tests.tools.reference_conversion import Event, reference
from tests.tools.test_convert_vocabulary import items_of


def two_days(seed: int, kind: type = int, times: int = 12) -> tuple[list[Event], list[Event]]:
    """Two days of a log; a third of the second day's events happened during the first."""
    first, second = some_events(seed, 300, kind, times), some_events(seed + 50, 200, kind, times)
    draw = random.Random(seed)
    late = [event | {"time": event["time"] + draw.choice([0, 9, 12])} for event in second]
    return first, [event | {"seq": 300 + event["seq"]} for event in late]


def same_data(one: Path, other: Path) -> None:
    """Byte for byte, but for the manifest's counts of what was appended."""
    first, second = digest(one), digest(other)
    counts = [json.loads(files.pop(MANIFEST)) for files in (first, second)]
    for name in ("events_appended", "events_late"):
        counts[0]["counts"].pop(name, None)
    assert first == second
    assert counts[0] == counts[1]


@pytest.mark.parametrize("deduplicate", ["none", "consecutive", "user_item"])
@pytest.mark.parametrize("bounds", [None, (9, 12)])
@pytest.mark.parametrize(("kind", "times"), [(int, 12), (str, 1)])
def test_appending_equals_converting_both_logs(
    tmp_path: Path, deduplicate: str, bounds: tuple[int, int] | None, kind: type, times: int
) -> None:
    first, second = two_days(1, kind, times)
    write(tmp_path / "log/1.parquet", first, price=[event["seq"] / 2 for event in first])
    write(tmp_path / "log/2.parquet", second, price=[event["seq"] / 2 for event in second])
    options: dict[str, Any] = {"features": ("price",), "deduplicate": deduplicate, "shards": 2}
    options |= {"min_user_events": 4, "min_item_events": 4, "row_group_events": 60}
    today = {"kind": "leave_one_out"}
    if bounds:
        today = {"kind": "temporal", "validation_from": bounds[0], "test_from": bounds[1]}

    run(tmp_path / "log/1.parquet", tmp_path / "old", **options)
    made = run(
        tmp_path / "log/2.parquet", tmp_path / "new", today, append=tmp_path / "old", **options
    )
    run(tmp_path / "log", tmp_path / "both", today, vocabulary=tmp_path / "old", **options)
    same_data(tmp_path / "new", tmp_path / "both")

    known = items_of(tmp_path / "old")
    check(tmp_path / "new", reference(first + second, 4, 4, deduplicate, bounds, known))
    newest = {event["user"]: 0 for event in first}
    for event in first:
        newest[event["user"]] = max(newest[event["user"]], event["time"])
    late = [event for event in second if event["time"] < newest.get(event["user"], -1)]
    counts = made.manifest.counts
    assert (counts["events_appended"], counts["events_late"]) == (200, len(late))
    assert counts["events_read"] == 500
    assert counts["events_below_minimum"] > 0


def test_many_days_one_by_one(tmp_path: Path) -> None:
    days = [two_days(seed)[1] for seed in range(4)]
    options: dict[str, Any] = {"deduplicate": "consecutive"}
    options |= {"min_user_events": 5, "min_item_events": 5}
    for number, day in enumerate(days):
        log = write(tmp_path / f"log/{number}.parquet", day)
        before = {"append": tmp_path / f"out{number - 1}"} if number else {}
        run(log, tmp_path / f"out{number}", **before, **options)
    seq = iter(range(1000))
    events = [event | {"seq": next(seq)} for day in days for event in day]
    check(
        tmp_path / "out3",
        reference(events, 5, 5, "consecutive", known=items_of(tmp_path / "out2")),
    )
    everything = Manifest.read(tmp_path / "out3").counts
    assert everything["events_read"] == 800
    # With other filters: whatever was dropped on any day is still there.
    run(write(tmp_path / "last.parquet", days[0][:1]), tmp_path / "all", append=tmp_path / "out3")
    assert histories(tmp_path / "all")["items"].combine_chunks().flatten().__len__() == 801


def test_append_in_place(tmp_path: Path) -> None:
    first, second = two_days(1)
    out = tmp_path / "out"
    log = [write(tmp_path / f"{n}.parquet", day) for n, day in enumerate((first, second))]
    run(log[0], out, min_item_events=3)
    run(log[0], tmp_path / "old", min_item_events=3)
    run(log[1], out, min_item_events=3, append=out, overwrite=True)
    run(log, tmp_path / "both", min_item_events=3, vocabulary=tmp_path / "old")
    same_data(out, tmp_path / "both")


def test_bad_rows_of_both_days_are_counted_and_kept(tmp_path: Path) -> None:
    for day, bad in ((1, "x,1,1\n"), (2, "1,1,x\n,1,1\n")):
        good = "".join(f"1,{item},{day * 10 + item}\n" for item in range(5))
        (tmp_path / f"{day}.csv").write_text("user_id,item_id,timestamp\n" + good + bad)
    types = {"csv_types": {"user_id": "BIGINT", "timestamp": "BIGINT"}}
    run(tmp_path / "1.csv", tmp_path / "old", max_bad_rows=2, **types)
    made = run(
        tmp_path / "2.csv", tmp_path / "new", max_bad_rows=2, append=tmp_path / "old", **types
    )
    counts = made.manifest.counts
    assert counts["events_bad"] == 3
    assert (counts["events_bad_unreadable_user"], counts["events_bad_null_user"]) == (1, 1)
    files = pq.read_table(tmp_path / "new" / BAD_ROWS)["file"].to_pylist()
    assert files == ["1.csv", "2.csv", "2.csv"]
    with pytest.raises(InputError, match="2 of 7 rows are bad"):
        run(tmp_path / "2.csv", tmp_path / "no", max_bad_rows=1, append=tmp_path / "old", **types)


def test_data_sets_that_cannot_be_appended_to(tmp_path: Path) -> None:
    events = some_events(1, 200)
    log = write(tmp_path / "log.parquet", events, price=[1.5] * 200)
    old = tmp_path / "old"
    run(log, old, min_item_events=4, features=("price",))
    before = digest(tmp_path)

    def refused(message: str, today: Path = log, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            run(today, tmp_path / "out", append=old, **{"features": ("price",)} | options)
        assert not (tmp_path / "out").exists()

    refused(r"columns.features=\[\], but append=.*old was made with \['price'\]", features=())
    refused(r"where=item_id > 3, but append=.*old was made with None", where="item_id > 3")
    strings = write(tmp_path / "strings.parquet", some_events(1, 50, str), price=[1.5] * 50)
    refused("item ids are VARCHAR in the log but BIGINT", strings)
    times = [event | {"time": float(event["time"])} for event in events]
    floats = write(tmp_path / "floats.parquet", times, price=[1.5] * 200)
    refused(r"columns.time is DOUBLE in the log but BIGINT in append=", floats)
    words = write(tmp_path / "words.parquet", events, price=["x"] * 200)
    refused(r"price is VARCHAR in the log but DOUBLE in append=", words)
    for one in (strings, floats, words):
        one.unlink()
    assert digest(tmp_path) == before

    manifest = (old / MANIFEST).read_text()
    raw = json.loads(manifest)
    for changes, message in (
        ({"residual": None}, r"lacks the residual/ of the \d+ events that its filters dropped"),
        ({"options": {}}, "was not made by tools.convert_logs"),
    ):
        (old / MANIFEST).write_text(json.dumps(raw | changes))
        refused(message)
    (old / MANIFEST).write_text(manifest)
    for name in (f"{RESIDUAL}/part-00000.parquet", VOCABULARY, "histories/part-00000.parquet"):
        content = (old / name).read_bytes()
        (old / name).write_bytes(content[:-20])
        refused(rf"{name} has [\d,]+ bytes, the manifest says")
        (old / name).write_bytes(content)


@pytest.mark.parametrize(("unit", "zone"), [("s", None), ("ns", None), ("ms", "Europe/Berlin")])
def test_timestamps_of_any_unit_are_appended(tmp_path: Path, unit: str, zone: str | None) -> None:
    logs = []
    for number, day in enumerate(two_days(4)):
        table = pq.read_table(write(tmp_path / f"log/{number}.parquet", day))
        times = table["timestamp"].cast(pa.timestamp(unit)).cast(pa.timestamp(unit, zone))
        pq.write_table(table.set_column(2, "timestamp", times), tmp_path / f"log/{number}.parquet")
        logs.append(tmp_path / f"log/{number}.parquet")
    options = {"min_item_events": 3}
    run(logs[0], tmp_path / "old", **options)
    run(logs[1], tmp_path / "new", append=tmp_path / "old", **options)
    run(logs, tmp_path / "both", vocabulary=tmp_path / "old", **options)
    same_data(tmp_path / "new", tmp_path / "both")
