"""`trainer.precision` governs the products of a step, forward and backward, and no others."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from modules.losses import FullSoftmax
from tests.distributed.worker import TRAIN, build
from tests.trainer.test_nonfinite import step_of
from trainer.stepper import Stepper


@pytest.mark.parametrize(
    ("precision", "switch"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "highest")]
)
def test_a_step_takes_its_products_as_configured(one_rank, precision, switch):
    sharded = build(one_rank, "row_wise", FullSoftmax(0))
    stepper = Stepper(sharded, replace(TRAIN, precision=precision), one_rank, seed=1)
    forward, seen = sharded.recommender.loss_of_rows, []

    def note(tensor: Tensor) -> Tensor:
        seen.append(torch.get_float32_matmul_precision())
        return tensor

    def noted(*args: Tensor) -> Tensor:
        loss = note(forward(*args))
        loss.register_hook(note)
        return loss

    sharded.recommender.loss_of_rows = noted
    stepper.take(step_of(0, one_rank), 0)
    assert seen == [switch, switch]
    assert torch.get_float32_matmul_precision() == "highest"
