"""Suite `table`: TorchRec lookups of history rows, and lookup + backward with the fused update.

Legend: T ids of a batch, V table rows, D width.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data.batch import SequenceBatch
from data.schema import RESERVED_ROWS
from data.synthetic import Process
from tools.benchmarks.bench import Bench
from tools.benchmarks.measure import Floor
from trainer import build
from trainer.memory import STATE_NUMBERS
from trainer.resolve import TABLE_RATES
from trainer.sharding import Sharded, plan_table, shard

WIDTH = 128
OPTIMIZERS = {
    "cpu": ("rowwise_adagrad", "sgd"),
    "cuda": ("adam", "partial_rowwise_adam", "rowwise_adagrad"),
}
RATE = 1e-3  # of an optimizer without a rate of its own: a step takes as long at any
CANDIDATES = 8  # what the lookup is given besides the histories: next to nothing


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 65_536, 16_384)
    sizes = [bench.size(1_000_000, 200_000, 50_000)]
    if not bench.quick:
        sizes.append(bench.size(10_000_000, 1_000_000, 0))
    for rows in sizes:
        for optimizer in OPTIMIZERS[bench.device.type]:
            with bench.case(f"{rows:,} x {WIDTH} {optimizer}"):
                _measure(bench, rows, optimizer, tokens)


def _measure(bench: Bench, rows: int, optimizer: str, tokens: int) -> None:
    sharded = sharded_table(bench, rows, optimizer, tokens)
    lookup = sharded.recommender.table
    for spread in ("uniform", "Zipf"):
        ids_T = random_ids(rows, tokens, spread)
        batch = _batch(ids_T).to(bench.device)
        gradient_TD = torch.randn(tokens, WIDTH, device=bench.device).mul_(1e-3)

        def forward(batch: SequenceBatch = batch) -> None:
            with torch.no_grad():
                lookup(batch.features)

        def both(batch: SequenceBatch = batch, gradient_TD: Tensor = gradient_TD) -> None:
            x_TD, c_CD = lookup(batch.features)
            torch.autograd.backward([x_TD, c_CD], [gradient_TD, torch.zeros_like(c_CD)])

        name = f"{rows:,} x {WIDTH}, {spread}"
        distinct = len(np.unique(ids_T))
        if optimizer == OPTIMIZERS[bench.device.type][0]:  # the lookup is the same for all
            work = floor(tokens, distinct, None)
            bench.record(f"{name}: lookup", forward, work=tokens, floor=work)
        work = floor(tokens, distinct, optimizer)
        bench.record(f"{name}, {optimizer}: step", both, work=tokens, floor=work)


def sharded_table(bench: Bench, rows: int, optimizer: str, tokens: int) -> Sharded:
    """The trainer's own table and optimizer, behind the smallest encoder there is."""
    model = bench.model(width=WIDTH, layers=1)
    rate = bench.config.embedding.learning_rate or TABLE_RATES.get(optimizer, RATE)
    table = replace(bench.config.embedding, optimizer=optimizer, learning_rate=rate)
    train = replace(bench.config.trainer, precision="fp32")
    config = replace(bench.config, model=model, embedding=table, trainer=train)
    recommender = build.recommender(config, rows, bench.world)
    plan = plan_table(recommender, table, bench.world, tokens, CANDIDATES)
    return shard(recommender, plan, table, config.trainer, bench.world, seed=1)


def random_ids(rows: int, tokens: int, spread: str) -> np.ndarray:
    """int64 [T] items' rows; Zipf is popularity as catalogues have it (exponent 0.8)."""
    random = np.random.default_rng(1)
    items = rows - RESERVED_ROWS
    if spread == "uniform":
        return RESERVED_ROWS + random.integers(0, items, tokens)
    return RESERVED_ROWS + Process(1, 1, items, 1).zipf(random.random(tokens))


def floor(tokens: int, distinct: int, optimizer: str | None, width: int = WIDTH) -> Floor:
    """A lookup reads each distinct row once and writes T; an update reads T gradients and reads and
    writes each distinct row with its optimizer state. All fp32."""
    row = 4 * width
    moved = (tokens + distinct) * row
    if optimizer is not None:
        per_width, constant = STATE_NUMBERS[optimizer]
        state = 4 * (per_width * width + constant)
        moved += tokens * row + 2 * distinct * (row + state)
    return Floor(moved, precision="fp32")


def _batch(ids_T: np.ndarray) -> SequenceBatch:
    ids = torch.from_numpy(ids_T)
    candidates_C = torch.arange(CANDIDATES)
    offsets_B1 = torch.tensor([0, len(ids)])
    return SequenceBatch.build(ids, candidates_C, offsets_B1, torch.zeros_like(ids))
