"""Two GPUs of one host, by NCCL, against one and against the CPU.

The worker is that of tests/distributed, so with DEVICE = "cpu" the same tests run by gloo. Five
launches: the worker by two ranks and by one, and meanwhile a run whose rank is killed beside one
that nothing disturbs, and the steps as CUDA graphs.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.distributed.test_two_ranks import results_of, start_worker, write_data
from tests.distributed.worker import SHARDINGS, evaluate_saved
from tests.trainer.dying import KILLED_AT
from tests.trainer.launch import finish, losses, ring, start

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# fp32, and Triton's fp32 products are three of tf32: sums of another order, grown over eight steps.
LOSS = 1e-4
MAIN = [
    f"trainer.device={DEVICE}",
    "model.width=64",
    "model.state=16",
    "model.head=32",
    "trainer.evaluate_every_epochs=3",
]
NOISE = 1e-3  # of a loss of the log lines, which have five digits
EVERY = 5  # steps between two checkpoints in tests.trainer.launch


@dataclass(frozen=True)
class Found:
    """ranks: the worker's results by number of ranks. straight, killed: what the two runs said.
    graphs: the worker's process."""

    folder: Path
    ranks: dict[int, dict]
    straight: str
    killed: str
    graphs: subprocess.Popen


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Iterator[Found]:
    if DEVICE == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two CUDA devices, and there are {torch.cuda.device_count()}")
    folder = tmp_path_factory.mktemp("gpus")
    data = ring(folder / "ring")
    write_data(folder)
    options = [f"data.path={data}", *MAIN]
    straight = start([*options, f"run_dir={folder / 'straight'}"])
    killed = start(
        [*options, f"run_dir={folder / 'killed'}"],
        extra=("--standalone", "--max-restarts=1", "-m"),
        program="tests.trainer.dying",
    )
    graphs = start_worker(2, folder / "graphs.json", folder, DEVICE, "graphs")
    try:
        ranks = {number: results_of(number, folder, DEVICE) for number in (2, 1)}
        yield Found(folder, ranks, finish(straight), finish(killed), graphs)
    finally:
        for one in (straight, killed, graphs):
            if one.poll() is None:
                one.terminate()  # torchrun ends its ranks
                one.wait()


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_full_softmax_on_two_gpus_trains_as_on_one(found, sharding):
    one, two = found.ranks[1], found.ranks[2]
    assert two[f"rows {sharding}"] == one["rows row_wise"]
    assert two[f"full {sharding}"] == pytest.approx(one["full row_wise"], rel=LOSS)
    assert one["full row_wise"][-1] < 0.9 * one["full row_wise"][0]


def test_sampled_softmax_on_two_gpus_trains_as_on_one(found):
    assert found.ranks[2]["sampled"] == pytest.approx(found.ranks[1]["sampled"], rel=LOSS)


def test_ids_cross_in_a_group_of_their_own(found):
    assert found.ranks[2]["groups"] == ["ids"] * 2 + ["default"] * 2


def test_rows_and_updates_are_those_of_torchrec(found):
    assert found.ranks[2]["against TorchRec"] < 1e-5


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
def test_one_gpu_goes_on_from_a_checkpoint_of_two(found, sharding):
    expected = found.ranks[2]["full row_wise"][4:]
    for ranks in (1, 2):
        resumed = found.ranks[ranks][f"from-2 {sharding}"]
        assert resumed == pytest.approx(expected, rel=LOSS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_one_gpu_cannot_take_is_skipped_on_all(found, ranks):
    assert found.ranks[ranks]["skipped"] == [False, True, False]


def test_exact_ranks_are_the_same_on_one_gpu(found):
    assert found.ranks[2]["ranks of 2"] == found.ranks[2]["ranks"]
    assert found.ranks[1]["ranks of 2"] == found.ranks[2]["ranks"]


def test_the_cpu_reads_a_checkpoint_of_two_gpus(found, one_rank):
    """Row-wise Adagrad, whose state every device has."""
    read = evaluate_saved(one_rank, found.folder)
    assert read["ranks of 2"] == found.ranks[2]["ranks"]
    assert read["losses of 2"] == pytest.approx(found.ranks[2]["losses of 2"], rel=LOSS)


def test_a_killed_rank_is_started_again_and_loses_nothing(found):
    """In bf16 and with dropout, as a run is by default."""
    expected, seen = (
        {step: float(loss) for step, loss in losses(one).items()}
        for one in (found.straight, found.killed)
    )
    assert seen == pytest.approx(expected, rel=NOISE)
    resumed = KILLED_AT - 1 - (KILLED_AT - 1) % EVERY
    assert f"resuming at step {resumed}" in found.killed


@pytest.fixture(scope="module")
def graphs(found) -> dict:
    """Of its own, so that a graph that hangs fails nothing else."""
    finish(found.graphs, seconds=60)
    return json.loads((found.folder / "graphs.json").read_text())


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_graphs_on_two_gpus_take_the_steps_that_calls_take(found, graphs, loss):
    called = found.ranks[2]["full row_wise" if loss == "full" else "sampled"]
    assert graphs[loss] == pytest.approx(called, rel=LOSS)
