"""Batch scoring as a user runs it, against the model asked one user at a time."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

import tools.score_histories as tool
from data.bundle import Bundle
from data.bundle_manifest import BundleManifest, sealed
from data.errors import InputError
from data.item_filter import ItemFilter, read_filter
from data.log_query import LogRules
from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS, Manifest
from data.score_output import ScoreFolder
from data.scoring import units_of
from data.vocabulary import Vocabulary
from modules.kernel_scorer import KernelScorer
from tests.data.datasets import write_dataset
from tests.trained_run import ITEMS, ROOT, USERS, Trained, run_command, trained
from tools.score_histories import ScoreConfig, _single_threaded, score

CPU = torch.device("cpu")
hidden = KernelScorer.hidden


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


def config(made: Trained, output: Path, **changes) -> ScoreConfig:
    options = {"bundle": str(made.bundle), "input": str(made.data), "k": 10, "device": "cpu"}
    return ScoreConfig(**options | {"output": str(output)} | changes)


@functools.cache
def opened(folder: Path) -> Bundle:
    return Bundle.open(folder, CPU)


def scores_of(folder: Path) -> dict[str, tuple[list[str], list[float]]]:
    found = {}
    for path in sorted(folder.glob("part-*.parquet")):
        for row in pq.read_table(path).to_pylist():
            assert row["user_id"] not in found
            found[row["user_id"]] = (row["item_ids"], row["scores"])
    return found


def expected_of(made: Trained, histories: dict[str, list[int]], k: int, exclude_seen: bool):
    """One user at a time, in raw ids; users without a history are left out."""
    bundle, found = opened(made.bundle), {}
    for user, items in histories.items():
        if items:
            offsets = torch.tensor([0, len(items)])
            rows, scores = bundle.score(torch.tensor(items), offsets, k, exclude_seen)
            real = rows[0] >= 0
            names = [f"i{row}" for row in rows[0][real].tolist()]
            found[user] = (names, scores[0][real].tolist())
    return found


def assert_same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for user, (items, scores) in expected.items():
        assert got[user][0] == items, user
        np.testing.assert_allclose(got[user][1], scores, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("upto", "exclude_seen"), [("all", True), ("train", False), ("validation", True)]
)
def test_a_data_set_scores_as_one_user_at_a_time(made, tmp_path, upto, exclude_seen):
    options = {"upto": upto, "exclude_seen": exclude_seen, "batch_tokens": 64, "part_users": 13}
    summary = score(config(made, tmp_path / "s", **options))
    seen = {
        "all": len,
        "train": lambda one: max(len(one) - 2, 0),
        "validation": lambda one: max(len(one) - 1, 1),  # a single event is for validation
    }[upto]
    histories = {f"u{number}": one[: seen(one)] for number, one in enumerate(made.histories)}
    expected = expected_of(made, histories, 10, exclude_seen)
    assert_same(scores_of(tmp_path / "s"), expected)
    assert summary["users"] == USERS
    assert list(summary["seconds_waiting"]) == ["batches", "answers", "files"]
    assert 0 < sum(summary["seconds_waiting"].values()) < summary["seconds"]
    assert summary["users_scored"] == len(expected)
    assert summary["users_without_history"] == USERS - len(expected)
    assert summary["events"] == sum(map(len, histories.values()))
    assert (upto == "train") == (len(expected) < USERS)


@pytest.mark.parametrize(("kernels", "exclude_seen"), [("fp32", True), ("fp32", False)])
def test_the_trainers_encoder_scores_as_the_bundle(made, tmp_path, capsys, kernels, exclude_seen):
    """With lists of items, batches of a few users and units that end inside a row group."""
    users = write_ids(tmp_path / "u.parquet", user_id=["u3", "u40"], item_ids=[["i9"], ["i8"]])
    options = {"exclude_seen": exclude_seen, "batch_tokens": 64, "part_users": 13, "upto": "train"}
    options |= {"block_items": ["i30", "i12"], "block_by_user": users}
    score(config(made, tmp_path / "bundle", **options))
    capsys.readouterr()
    summary = score(config(made, tmp_path / "s", **options, kernels=kernels))
    assert_same(scores_of(tmp_path / "s"), scores_of(tmp_path / "bundle"))
    assert summary["kernels"] == kernels
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"kernels={kernels} against the bundle's own model, ")
    assert "top-10 overlap 1.0000" in line


def test_kernels_that_disagree_with_the_bundle_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(KernelScorer, "hidden", lambda self, *of: -hidden(self, *of))
    with pytest.raises(
        InputError, match=r"kernels=bf16 find 0\.\d+ of the bundle's top 5 items, be"
    ):
        score(config(made, tmp_path / "s", kernels="bf16", k=5))
    assert not (tmp_path / "s").exists()
    score(config(made, tmp_path / "s", kernels="bf16", k=5, min_agreement=0))


def test_a_bundle_whose_sizes_no_kernel_has_is_refused(made, tmp_path):
    """The tiny model's: state 4 and head 8."""
    place = tool.Place(0, 1, torch.device("cuda", 0))
    dataset, bundle = HistoryDataset(made.data), opened(made.bundle)
    with pytest.raises(InputError, match=r"model\.head=8 has no CUDA kernel; it is one of 16, 32"):
        tool.launcher(config(made, tmp_path, kernels="bf16"), dataset, bundle, ItemFilter(), place)


def write_ids(path: Path, **columns) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("as_file", [False, True])
def test_lists_of_items_bound_what_is_recommended(made, tmp_path, as_file):
    allow, block = ["i9", "i12", "i30", "i31", "i57", "unknown"], ["i30", "i50", "other"]
    if as_file:
        allow = write_ids(tmp_path / "allow.parquet", item_id=allow)
        block = write_ids(tmp_path / "block.parquet", item_id=block)
    score(config(made, tmp_path / "all", k=ITEMS))
    lists = {"allow_items": allow, "block_items": block}
    summary = score(config(made, tmp_path / "s", k=3, **lists, batch_tokens=64))
    everything, wanted = scores_of(tmp_path / "all"), {"i9", "i12", "i31", "i57"}
    expected = {}
    for user, (items, scores) in everything.items():
        kept = [pair for pair in zip(items, scores, strict=True) if pair[0] in wanted][:3]
        expected[user] = ([item for item, _ in kept], [one for _, one in kept])
    assert_same(scores_of(tmp_path / "s"), expected)
    assert summary["users_short"] == sum(len(items) < 3 for items, _ in expected.values()) > 0


def test_ids_of_a_numbered_catalogue_are_numbers():
    vocabulary = Vocabulary(pa.array([5, 6]), np.ones(RESERVED_ROWS + 2, np.int64))
    with pytest.raises(InputError, match=r"block_items=\['a'\] holds other ids .*; give whole num"):
        read_filter(vocabulary, None, ["a"], None, "item_ids")
    with pytest.raises(InputError, match=r"allow_items=\[5, 1000.* holds other ids .* in \[-2\^63"):
        read_filter(vocabulary, [5, 10**20], None, None, "item_ids")


def test_single_users_have_items_of_their_own_left_out(made, tmp_path):
    """Listed in any order, twice, with unknown users and items, with none, and with null."""
    users = ["u40", "u3", "stranger", "u3", "u41", "u42", "u69"]
    items = [["i9", "i10"], ["i11", "none"], ["i12"], ["i13"], [], None, ["i8", "i9"]]
    path = write_ids(tmp_path / "users.parquet", user_id=users, not_these=items)
    score(config(made, tmp_path / "all", k=ITEMS))
    options = {"block_by_user": path, "block_by_user_column": "not_these"}
    score(config(made, tmp_path / "s", k=5, **options, batch_tokens=50, part_users=11))
    expected = {}
    for user, (best, scores) in scores_of(tmp_path / "all").items():
        out = {
            one for who, some in zip(users, items, strict=True) if who == user for one in some or ()
        }
        kept = [pair for pair in zip(best, scores, strict=True) if pair[0] not in out][:5]
        expected[user] = ([item for item, _ in kept], [one for _, one in kept])
    assert_same(scores_of(tmp_path / "s"), expected)


def test_as_many_items_as_there_are(made, tmp_path):
    summary = score(config(made, tmp_path / "s", k=ITEMS))
    for number, history in enumerate(made.histories):
        items, scores = scores_of(tmp_path / "s")[f"u{number}"]
        seen = {f"i{item}" for item in history}
        assert not seen & set(items)
        assert len(items) == len(set(items)) == ITEMS - len(seen)
        assert scores == sorted(scores, reverse=True)
    assert summary["users_short"] == USERS


def test_the_folder_reads_as_one_parquet_table(made, tmp_path):
    score(config(made, tmp_path / "s", part_users=20))
    table = pq.read_table(tmp_path / "s")
    assert table.column_names == ["user_id", "item_ids", "scores"]
    assert table.num_rows == USERS


def test_two_processes_divide_the_work_and_agree_with_one(made, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = [f"bundle={made.bundle}", f"input={made.data}", "k=10", "part_users=9"]
    score(config(made, one))
    command = [sys.executable, "-m", "tools.score_histories", *options, f"output={two}"]
    environment = {**os.environ, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in (1, 0)
    ]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert printed[0] == b""
    assert b"users scored" in printed[1]
    assert_same(scores_of(two), scores_of(one))
    summary = json.loads((two / "_summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["users_scored"] == USERS
    names = {path.name for path in two.iterdir()}
    assert names == {"_summary.json", *summary["parts"]}


def test_a_killed_run_goes_on_with_what_is_missing(made, tmp_path, monkeypatch):
    whole, output = tmp_path / "whole", tmp_path / "s"
    score(config(made, whole, part_users=11))
    calls = []

    def dies(*arguments, **options):
        for scores in real(*arguments, **options):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append(scores)
            yield scores

    real = tool.score_batches
    monkeypatch.setattr(tool, "score_batches", dies)
    with pytest.raises(KeyboardInterrupt):
        score(config(made, output, part_users=11))
    assert not (output / "_summary.json").exists()
    for other in ({"k": 9}, {"kernels": "fp32"}):
        with pytest.raises(InputError, match="input or options; remove that folder to start over"):
            score(config(made, output, part_users=11, **other))
    monkeypatch.setattr(tool, "score_batches", real)
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    score(config(made, output, part_users=11))
    assert len(before) == 3
    assert all((output / name).stat().st_mtime_ns == when for name, when in before.items())
    assert_same(scores_of(output), scores_of(whole))
    assert not (output / "_job.json").exists()


def write_log(folder: Path, columns: dict[str, str], kind: str = "parquet") -> tuple[Path, dict]:
    """A shuffled log with unknown items; returns it and the histories in table rows."""
    random = np.random.default_rng(5)
    users = random.integers(0, 40, 600)
    items = random.integers(RESERVED_ROWS, RESERVED_ROWS + ITEMS + 10, 600)
    items[users == 7] = RESERVED_ROWS + ITEMS  # a user of unknown items alone
    times = random.integers(0, 50, 600)  # ties keep the input's order
    table = pa.table(
        {
            columns["user"]: [f"user {user}" for user in users],
            columns["item"]: [f"i{item}" for item in items],
            columns["time"]: times,
        }
    )
    folder.mkdir()
    if kind == "csv":
        pyarrow.csv.write_csv(table, folder / "log.csv")
    else:
        pq.write_table(table.slice(0, 250), folder / "a.parquet")
        pq.write_table(table.slice(250), folder / "b.parquet")
    histories: dict[str, list[int]] = {}
    for place in np.argsort(times, kind="stable"):
        history = histories.setdefault(f"user {users[place]}", [])
        if items[place] < RESERVED_ROWS + ITEMS:
            history.append(int(items[place]))
    return folder, histories


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_raw_log_scores_as_its_histories(made, tmp_path, kind):
    columns = {"user": "who", "item": "what", "time": "when"}
    log, histories = write_log(tmp_path / "log", columns, kind)
    options = {"columns": columns, "part_users": 17, "row_group_events": 100}
    summary = score(config(made, tmp_path / "s", input=f"{log}/*.{kind}", **options))
    assert_same(scores_of(tmp_path / "s"), expected_of(made, histories, 10, True))
    assert summary["events_read"] == 600
    assert summary["events"] == sum(map(len, histories.values()))
    assert summary["events_unknown"] == 600 - summary["events"] > 0
    assert histories["user 7"] == []
    assert summary["users_without_history"] == 1
    assert summary["users_scored"] == summary["users"] - 1 == 39
    assert {path.name for path in (tmp_path / "s").iterdir()} == {
        "_summary.json",
        *summary["parts"],
    }


def test_a_log_is_read_by_the_rules_of_the_bundle(made, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(made.bundle, bundle)
    manifest = BundleManifest.read(bundle)
    rules = LogRules(where="rating > 2", deduplicate="user_item").as_options()
    replace(manifest, data=manifest.data | {"options": rules}).write(bundle)
    log = pa.table(
        {
            "user_id": ["a"] * 5,
            "item_id": ["i8", "i9", "i8", "i10", "i9"],
            "timestamp": [1, 2, 3, 4, 5],
            "rating": [5, 1, 5, 5, 3],
        }
    )
    pq.write_table(log, tmp_path / "log.parquet")
    source = {"bundle": str(bundle), "input": str(tmp_path / "log.parquet")}
    summary = score(config(made, tmp_path / "s", **source))
    assert (summary["events_filtered"], summary["events_duplicate"]) == (1, 1)
    assert_same(scores_of(tmp_path / "s"), expected_of(made, {"a": [8, 10, 9]}, 10, True))


def test_scoring_needs_no_torchrec():
    """Its import takes seconds, and its fbgemm fits one torch alone."""
    code = "import tools.score_histories, sys; print({'torchrec', 'modules'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_units_do_not_depend_on_the_number_of_processes(made):
    units = units_of(HistoryDataset(made.data), 13)
    assert sum(unit.users for unit in units) == USERS
    assert len({unit.name for unit in units}) == len(units) == 7  # groups of 30, 30 and 10 users


@pytest.mark.parametrize(("users", "parts"), [(70, 1), (40_000, 64), (10_000_000, 1221)])
def test_a_data_set_has_units_for_many_processes(users, parts):
    class OneGroup:
        group_starts_G1 = np.array([0, users])

        def __len__(self) -> int:
            return users

    units = units_of(OneGroup(), None)
    assert len(units) == parts
    assert max(unit.users for unit in units) <= 8192


def test_refusals(made, tmp_path):
    output = tmp_path / "s"

    def refused(match: str, **changes) -> None:
        with pytest.raises(InputError, match=match):
            score(config(made, output, **changes))
        assert not output.exists()

    refused("k=0 must be a whole number, 1 or more", k=0)
    refused(f"k={ITEMS + 1} is more than the bundle's {ITEMS} items; lower it", k=ITEMS + 1)
    refused("upto=test is unknown", upto="test")
    refused("exclude_seen=maybe", exclude_seen="maybe")
    refused("kernels=int8 is unknown; choose torchscript | bf16 | fp32", kernels="int8")
    refused(r"min_agreement=2 is outside \[0, 1\]", kernels="fp32", min_agreement=2)
    refused("does not exist; make one with trainer.export", bundle=str(tmp_path / "none"))
    refused("is no bundle", bundle=str(made.data))
    refused("no file matches input", input=str(tmp_path / "none-*.parquet"))
    refused("is a URL", input="s3://bucket/log.parquet")
    log, _ = write_log(tmp_path / "log", {"user": "user_id", "item": "item_id", "time": "t"})
    refused("upto=train is for a converted data set", input=str(log), upto="train")
    other = write_dataset(tmp_path / "other", [[8, 9, 10]])
    refused("number their items differently.*; score the raw log instead$", input=str(other))
    for option in ({"columns": {"user": "foo"}}, {"csv": {"types": {"item_id": "VARCHAR"}}}):
        refused("(columns.user|csv.types)=.* is for a raw log, but input=.* leave", **option)
    refused("threads=2 is for a raw log", threads=2)
    ids = write_ids(tmp_path / "ids.parquet", item_id=["i9"], user_id=["u1"])
    refused("allow_items=none.parquet does not exist", allow_items="none.parquet")
    refused(
        "block_items=.* has no column item_id, only i",
        block_items=write_ids(tmp_path / "x.parquet", i=[1]),
    )
    refused("leave none of the bundle's 50 items", allow_items=["i9"], block_items=ids)
    refused("block_by_user=.* has no column item_ids", block_by_user=ids)
    column = {"block_by_user": ids, "block_by_user_column": "item_id"}
    refused("column item_id is string, not a list", **column)
    numbers = write_ids(tmp_path / "n.parquet", item_id=[1])
    refused("allow_items: item ids are int64 here but string", allow_items=numbers)
    odd = write_ids(tmp_path / "odd.parquet", user_id=[[1]], item_ids=[["i9"]])
    refused(r"block_by_user has user ids of type list.*, the histories string", block_by_user=odd)
    (tmp_path / "text.parquet").write_text("not Parquet")
    text = str(tmp_path / "text.parquet")
    refused(r"allow_items=.*cannot be read \(.*\); give a Parquet file", allow_items=text)
    (tmp_path / "cut" / "histories").mkdir(parents=True)
    refused("is not a finished data set", input=str(tmp_path / "cut"))


def test_threads_are_bounded(made, tmp_path):
    with pytest.raises(InputError, match="threads=1025 is above 1,024"):
        config(made, tmp_path / "s", threads=1025)


def test_a_flipped_bit_is_found_before_anything_is_written(made, tmp_path):
    """Also in a footer, where no page's checksum covers it."""
    data = shutil.copytree(made.data, tmp_path / "data")
    path = max((data / "histories").iterdir())
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"{path.name} is damaged.* again"):
        score(config(made, tmp_path / "s", input=str(data)))
    assert not (tmp_path / "s").exists()


def test_processes_share_the_cards_of_a_host(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = []
    for local_rank in range(5):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        found.append(tool.Place.of("cuda").device.index)
    assert found == [0, 1, 0, 1, 0]


def test_torch_has_one_thread_beside_a_card_and_the_others_back_afterwards():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with _single_threaded(True):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with _single_threaded(False):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_card_that_is_not_there_is_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="device=cuda, but torch sees no GPU; use device=cpu"):
        score(config(made, tmp_path / "s", device="cuda"))
    assert not (tmp_path / "s").exists()


def test_options_of_a_log_are_refused_on_the_command_line(made, tmp_path):
    command = ["tools.score_histories", f"bundle={made.bundle}", f"input={made.data}", "k=5"]
    for option in ("columns.user=foo", "csv=null"):
        line = run_command(*command, f"output={tmp_path / 's'}", option, fails=True)
        assert line.startswith(f"error: {option} is ")
    assert not (tmp_path / "s").exists()


def test_refusals_once_the_output_is_claimed(made, tmp_path):
    log, _ = write_log(tmp_path / "log", {"user": "user_id", "item": "item_id", "time": "t"})
    with pytest.raises(InputError, match=r"columns\.time=timestamp is not a column"):
        score(config(made, tmp_path / "a", input=str(log)))
    numbers = pa.table({"user_id": [1], "item_id": [5], "timestamp": [1]})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    with pytest.raises(InputError, match="item ids are BIGINT in the log but VARCHAR"):
        score(config(made, tmp_path / "b", input=str(tmp_path / "numbers.parquet")))
    strange = pa.table({"user_id": [1], "item_id": ["x"], "timestamp": [1]})
    pq.write_table(strange, tmp_path / "strange.parquet")
    with pytest.raises(InputError, match="none of the log's 1 events is of an item"):
        score(config(made, tmp_path / "c", input=str(tmp_path / "strange.parquet")))
    timeless = pa.table({"user_id": ["a"], "item_id": ["i8"], "timestamp": pa.nulls(1, pa.int64())})
    pq.write_table(timeless, tmp_path / "timeless.parquet")
    limit = r"max_bad_rows=0, for .*timeless.*; mend them or raise the limit$"
    with pytest.raises(InputError, match=limit):
        score(config(made, tmp_path / "c", input=str(tmp_path / "timeless.parquet")))
    # The same output can be used once the command or the log is right.
    assert {path.name for path in tmp_path.iterdir()} & {"a", "b", "c"} == set()
    columns = {"user": None, "item": None, "time": "t"}
    assert score(config(made, tmp_path / "a", input=str(log), columns=columns))


def test_a_run_that_failed_on_its_input_does_not_block_the_next(made, tmp_path):
    log, _ = write_log(
        tmp_path / "log", {"user": "user_id", "item": "item_id", "time": "timestamp"}
    )
    options = [f"bundle={made.bundle}", f"input={log}", f"output={tmp_path / 's'}", "k=10"]
    command = ["tools.score_histories", *options, "device=cpu"]
    whole = (log / "b.parquet").read_bytes()
    (log / "b.parquet").write_bytes(whole[: len(whole) // 2])
    assert "b.parquet" in run_command(*command, fails=True)
    assert not (tmp_path / "s").exists()
    (log / "b.parquet").write_bytes(whole)
    assert "users scored" in run_command(*command)


def test_a_failed_run_keeps_what_is_written_or_anothers(made, tmp_path):
    folder = ScoreFolder(tmp_path / "s", {"k": 1}, "grouped")
    for other in ("part-00000-00000.parquet", ".grouped.unfinished"):
        assert folder.begin(is_main=True)
        (folder.path / other).touch()
        folder.abandon()
        assert {path.name for path in folder.path.iterdir()} == {"_job.json", other}
        (folder.path / other).unlink()
    folder.abandon()
    assert not folder.path.exists()


def test_a_bundle_that_answers_nan_is_named(made, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(made.bundle, bundle)
    rows = bundle / "rows" / "part-00000.pt"
    part = torch.load(rows, weights_only=True)
    part["rows"][RESERVED_ROWS + 3] = torch.nan
    torch.save(part, rows)
    manifest = BundleManifest.read(bundle)
    files = [sealed(bundle, bundle / one.path) for one in manifest.files]
    replace(manifest, files=files).write(bundle)
    with pytest.raises(InputError, match=r"bundle .*/bundle answers NaN or infinite scores"):
        score(config(made, tmp_path / "s", bundle=str(bundle)))
    assert not (tmp_path / "s").exists()


def test_a_file_that_cannot_be_written_ends_the_run(made, tmp_path, monkeypatch):
    """What was written before stays, and the same command goes on with it."""

    def full(folder, name, table):
        if name == "part-00001-00000.parquet":
            raise OSError(28, "No space left on device")
        return write(folder, name, table)

    write = ScoreFolder.write
    monkeypatch.setattr(ScoreFolder, "write", full)
    with pytest.raises(OSError, match="No space left"):
        score(config(made, tmp_path / "s", part_users=11))
    assert not (tmp_path / "s" / "_summary.json").exists()
    assert (tmp_path / "s" / "part-00000-00000.parquet").exists()
    monkeypatch.setattr(ScoreFolder, "write", write)
    score(config(made, tmp_path / "s", part_users=11))
    assert len(scores_of(tmp_path / "s")) == USERS


def test_an_existing_output_is_kept(made, tmp_path):
    score(config(made, tmp_path / "s"))
    with pytest.raises(InputError, match="already exists"):
        score(config(made, tmp_path / "s"))
    with pytest.raises(InputError, match=r"holds 'histories' and is no unfinished output"):
        score(config(made, made.data))
    manifest = made.data / "manifest.json"
    for place in (manifest / "s", tmp_path / ("s" * 300)):  # below a file; beyond a name's length
        with pytest.raises(InputError, match=r"cannot write output=.*; name a writable place"):
            score(config(made, place))
    assert manifest.is_file()


def test_a_log_needs_the_rules_of_the_bundle(made, tmp_path):
    log, _ = write_log(tmp_path / "log", {"user": "user_id", "item": "item_id", "time": "time"})
    folder = shutil.copytree(made.bundle, tmp_path / "bundle")
    manifest = BundleManifest.read(folder)
    replace(manifest, data=manifest.data | {"options": {}}).write(folder)
    with pytest.raises(InputError, match=r"carries no rules .*; score a converted data set"):
        score(config(made, tmp_path / "s", bundle=str(folder), input=str(log)))
    assert not (tmp_path / "s").exists()


def test_a_bundle_of_other_rows_than_its_vocabulary_is_refused(made, tmp_path):
    assert Manifest.read(made.data).table_rows == RESERVED_ROWS + ITEMS
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    manifest = BundleManifest.read(folder)
    replace(manifest, table_rows=manifest.table_rows + 1).write(folder)
    with pytest.raises(InputError, match="but its vocabulary has"):
        Bundle.open(folder, CPU)
