"""The item table on the card: offloaded against in memory, 100 M rows, and a step's cost then."""

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from data.batch import SequenceBatch
from data.errors import InputError
from data.loader import Step
from data.negatives import SampledCandidates
from data.schema import RESERVED_ROWS
from modules.item_table import fill_rows
from tests.conftest import ROOT
from tests.data.datasets import random_histories, write_dataset
from tests.trainer.test_config import composed
from tools.benchmarks.measure import release
from trainer import build
from trainer.checkpoint import RunState, checkpoint_path, load
from trainer.config import Config
from trainer.distributed import process_group
from trainer.evaluate import look_up
from trainer.memory import memory_by_rank
from trainer.resolve import candidate_count
from trainer.saver import Saver
from trainer.sharding import Sharded, plan_table, shard
from trainer.stepper import Stepper
from trainer.world import World

pytestmark = pytest.mark.gpu

WIDTH, SEED = 128, 3
LARGE = 100_000_000


@pytest.fixture(scope="module")
def process_world():
    with process_group("cuda") as world:
        yield world


@pytest.fixture
def world(process_world):
    """With the memory of the test before given back."""
    release(process_world.device)
    return process_world


def stepper_of(world: World, rows: int, *overrides: str, tokens: int = 4096) -> Stepper:
    """The trainer's steps on a sampled softmax."""
    config = composed(
        f"model.width={WIDTH}",
        "model.layers=1",
        "model.dropout=0",
        "loss=sampled",
        "loss.distribution=uniform",
        f"data.batch_tokens={tokens}",
        f"trainer.device={world.device.type}",
        "trainer.precision=fp32",
        "embedding.learning_rate=0.05",
        *overrides,
    )
    return Stepper(sharded_of(config, rows, world), config.trainer, world, SEED)


def sharded_of(config: Config, rows: int, world: World) -> Sharded:
    recommender = build.recommender(config, rows, world)
    candidates = candidate_count(config, rows, world)
    plan = plan_table(recommender, config.embedding, world, config.data.batch_tokens, candidates)
    (planned,) = memory_by_rank(plan, config.embedding, world)
    before = torch.cuda.memory_allocated() if world.device.type == "cuda" else 0
    sharded = shard(recommender, plan, config.embedding, config.trainer, world, SEED)
    if world.device.type == "cuda":
        taken = torch.cuda.memory_allocated() - before
        assert taken == pytest.approx(planned.needed.device, rel=0.02, abs=64 * 2**20)
    return sharded


def batches(rows: int, count: int, tokens: int = 4096) -> list[Step]:
    """Steps of uniform ids, each touching far more rows than a small cache has."""
    random = np.random.default_rng(0)
    drawn = SampledCandidates("uniform", 1024, np.zeros(rows, np.int64), False, SEED)
    steps = []
    for number in range(count):
        ids = random.integers(RESERVED_ROWS, rows, (2, tokens))
        candidates, log_counts = drawn.for_pack(number, ids[1])
        batch = SequenceBatch.build(
            torch.from_numpy(ids[0]),
            torch.from_numpy(candidates),
            torch.arange(0, tokens + 1, 128),
            torch.from_numpy(ids[1]),
            None,
            torch.from_numpy(log_counts),
            step_targets=float(tokens),
        )
        steps.append(Step(batch, number, 0, 0, False, 0.0, tokens, tokens))
    return steps


@torch.no_grad()
def rows_of(run: Stepper, ids: torch.Tensor) -> torch.Tensor:
    return look_up(run.sharded.recommender, ids.to(run.world.device)).cpu()


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "partial_rowwise_adam"])
@pytest.mark.parametrize("offload", ["uvm", "uvm_caching"])
def test_an_offloaded_table_is_the_one_in_memory(world, tmp_path, offload, optimizer):
    rows = 50_000
    steps, every = batches(rows, 6), torch.arange(rows)
    chosen = [f"embedding.optimizer={optimizer}", "embedding.cache_share=0.02"]
    here = stepper_of(world, rows, *chosen)
    there = stepper_of(world, rows, *chosen, f"embedding.offload={offload}")
    assert_rows_equal(there, rows_of(here, every))
    for number, step in enumerate(steps):
        losses = [run.take(step, number).loss for run in (here, there)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
    trained = rows_of(there, every)
    torch.testing.assert_close(trained, rows_of(here, every), rtol=1e-3, atol=1e-4)

    # What the cache holds reaches the checkpoint, and a load empties the cache.
    state = RunState(step=6)
    with Saver(tmp_path, there.sharded, world, RunState(), "", 1, True, print) as saver:
        saver.save(state, {})
        saver.require_written(saver.settle(state))
    for number, step in enumerate(steps):
        there.take(step, number)
    further = rows_of(there, every)
    assert not torch.equal(further, trained)
    load(checkpoint_path(tmp_path, 6), there.sharded)
    assert_rows_equal(there, trained)

    # A new process goes on as if nothing had happened, wherever the table lies.
    for place in ("none", offload):
        run = stepper_of(world, rows, *chosen, f"embedding.offload={place}")
        load(checkpoint_path(tmp_path, 6), run.sharded)
        assert_rows_equal(run, trained)
        run = Stepper(run.sharded, run.config, world, SEED)  # which reads the count of updates
        for number, step in enumerate(steps):
            run.take(step, number)
        # Twelve updates of up to 0.05 an element, where sums of another order begin to show.
        torch.testing.assert_close(rows_of(run, every), further, rtol=1e-3, atol=5e-4)


def assert_rows_equal(run: Stepper, expected: torch.Tensor) -> None:
    found = rows_of(run, torch.arange(len(expected)))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_hundred_million_rows_of_fp16(world):
    run = stepper_of(world, LARGE, "embedding.dtype=fp16", "embedding.optimizer=rowwise_adagrad")
    for first in (0, LARGE // 2, LARGE - 1000):
        expected = torch.empty(1000, WIDTH, device=world.device)
        fill_rows(expected, SEED, first)
        found = rows_of(run, torch.arange(first, first + 1000))
        torch.testing.assert_close(found, expected.half().float().cpu(), rtol=0, atol=0)
    (step,) = batches(LARGE, 1)
    touched = step.batch.features["history"].values()
    before = rows_of(run, touched)
    assert torch.isfinite(run.take(step, 0).loss)
    assert (rows_of(run, touched) != before).any(1).float().mean() > 0.99


def test_a_sampled_step_does_not_grow_with_the_catalogue(world):
    """1 M to 100 M rows: the same time within 20 %, the same memory besides the table."""
    seconds, peaks = [], []
    for rows in (1_000_000, LARGE):
        run = stepper_of(
            world,
            rows,
            "embedding.dtype=fp16",
            "embedding.optimizer=rowwise_adagrad",
            tokens=16_384,
        )
        steps = batches(rows, 30, 16_384)
        for number, step in enumerate(steps[:10]):
            run.take(step, number)
        torch.cuda.synchronize()
        table = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for number, step in enumerate(steps[10:]):
            started = time.perf_counter()
            run.take(step, number)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        seconds.append(statistics.median(times))
        peaks.append(torch.cuda.max_memory_allocated() - table)
        del run
        release(world.device)
    print(json.dumps({"seconds": seconds, "bytes besides the table": peaks}))
    assert seconds[1] < 1.2 * seconds[0]
    assert peaks[1] < 1.2 * peaks[0]


def test_dry_run_of_an_offloaded_table(tmp_path):
    data = write_dataset(tmp_path / "data", random_histories(50, 40, 300))
    command = [
        sys.executable,
        "trainer/main.py",
        f"data.path={data}",
        f"run_dir={tmp_path / 'run'}",
        "loss=sampled",
        "embedding.offload=uvm_caching",
        "dry_run=true",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kernel fused_uvm_caching" in done.stdout
    assert "in host memory, cache" in done.stdout
    assert "GB/s from the host" in done.stdout


def test_more_than_the_card_is_refused(world):
    total = torch.cuda.get_device_properties(world.device).total_memory
    config = composed(
        "loss=sampled", "embedding.optimizer=sgd", f"model.width={WIDTH}", "trainer.precision=fp32"
    )
    recommender = build.recommender(config, total // (4 * WIDTH), world)
    before = torch.cuda.memory_allocated()
    with pytest.raises(InputError, match="of device memory a rank"):
        plan_table(recommender, config.embedding, world, 4096, 1024)
    assert torch.cuda.memory_allocated() == before
