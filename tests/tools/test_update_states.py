"""States carried forward day by day answer as the whole log scored from scratch."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.bundle import Bundle
from data.bundle_manifest import BundleManifest
from data.errors import InputError
from data.log_query import LogRules
from data.schema import RESERVED_ROWS, DataFile
from data.user_states import TOGETHER_BYTES, StateManifest, StatePart, numbers_of
from tests.tools.test_score_histories import scores_of
from tests.trained_run import ITEMS, Trained, run_command, trained
from tools.full_pass import FullPass
from tools.score_histories import ScoreConfig, score
from tools.update_states import Report, UpdateConfig, print_report, update

DAYS = 3
INTEGERS = pa.int64()


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[Path]:
    """A log of 40 users by day, with ties in time, unknown items, and users who come later."""
    folder, random = tmp_path_factory.mktemp("log"), np.random.default_rng(4)
    paths = []
    for day in range(DAYS):
        users = random.integers(0, 10 * (day + 1), 150)
        items = random.integers(RESERVED_ROWS, RESERVED_ROWS + ITEMS + 5, 150)
        times = random.integers(100 * day, 100 * day + 60, 150)
        paths.append(write_log(folder / f"day{day}.parquet", users, items, times))
    return paths


def write_log(path: Path, users, items, times, kind: pa.DataType = INTEGERS) -> Path:
    columns = {
        "user_id": [f"user {user}" for user in users],
        "item_id": [f"i{item}" for item in items],
        "timestamp": pa.array(times, kind),
    }
    pq.write_table(pa.table(columns), path)
    return path


def move(made: Trained, output: Path, *events: Path, **changes) -> Report:
    options = {"bundle": str(made.bundle), "events": [str(one) for one in events], "device": "cpu"}
    return update(UpdateConfig(**options | {"output": str(output)} | changes))


def from_scratch(bundle: Path, output: Path, events: list[Path], **changes) -> dict:
    options = {"bundle": str(bundle), "input": [str(one) for one in events], "device": "cpu"}
    score(ScoreConfig(**options, output=str(output), k=8, **changes))
    return scores_of(output)


def assert_close(got: dict, expected: dict) -> None:
    """The same items; scores as far as another order of sums allows."""
    assert got.keys() == expected.keys()
    for user, (items, scores) in expected.items():
        assert got[user][0] == items
        np.testing.assert_allclose(got[user][1], scores, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_days_one_by_one_score_as_the_whole_log(made, days, tmp_path, exclude_seen):
    before, users = None, 0
    for day in range(DAYS):
        now = tmp_path / f"states{day}"
        options = {"k": 8, "exclude_seen": exclude_seen, "states": before and str(before)}
        report = move(made, now, days[day], **options)
        whole = from_scratch(
            made.bundle, tmp_path / f"s{day}", days[: day + 1], exclude_seen=exclude_seen
        )
        moved = scores_of(now / "scores")
        assert_close(moved, {user: whole[user] for user in moved})
        counts = report.manifest.counts
        assert counts["users_updated"] == len(moved)
        assert counts["events_applied"] + counts["events_unknown"] == 150
        assert counts["events_late"] == counts["events_duplicate"] == 0
        assert report.manifest.users == len(whole) == users + counts["users_new"]
        users, before = len(whole), now
    assert counts["users_new"] < counts["users_updated"]


def test_states_move_on_alike_in_pieces_of_any_size(made, days, tmp_path, monkeypatch):
    """Of one user, of three, and of all of a part, which is how a GPU takes them."""
    found = []
    for piece in (1, 3, 1000):
        state_bytes = 4 * Bundle.open(made.bundle, "cpu").model.state_numbers
        monkeypatch.setitem(TOGETHER_BYTES, "cpu", piece * state_bytes)
        move(made, tmp_path / str(piece), *days)
        (part,) = (tmp_path / str(piece) / "states").iterdir()
        table = pq.read_table(part)
        found.append(numbers_of(table["state"], "fp32"))
        assert len(set(table["events"].to_pylist())) > 5
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)


def test_states_that_are_moved_on_stay_what_they_were(made):
    bundle = Bundle.open(made.bundle, "cpu")
    states = bundle.advance(bundle.new_states(3), torch.tensor([9, 10, 11]))
    before = states.clone()
    moved = bundle.advance(states, torch.tensor([12, 13, 14, 15, 16]), [3, 2])
    assert torch.equal(states, before)
    for user, items in enumerate(([12, 15], [13, 16], [14])):
        one = states[user : user + 1]
        for item in items:
            one = bundle.advance(one, torch.tensor([item]))
        torch.testing.assert_close(moved[user : user + 1], one, rtol=1e-4, atol=1e-5)


def test_the_same_log_twice_changes_nothing(made, days, tmp_path):
    once, twice = tmp_path / "once", tmp_path / "twice"
    move(made, once, days[0])
    report = move(made, twice, days[0], states=str(once))
    counts = report.manifest.counts
    assert counts["events_applied"] == counts["users_updated"] == counts["users_new"] == 0
    assert counts["events_late"] + counts["events_duplicate"] + counts["events_unknown"] == 150
    assert min(counts["events_late"], counts["events_duplicate"]) > 0
    assert [report.break_even_events(one) for one in report.full_passes] == [None]
    (first,), (second,) = (sorted((one / "states").iterdir()) for one in (once, twice))
    assert pq.read_table(first).equals(pq.read_table(second))


@pytest.mark.parametrize("kind", [INTEGERS, pa.timestamp("us"), pa.timestamp("ns")], ids=str)
def test_late_and_duplicate_events_are_told_apart(made, tmp_path, kind):
    first = write_log(tmp_path / "a.parquet", [1, 1, 1], [9, 10, 11], [5, 7, 7], kind)
    # 4 is late; (10, 7) and (11, 7) are there; (9, 7) and (12, 8) are new.
    second = write_log(tmp_path / "b.parquet", [1] * 5, [20, 10, 11, 9, 12], [4, 7, 7, 7, 8], kind)
    move(made, tmp_path / "a", first)
    report = move(made, tmp_path / "b", second, states=str(tmp_path / "a"), k=8)
    counts = report.manifest.counts
    assert [counts[f"events_{kind}"] for kind in ("late", "duplicate", "applied")] == [1, 2, 2]
    same = write_log(tmp_path / "c.parquet", [1] * 5, [9, 10, 11, 9, 12], [5, 7, 7, 7, 8], kind)
    assert_close(
        scores_of(tmp_path / "b" / "scores"), from_scratch(made.bundle, tmp_path / "s", [same])
    )
    (part,) = (tmp_path / "b" / "states").iterdir()
    table = pq.read_table(part)
    assert table["last_time"].cast(pa.int64()).to_pylist() == [8]
    (row,) = table.select(["seen", "last_items", "events"]).to_pylist()
    assert row == {"seen": [9, 10, 11, 12], "last_items": [12], "events": 5}


@pytest.mark.parametrize("rule", ["user_item", "consecutive"])
def test_the_bundles_rule_on_repeats_holds_against_the_state(made, tmp_path, rule):
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    manifest = BundleManifest.read(folder)
    rules = LogRules(deduplicate=rule).as_options()
    replace(manifest, data=manifest.data | {"options": rules}).write(folder)
    first = write_log(tmp_path / "a.parquet", [1, 1, 2], [9, 10, 9], [1, 2, 1])
    second = write_log(tmp_path / "b.parquet", [1, 1, 1, 2, 2], [10, 9, 11, 12, 9], [3, 4, 5, 6, 7])
    move(made, tmp_path / "x", first, bundle=str(folder))
    report = move(made, tmp_path / "y", second, bundle=str(folder), states=str(tmp_path / "x"), k=8)
    assert report.manifest.counts["events_duplicate"] == {"user_item": 3, "consecutive": 1}[rule]
    assert_close(
        scores_of(tmp_path / "y" / "scores"), from_scratch(folder, tmp_path / "s", [first, second])
    )


def test_fp16_halves_the_states_and_hardly_moves_the_scores(made, days, tmp_path):
    reports = {}
    for kind in ("fp32", "fp16"):
        move(made, tmp_path / kind, days[0], numbers=kind)
        states = {"states": str(tmp_path / kind), "numbers": kind, "k": 8}
        reports[kind] = move(made, tmp_path / f"{kind}b", days[1], **states)
    assert reports["fp32"].bytes_a_state == 2 * reports["fp16"].bytes_a_state
    exact, near = (scores_of(tmp_path / f"{kind}b" / "scores") for kind in reports)
    assert exact.keys() == near.keys()
    for user, (_, scores) in exact.items():
        np.testing.assert_allclose(near[user][1], scores, rtol=0.02, atol=0.02)


def test_the_command_reports_bytes_and_break_even(made, days, tmp_path):
    command = ["tools.update_states", f"bundle={made.bundle}", "device=cpu"]
    run_command(*command, f"events={days[0]}", f"output={tmp_path / 'a'}")
    options = [f"states={tmp_path / 'a'}", f"output={tmp_path / 'b'}", "numbers=fp16"]
    printed = run_command(*command, f"events={days[1]}", *options)
    numbers = Bundle.open(made.bundle, torch.device("cpu")).new_states(1).shape[1]
    assert f"{2 * numbers:,} of state" in printed
    assert "\ndevice                   cpu, " in printed
    (line,) = [one for one in printed.splitlines() if one.startswith("break-even")]
    assert line.endswith("scoring whole histories with kernels=torchscript is cheaper")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert names == {"manifest.json", "states"}


def test_refusals(made, days, tmp_path):
    output, states = tmp_path / "s", tmp_path / "states"
    move(made, states, days[0])

    def refused(match: str, *events: Path, **changes) -> None:
        with pytest.raises(InputError, match=match):
            move(made, output, *(events or days[1:2]), **changes)
        assert not output.exists()

    refused("numbers=int8 is unknown; choose fp32 | fp16", numbers="int8")
    refused("device=tpu is unknown; choose auto | cpu | cuda", device="tpu")
    refused("exclude_seen=maybe must be true or false", exclude_seen="maybe")
    refused("k=-1 must be a whole number", k=-1)
    refused(f"k={ITEMS + 1} is more than the bundle's {ITEMS} items; lower it", k=ITEMS + 1)
    refused("holds no finished states", states=str(made.data / "histories"))
    refused(r"states=.* is a converted data set; name a folder that", states=str(made.data))
    for events in (str(made.data), [str(days[1]), str(made.data)]):
        refused(r"events=/.*data is a converted data set, .*; name the log itself$", events=events)
    refused(r"no file matches events=.*absent; check the path", events=str(states / "absent"))
    path = states / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"fingerprint": "another"}))
    refused("are of another model than bundle", states=str(states))
    outside = [manifest["parts"][0] | {"path": "../part.parquet"}]
    path.write_text(json.dumps(manifest | {"parts": outside}))
    refused(r"names \.\./part\.parquet, outside its own .*; build the st", states=str(states))
    path.write_text(json.dumps(manifest | {"states_version": 1}))
    refused("is not of states version 2", states=str(states))
    path.write_text(json.dumps(manifest | {"colour": 1}))
    refused(r"manifest\.json is damaged \(.*; build the states anew", states=str(states))
    path.write_text(json.dumps(manifest))
    floats = pq.read_table(days[1])
    floats = floats.set_column(2, "timestamp", floats["timestamp"].cast(pa.float64()))
    pq.write_table(floats, tmp_path / "floats.parquet")
    refused(
        "times are double in the log but int64", tmp_path / "floats.parquet", states=str(states)
    )
    (part,) = (states / "states").iterdir()
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    refused("is damaged, its hash is not the manifest's", states=str(states))
    bundle = Bundle.open(made.bundle, torch.device("cpu"))
    whole = replace(bundle, model=SimpleNamespace(state_numbers=0))
    with pytest.raises(InputError, match="bidirectional and reads whole histories"):
        whole.new_states(1)


def test_threads_are_bounded():
    with pytest.raises(InputError, match="threads=1025 is above 1,024"):
        UpdateConfig("bundle", "events", "output", threads=1025)


def test_a_gpu_that_is_not_there_is_refused(made, days, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device=cuda, but torch sees no GPU; use device=cpu"):
        move(made, tmp_path / "s", days[0], device="cuda")


def test_more_processes_than_one_are_refused(made, days, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="is one process, and torchrun started 2; start it with"):
        move(made, tmp_path / "s", days[0])


def test_a_break_even_is_against_a_way_that_was_timed(capsys):
    counts = dict.fromkeys(("events_unknown", "events_bad", "events_late", "events_duplicate"), 0)
    counts |= {"users_updated": 10, "users_new": 4, "events_applied": 12}
    passes = [
        FullPass("torchscript", 1e-3),
        FullPass("bf16", 5e-6),
        FullPass("fp32", None, "no reason"),
    ]
    manifest = StateManifest("", "fp32", 20, counts, [], [])
    report = Report(manifest, 400, "a card", 2.0, passes)
    assert [report.break_even_events(one) for one in passes] == [200, 40_000, None]
    print_report(report, "STATES")
    printed = capsys.readouterr().out
    for line in (
        "1,000 us an event with kernels=torchscript",
        "5 us an event with kernels=bf16",
        "kernels=fp32 was not timed: no reason",
        " 200 events: below that length, scoring whole histories with kernels=torchscript is cheap",
        " 40,000 events: below that length, scoring whole histories with kernels=bf16 is cheaper",
    ):
        assert line in printed
    assert printed.count("break-even") == 2


def test_a_part_that_is_no_parquet_is_named(tmp_path):
    part = tmp_path / "part-00000.parquet"
    part.write_bytes(b"not Parquet")
    file = DataFile(part.name, 1, 11, hashlib.sha256(b"not Parquet").hexdigest())
    with pytest.raises(InputError, match=r"00000\.parquet cannot be read \(.*\); copy it again"):
        StatePart.read(tmp_path, file, "fp32")


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (np.nan, r"bundle .* answers NaN or infinity; export another one"),
        (1e6, r"a state is beyond the range of fp16; use numbers=fp32"),
    ],
)
def test_states_beyond_numbers_are_named(made, days, tmp_path, monkeypatch, number, message):
    monkeypatch.setattr(Bundle, "advance", lambda _, state, *by: torch.full_like(state, number))
    with pytest.raises(InputError, match=message):
        move(made, tmp_path / "s", days[0], numbers="fp16")
    assert not (tmp_path / "s").exists()
