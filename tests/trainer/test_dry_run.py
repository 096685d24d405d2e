"""Estimates of a dry run against sums done by hand."""

from dataclasses import replace

import pytest
import torch

from tests.trainer.test_config import composed
from tools.benchmarks.measure import Ceilings
from trainer import build
from trainer.dry_run import (
    Sizes,
    memory_lines,
    saved_bytes_per_token,
    step_lines,
    table_milliseconds,
)
from trainer.memory import TableMemory
from trainer.observe import flops_per_token
from trainer.world import World

ROWS, WIDTH, TOKENS, NEGATIVES = 1000, 64, 512, 88
CEILINGS = Ceilings(1e9, {"fp32": 1e12})
CPU = World(0, 1, 0, 1, torch.device("cpu"))


def config(*overrides: str):
    return composed(
        f"model.width={WIDTH}",
        "loss=sampled",
        f"loss.negatives={NEGATIVES}",
        f"data.batch_tokens={TOKENS}",
        "embedding.dtype=fp16",
        "embedding.optimizer=rowwise_adagrad",
        "trainer.precision=fp32",
        *overrides,
    )


def sizes_of(chosen, world: World = CPU) -> Sizes:
    return Sizes.of(chosen, build.recommender(chosen, ROWS, world), ROWS, world)


def test_sizes_of_a_sampled_and_a_full_loss():
    assert sizes_of(config()).scored == TOKENS * NEGATIVES
    assert sizes_of(config("loss.in_batch=true")).scored == TOKENS * (NEGATIVES + TOKENS)
    full = sizes_of(config("loss=full"), replace(CPU, size=2, local_size=2))
    assert full.looked_up == TOKENS + ROWS // 2
    assert full.scored == 2 * TOKENS * ROWS // 2


@pytest.mark.parametrize(
    ("offload", "link", "local", "remote"),
    [
        # Weights read twice and written once, state read and written once.
        ("none", None, 3 * 128 + 2 * 4, 0),
        ("uvm", 1e8, 0, 3 * 128 + 2 * 4),
        ("uvm_caching", 1e8, 0.25 * 3 * 128, 0.75 * 3 * 128 + 2 * 4),
    ],
)
def test_table_traffic(offload, link, local, remote):
    chosen = config(f"embedding.offload={offload}", "embedding.cache_share=0.25")
    sizes = sizes_of(chosen)
    table = TableMemory.of(ROWS, WIDTH, chosen.embedding, torch.device("cuda"))
    looked_up = TOKENS + NEGATIVES + TOKENS
    expected = 1e3 * (2 * looked_up * WIDTH * 4 + ROWS * local) / 1e9 + 1e3 * ROWS * remote / 1e8
    found = table_milliseconds(chosen, sizes, [table], table, CEILINGS, link)
    assert found == pytest.approx(expected)


def test_a_table_on_one_rank_serves_all():
    chosen = config()
    sizes = sizes_of(chosen, replace(CPU, size=2, local_size=2))
    halves = [TableMemory.of(ROWS // 2, WIDTH, chosen.embedding, CPU.device)] * 2
    whole = [TableMemory.of(n, WIDTH, chosen.embedding, CPU.device) for n in (ROWS, 0)]
    each = [table_milliseconds(chosen, sizes, halves, one, CEILINGS, None) for one in halves]
    one, none = (table_milliseconds(chosen, sizes, whole, two, CEILINGS, None) for two in whole)
    assert each == pytest.approx([one / 2, one / 2])
    assert none == 0


def test_lines_state_parts_sum_and_basis():
    chosen = config()
    sizes = sizes_of(chosen)
    table = TableMemory.of(ROWS, WIDTH, chosen.embedding, torch.device("cuda"))
    total, basis = step_lines(chosen, sizes, [table], CEILINGS, None)
    encoder = 1e3 * TOKENS * flops_per_token(chosen.model, 0, 0) / 1e12
    loss = 1e3 * 6 * TOKENS * NEGATIVES * WIDTH / 1e12
    assert f"encoder {encoder:,.2f} + loss {loss:,.2f} + table " in total
    assert "a copy's 1 GB/s" in basis
    assert "fp32 matrix product's 1.00 TFLOP/s" in basis
    *parts, last = memory_lines(sizes, [table], 100.0, torch.device("cuda"))
    assert len(parts) == 5
    assert last.endswith("of device memory")


def test_saved_bytes_grow_with_layers():
    shallow, deep = (
        saved_bytes_per_token(
            build.recommender(config(f"model.layers={layers}"), ROWS, CPU), CPU.device
        )
        for layers in (1, 3)
    )
    assert 4 * WIDTH < shallow < deep < 3.2 * shallow
