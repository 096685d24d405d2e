"""Two gloo ranks against one: same rows, losses, rankings, and checkpoints across both."""

import json
import os
import subprocess
import sys

import pytest
import torch

from modules.item_table import fill_rows
from tests.conftest import ROOT
from tests.distributed.worker import GROWN_ROWS, ROWS, SHARDINGS, WIDTH

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, dict]:
    """The worker's results by number of ranks. Two ranks write the checkpoint that one reads."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for ranks, launcher in [
        (2, [*TORCHRUN, "--standalone", "--nproc_per_node=2"]),
        (1, [sys.executable]),
    ]:
        out = folder / f"{ranks}.json"
        command = [*launcher, "-m", "tests.distributed.worker", str(out), str(folder)]
        run(command)
        found[ranks] = json.loads(out.read_text())
    return found


def run(command: list[str]) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_best_items_are_merged_over_shards(results, sharding):
    assert results[2][f"top {sharding}"] == results[1]["top row_wise"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_checkpoint_of_two_ranks_resumes_anywhere(results, ranks, sharding):
    uninterrupted = results[2]["full row_wise"][4:]
    assert results[ranks][f"resumed {sharding}"] == pytest.approx(uninterrupted, rel=2e-6)


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
