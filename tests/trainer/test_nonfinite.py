"""Losses and gradients that are not finite: named with their step, or skipped and counted."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.errors import InputError
from data.loader import Step
from modules.losses import FullSoftmax
from tests.distributed.worker import TOKENS, TRAIN, build, global_batch
from trainer.observe import Observer
from trainer.sharding import table_kernels
from trainer.stepper import Stepper
from trainer.stop import StopRequest


@pytest.fixture
def sharded(one_rank):
    return build(one_rank, "row_wise", FullSoftmax(0))


def step_of(number: int, world) -> Step:
    batch = global_batch(number % 2, world, sampled=False)
    return Step(batch, number + 1, 0, 0, False, 0.0, 2 * TOKENS, 25)


def bad_loss(loss: Tensor) -> Tensor:
    return loss * torch.nan


def bad_gradient(loss: Tensor) -> Tensor:
    """A finite loss whose gradient is 0 / 0."""
    return loss + (loss * 0).sqrt()


def run(sharded, world, mode: str, fault, steps: int = 4) -> tuple[list, Observer | None]:
    """Steps 0 to `steps`, of which step 2 has the fault."""
    stepper = Stepper(sharded, replace(TRAIN, nonfinite=mode), world, seed=1)
    forward = sharded.recommender.loss_of_rows
    outcomes = []
    for number in range(steps):
        if number == 2:
            sharded.recommender.loss_of_rows = lambda *args: fault(forward(*args))
        outcomes.append(stepper.take(step_of(number, world), number))
        sharded.recommender.loss_of_rows = forward
    return outcomes


def weights(sharded) -> list[Tensor]:
    table = next(iter(sharded.recommender.table.state_dict().values()))
    dense = [one.detach().clone() for one in sharded.recommender.encoder.parameters()]
    return [*dense, table.local_shards()[0].tensor.clone()]


@pytest.mark.parametrize(
    ("fault", "what", "step"), [(bad_loss, "loss", 3), (bad_gradient, "gradient's norm", 3)]
)
def test_fatal_names_the_first_such_step(sharded, one_rank, tmp_path, fault, what, step):
    outcomes = run(sharded, one_rank, "fatal", fault)
    observer = Observer(tmp_path, one_rank, 9, 0, 4, 0.0, StopRequest())
    for number, outcome in enumerate(outcomes[:3]):
        observer.step(number + 1, step_of(number, one_rank), outcome)
    expected = rf"the {what} of step {step} on rank 0 \(nan; packs 2 to 2 of the run\)"
    with pytest.raises(InputError, match=expected):
        observer.require_finite(3)
    with pytest.raises(InputError, match=expected):
        observer.step(4, step_of(3, one_rank), outcomes[3])
    observer.close()


@pytest.mark.parametrize("fault", [bad_loss, bad_gradient])
def test_skipped_step_changes_nothing_but_the_count(sharded, one_rank, tmp_path, fault):
    outcomes = run(sharded, one_rank, "skip", fault)
    assert [one.skipped for one in outcomes] == [False, False, True, False]
    for one in weights(sharded):
        assert torch.isfinite(one).all()
    observer = Observer(tmp_path, one_rank, 9, 0, 4, 0.0, StopRequest())
    for number, outcome in enumerate(outcomes):
        observer.step(number + 1, step_of(number, one_rank), outcome)
    observer.close()


def test_step_with_a_bad_gradient_leaves_all_weights(sharded, one_rank):
    run(sharded, one_rank, "skip", bad_gradient, steps=2)
    before = weights(sharded)
    stepper = Stepper(sharded, replace(TRAIN, nonfinite="skip"), one_rank, seed=1)
    forward = sharded.recommender.loss_of_rows
    sharded.recommender.loss_of_rows = lambda *args: bad_gradient(forward(*args))
    assert stepper.take(step_of(2, one_rank), 2).skipped
    for one, value in zip(weights(sharded), before, strict=True):
        assert torch.equal(one, value)


def test_table_counts_updates_and_not_lookups(sharded, one_rank):
    """Adam's bias correction goes by that count, which is the dense optimizer's."""
    (table,) = table_kernels(sharded.model)
    for number in range(4):
        for count in (table.iter, table.iter_cpu):
            count.add_(7)  # as lookups of an evaluation do where the optimizer is Adam
        if number in (0, 2):
            stepper = Stepper(sharded, TRAIN, one_rank, seed=1)
        stepper.take(step_of(number, one_rank), number)
        assert int(table.iter_cpu) == number, "Adagrad leaves alone what the step began with"
        assert number or not int(table.iter), "which Adam goes by where iter_cpu is 0"


def test_skipping_costs_nothing_where_all_is_finite(one_rank):
    def losses(mode: str) -> list[float]:
        sharded = build(one_rank, "row_wise", FullSoftmax(0))
        return [float(one.loss) for one in run(sharded, one_rank, mode, lambda loss: loss)]

    assert losses("skip") == losses("fatal")
