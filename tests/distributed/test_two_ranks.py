"""Two and three gloo ranks against one: rows, losses, rankings, and checkpoints across all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.schema import RESERVED_ROWS, Manifest
from modules.item_table import fill_rows
from tests.data.datasets import random_histories, write_dataset
from tests.distributed.worker import GROWN_ROWS, ROWS, SHARDINGS, WIDTH
from tests.trainer.launch import TORCHRUN, finish, spawn


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    """The worker's results by number of ranks. Each writes checkpoints that the next reads."""
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder)
    finish(start_worker(1, folder / "saved.json", folder, "cpu", "save"))
    return {ranks: results_of(ranks, folder) for ranks in (2, 1, 3)}


def write_data(folder: Path) -> None:
    """The worker's data sets: what it evaluates, and two hosts' damaged copies of another."""
    for copy in range(2):
        data = write_dataset(folder / f"data{copy}", [[8, 9, 10]] * 8, files=4)
        flip_a_bit(data / Manifest.read(data).histories[1 + copy].path)
    histories = random_histories(60, 20, ROWS - RESERVED_ROWS)
    write_dataset(folder / "histories", histories, table_rows=ROWS, row_group_users=20)


def results_of(ranks: int, folder: Path, device: str = "cpu") -> dict:
    """The worker's results at this number of ranks."""
    out = folder / f"{ranks}.json"
    finish(start_worker(ranks, out, folder, device))
    return json.loads(out.read_text())


def start_worker(ranks: int, out: Path, folder: Path, *more: str) -> subprocess.Popen:
    launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={ranks}"]
    command = launcher if ranks > 1 else [sys.executable]
    return spawn([*command, "-m", "tests.distributed.worker", str(out), str(folder), *more])


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_rows_do_not_depend_on_ranks_or_sharding(results, sharding):
    reference = results[1]["rows row_wise"]
    assert results[2][f"rows {sharding}"] == reference
    assert len({tuple(row) for row in reference}) == len(reference)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_two_ranks_train_as_one(results, sharding):
    one, two = results[1]["full row_wise"], results[2][f"full {sharding}"]
    assert two == pytest.approx(one, rel=2e-6)
    assert one[-1] < one[0]


def test_sampled_loss_is_the_same_on_two_ranks(results):
    assert results[2]["sampled"] == pytest.approx(results[1]["sampled"], rel=2e-6)


def test_ids_cross_in_a_group_of_their_own(results):
    """Their numbers and themselves; then rows, and the rows' gradients."""
    assert results[2]["groups"] == ["ids"] * 2 + ["default"] * 2
    assert results[1]["groups"] == []


def test_rows_and_updates_are_those_of_torchrec(results):
    """Its own modules exchange them in the other model."""
    assert results[2]["against TorchRec"] < 1e-6


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_best_items_are_merged_over_shards(results, sharding):
    assert results[2][f"top {sharding}"] == results[1]["top row_wise"]


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("saved", [1, 2, "tables-of-1", "tables-of-2"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_checkpoint_resumes_at_any_number_of_ranks(results, saved, ranks, sharding):
    uninterrupted = results[2]["full row_wise"][4:]
    assert results[ranks][f"from-{saved} {sharding}"] == pytest.approx(uninterrupted, rel=2e-6)


def test_exact_ranks_are_the_same_on_two_ranks(results):
    expected = results[2]["ranks"]
    assert results[2]["ranks of 2"] == expected, "what was saved is what was evaluated"
    assert results[1]["ranks of 2"] == expected
    assert len({filtered for filtered, *_ in expected}) > 10
    assert any(filtered < unfiltered for filtered, unfiltered, *_ in expected)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_step_that_one_rank_cannot_take_is_skipped_on_all(results, ranks):
    assert results[ranks]["skipped"] == [False, True, False]


def test_hosts_that_disagree_are_told(results):
    config, folder, shared = results[2]["refusals"]
    assert (
        "rank 1 was started with another config than rank 0 (model.width is 17, not 16)" in config
    )
    assert "is not one folder for all hosts" in folder
    assert shared == ""


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("copies", "damaged"), [("one copy", [1]), ("a copy a host", [1, 2])])
def test_ranks_leave_out_the_same_damaged_files(results, copies, damaged):
    """A bit flipped in one file of a host's copy: all ranks skip it, or all end with its name."""
    for answers in (results[2][copies], results[1]["one copy"]):
        left_out, users, message = answers[0]
        assert all(answer[:2] == [left_out, users] for answer in answers)
        where = damaged if len(answers) == 2 else [1]
        assert left_out == [f"histories/part-{number:05d}.parquet" for number in where]
        kept = [number for number in range(4) if number not in where]
        assert users == [f"u{user}" for number in kept for user in (2 * number, 2 * number + 1)]
        assert all(f"{left_out[0]} is damaged, its hash" in answer[2] for answer in answers)
        assert "data.damaged_files=skip" in message


@pytest.mark.parametrize(
    ("ranks", "optimizer", "sharding"),
    [
        *((ranks, "adagrad", sharding) for ranks in (1, 2) for sharding in SHARDINGS),
        (2, "rowwise_adagrad", "column_wise"),
    ],
)
def test_a_larger_table_goes_on_from_a_checkpoint(results, ranks, optimizer, sharding):
    small, large = (f"{optimizer} {sharding} {rows}" for rows in (ROWS, GROWN_ROWS))
    found = results[ranks]
    new = torch.empty(GROWN_ROWS - ROWS, WIDTH)
    fill_rows(new, 3, ROWS)
    assert found[f"rows {large}"] == found[f"rows {small}"] + new.tolist()
    assert found[f"loss {large}"] == pytest.approx(found[f"loss {small}"], rel=2e-6)
    if optimizer == "adagrad":
        assert found[f"rows {large}"] == results[2][f"rows adagrad row_wise {GROWN_ROWS}"]


def test_no_thread_of_the_group_outlives_it(results):
    assert not [name for name in results[2]["threads"] if "gloo" in name]
