"""Suite `step`: the whole training step, everything included, and its parts one by one.

The step is the trainer's own: loader thread, copy to the device, lookups, encoder, full softmax,
clipping, all optimizers. The parts are timed alone on one batch of the same run: a sum of parts
above the step is overlap, below it is the host or the gaps between kernels.

Legend: T tokens, S read positions, C candidates, D width.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from data.batch import SequenceBatch
from data.loader import TrainingSteps
from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from modules.products import fp32_products
from tools.benchmarks import loss as loss_suite
from tools.benchmarks import table as table_suite
from tools.benchmarks.bench import Bench
from tools.benchmarks.data import with_data
from tools.benchmarks.inputs import ML1M_ITEMS, ML1M_USERS, write_data_set
from tools.benchmarks.measure import Floor
from trainer import build
from trainer.checkpoint import RunState
from trainer.config import Config
from trainer.observe import flops_per_token
from trainer.parts import candidates
from trainer.resolve import candidate_count, resolve, table_optimizer
from trainer.sharding import Sharded, plan_table, shard
from trainer.stepper import Stepper
from trainer.world import World


def run(bench: Bench) -> None:
    small = bench.size(16_384, 8_192, 2_560)
    sizes = [small] if bench.quick else [small, bench.size(262_144, 16_384, 0)]
    with tempfile.TemporaryDirectory(prefix="ssd4rec-benchmark-") as folder:
        path = write_data_set(Path(folder) / "data", ML1M_USERS, ML1M_ITEMS, seed=1)
        for tokens in sizes:
            with bench.case(f"{tokens:,} tokens"), ExitStack() as stack:
                config = step_config(bench.config, path, tokens)
                stepper, steps = assemble(bench, config, stack)
                _measure(bench, f"{tokens:,} tokens", stepper, steps)


def step_config(config: Config, path: Path, batch_tokens: int) -> Config:
    """The config's model and optimizers on ML-1M's sizes: causal, every item a candidate."""
    config = with_data(config, path, "histories", batch_tokens)
    return replace(config, loss=replace(config.loss, kind="full"))


def assemble(bench: Bench, config: Config, stack: ExitStack) -> tuple[Stepper, TrainingSteps]:
    """What takes the trainer's steps, and the steps to take."""
    dataset = HistoryDataset(Path(config.data.path))
    config = resolve(config, bench.world, dataset)
    sharded = placed(config, dataset.table_rows, bench.world)
    vocabulary = Vocabulary.read(dataset.folder)
    steps = stack.enter_context(loaded(config, dataset, vocabulary, bench.world))
    return Stepper(sharded, config.trainer, bench.world, config.seed), steps


def placed(config: Config, table_rows: int, world: World) -> Sharded:
    """A resolved config's model, planned and sharded as the trainer does it."""
    model = build.recommender(config, table_rows, world)
    looked_up = candidate_count(config, table_rows, world)
    plan = plan_table(model, config.embedding, world, config.data.tokens_a_batch, looked_up)
    return shard(model, plan, config.embedding, config.trainer, world, config.seed)


def loaded(
    config: Config, dataset: HistoryDataset, vocabulary: Vocabulary, world: World
) -> TrainingSteps:
    """The steps of a run that begins; a context manager."""
    drawn = candidates(config, dataset.table_rows, vocabulary, world)
    return build.training_steps(config, dataset, drawn, world, RunState())


def _measure(bench: Bench, name: str, stepper: Stepper, steps: TrainingSteps) -> None:
    number = 0
    last = next(steps)
    tokens, batch = last.tokens, last.batch.to(bench.device)
    targets_a_token = last.targets / last.tokens
    model = bench.config.model
    flops = tokens * flops_per_token(model, batch.candidates_C.numel(), targets_a_token)

    def step() -> None:
        nonlocal number
        stepper.take(next(steps), number)
        number += 1

    each = bench.size(max(5, 327_680 // tokens), 1, 1)
    warm_up, groups = bench.size(10, 2, 1), bench.size(7, 3, 3)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    times = bench.timer.steps(step, warm_up, each, groups)
    peak = torch.cuda.max_memory_allocated(bench.device) if bench.on_gpu else None
    useful = Floor(0, flops, bench.precision)
    whole = bench.keep(f"{name}: whole step", times, work=tokens, floor=useful, peak=peak)
    alone = bench.timer.steps(lambda: next(steps), warm_up=6, each=20, groups=3)
    summed = bench.keep(f"{name}: loader alone", alone).median_ms
    hosted = next(steps).batch
    for part, (call, floor) in _parts(bench, stepper, hosted, batch).items():
        row = bench.record(f"{name}: {part}", call, floor=floor, gradient_bytes=None)
        summed += row.median_ms
    rate = bench.ceilings.flops_per_second[bench.precision]
    bench.find(
        f"{name}: {summed:.2f} ms of parts make a step of {whole.median_ms:.2f} ms; MFU "
        f"{1e3 * flops / whole.median_ms / rate:.1%} of the measured matrix rate"
    )


def _parts(
    bench: Bench, stepper: Stepper, hosted: SequenceBatch, batch: SequenceBatch
) -> dict[str, tuple[Callable[[], object], Floor | None]]:
    """Each part as a call on one batch, with its floor. Leaves the dense gradients in place."""
    recommender, model = stepper.sharded.recommender, bench.config.model

    def encoded() -> torch.Tensor:
        read_S = batch.read_positions_S
        where = batch.offsets_B1, read_S, read_S is not None
        return recommender.encoder(x_TD, *where, recommender.autocast)

    with torch.no_grad():
        x_TD, c_CD = (one.detach() for one in recommender.table(batch.features))
        with bench.autocast():
            h_SD = encoded()
    dx_TD, dc_CD = torch.randn_like(x_TD) * 1e-4, torch.randn_like(c_CD) * 1e-4
    dh_SD = torch.randn_like(h_SD)
    for leaf in (x_TD, c_CD, h_SD):
        leaf.requires_grad_()
    candidates_C = batch.candidates_C
    repeat = set(recommender.encoder.repeat.parameters())  # the loss's, not the encoder's
    dense = [one for one in recommender.encoder.parameters() if one not in repeat]

    def table() -> None:
        torch.autograd.backward(recommender.table(batch.features), (dx_TD, dc_CD))

    def encode() -> tuple[torch.Tensor, ...]:
        with fp32_products(bench.precision):
            with bench.autocast():
                out_SD = encoded()
            return torch.autograd.grad(out_SD, [x_TD, *dense], dh_SD)

    def loss() -> None:
        inputs = h_SD, batch.targets_S, c_CD, candidates_C, batch.log_counts_C
        with fp32_products(bench.precision):
            with bench.autocast():
                total = recommender.loss(*inputs, recommender.histories(h_SD, batch))
            torch.autograd.grad(total, (h_SD, c_CD))

    def update() -> None:
        if most := stepper.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(stepper.sharded.dense_parameters, most)
        stepper.sharded.optimizer.step()

    for one, gradient in zip(dense, encode()[1:], strict=True):
        one.grad = gradient
    graphs = stepper.config.cuda_graphs
    tokens, rows, width = len(x_TD), len(c_CD), model.width
    numbers = sum(one.numel() for one in dense)
    flops = tokens * flops_per_token(model, 0, 0.0)
    distinct = int(batch.features.values().unique().numel())
    optimizer = table_optimizer(bench.config.embedding.optimizer, bench.device)
    return {
        "copy to the device": (lambda: hosted.to(bench.device, non_blocking=True), None),
        "lookup, fused update": (
            table,
            table_suite.floor(tokens + rows, distinct, optimizer, width),
        ),
        "encoder fwd+bwd": (
            bench.graphed(encode, graphs),
            Floor(16 * tokens * width, flops, bench.precision),
        ),
        "loss fwd+bwd": (
            bench.graphed(loss, graphs),
            loss_suite.floor(tokens, rows, width, bench.precision),
        ),
        "clip, dense update": (update, Floor(4 * 7 * numbers, precision="fp32")),
    }
