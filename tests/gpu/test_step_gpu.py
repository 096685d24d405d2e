"""The trainer's step on the card: its graphs compute what its calls do, and nothing waits."""

import numpy as np
import pytest
import torch

from data.batch import SequenceBatch
from data.loader import Step
from data.negatives import SampledCandidates, full_slice
from data.schema import RESERVED_ROWS
from tests.trainer.test_config import composed
from trainer import build
from trainer.distributed import process_group
from trainer.evaluate import look_up
from trainer.resolve import candidate_count
from trainer.sharding import plan_table, shard
from trainer.stepper import Stepper
from trainer.world import World

pytestmark = pytest.mark.gpu

ROWS, TOKENS, NEGATIVES, SEED = 1_000, 2_048, 1_024, 5


@pytest.fixture(scope="module")
def world():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with process_group("cuda") as world:
        yield world


def stepper_of(world: World, *overrides: str) -> Stepper:
    config = composed(
        "model.width=64",
        "model.state=16",
        "model.head=32",
        f"data.batch_tokens={TOKENS}",
        "trainer.device=cuda",
        "trainer.precision=fp32",
        "embedding.optimizer=adam",
        "embedding.learning_rate=1e-3",
        "trainer.weight_decay=0.1",
        *overrides,
    )
    recommender = build.recommender(config, ROWS, world)
    candidates = candidate_count(config, ROWS, world)
    plan = plan_table(recommender, config.embedding, world, TOKENS, candidates)
    sharded = shard(recommender, plan, config.embedding, config.trainer, world, SEED)
    return Stepper(sharded, config.trainer, world, SEED)


def steps_of(sampled: bool, count: int = 6) -> list[Step]:
    """Batches of random ids and lengths, pinned as the loader's are."""
    random = np.random.default_rng(0)
    drawn = SampledCandidates("uniform", NEGATIVES, np.zeros(ROWS, np.int64), False, SEED)
    steps = []
    for number in range(count):
        ids = random.integers(RESERVED_ROWS, ROWS, (2, TOKENS))
        candidates, log_counts = full_slice(ROWS, 0, 1), None
        if sampled:
            candidates, log_counts = drawn.for_pack(number, ids[1])
        bounds = np.sort(random.integers(0, TOKENS + 1, 30))
        batch = SequenceBatch.build(
            torch.from_numpy(ids[0]),
            torch.from_numpy(candidates),
            torch.from_numpy(np.concatenate([[0], bounds, [TOKENS]])),
            torch.from_numpy(ids[1]),
            None,
            None if log_counts is None else torch.from_numpy(log_counts),
            step_targets=float(TOKENS),
        )
        steps.append(Step(batch.pin_memory(), number, 0, 0, False, number / 9, TOKENS, TOKENS))
    return steps


def weights(run: Stepper) -> dict[str, torch.Tensor]:
    rows = look_up(run.sharded.recommender, torch.arange(ROWS, device="cuda"))
    dense = {n: p.detach().clone() for n, p in run.sharded.recommender.encoder.named_parameters()}
    return {"rows": rows.detach(), **dense}


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_graphs_take_the_steps_that_calls_take(world, loss):
    """The third run changes its `Stepper` on the way, as a resumed one does."""
    chosen = [f"loss={loss}", "model.dropout=0", "trainer.warmup_steps=0"]
    called = stepper_of(world, *chosen, "trainer.cuda_graphs=false")
    replayed, changed = stepper_of(world, *chosen), stepper_of(world, *chosen)
    for number, step in enumerate(steps_of(loss == "sampled")):
        if number == 3:
            changed = Stepper(changed.sharded, replayed.config, world, SEED)
            peaks = [peak for _, peak in replayed._peaks]
            changed._peaks = [(one, p) for (one, _), p in zip(changed._peaks, peaks, strict=True)]
        outcomes = [run.take(step, number) for run in (called, replayed, changed)]
        for one in outcomes[1:]:
            torch.testing.assert_close(one.loss, outcomes[0].loss, rtol=1e-5, atol=0)
            torch.testing.assert_close(one.norm, outcomes[0].norm, rtol=1e-4, atol=0)
    expected = weights(called)
    for run in (replayed, changed):
        for name, value in weights(run).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("loss", ["full", "sampled"])
@pytest.mark.parametrize("optimizer", ["adam", "rowwise_adagrad"])
def test_nothing_waits_for_the_device(world, loss, optimizer):
    run = stepper_of(world, f"loss={loss}", f"embedding.optimizer={optimizer}")
    steps = steps_of(loss == "sampled")
    outcomes = [run.take(step, number) for number, step in enumerate(steps[:2])]
    torch.cuda.set_sync_debug_mode("error")
    try:
        outcomes += [run.take(step, number) for number, step in enumerate(steps[2:], 2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    losses = [float(one.loss) for one in outcomes]
    assert len(set(losses)) == len(losses)  # each its own, not the last one's place
    assert losses[-1] < losses[0]


def test_dropout_is_a_function_of_the_step(world):
    """A graph's masks differ from step to step, and are the same in every run."""
    (step,) = steps_of(sampled=False, count=1)
    first, second = (stepper_of(world) for _ in range(2))
    for run in (first, second):
        run._peaks = [(group, 0.0) for group, _ in run._peaks]
    losses = [[float(run.take(step, n).loss) for n in (0, 1, 2, 0)] for run in (first, second)]
    assert losses[0] == losses[1]
    assert losses[0][0] == losses[0][3]  # the first one captures
    assert len(set(losses[0])) == 3
