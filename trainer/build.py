"""The parts of a run, each made from its piece of the config."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.errors import InputError
from data.evaluation import EvaluationBatches
from data.loader import TrainingSteps
from data.negatives import Candidates, FullCandidates, SampledCandidates
from data.packing import default_batch_tokens, default_max_sequences
from data.reader import HistoryDataset
from data.samples import Objective, SampleRule, Split
from data.vocabulary import Vocabulary
from modules.encoder import Encoder
from modules.item_table import ItemTable
from modules.losses import FullSoftmax, SampledSoftmax
from modules.recommender import Recommender
from modules.repeats import first_bytes
from trainer.checkpoint import RunState
from trainer.config import Config, DataConfig, check_kernels
from trainer.distributed import World
from trainer.observe import Observer, flops_per_token
from trainer.sharding import DTYPES, table_learning_rate, table_optimizer
from trainer.stop import StopRequest

OBJECTIVES: dict[str, Objective] = {"histories": "causal", "prefixes": "prefix"}
REPEAT_BYTES = 1 << 32  # of `modules.repeats.Repeats.first_ZC`


def resolve(config: Config, world: World, dataset: HistoryDataset) -> Config:
    """The config with every `auto` and null replaced by what it stands for here.

    Raises InputError for sizes that this device has no kernel for, and data without a sample.
    """
    train, data = config.trainer, config.data
    if world.device.type == "cuda":
        model = config.model
        check_kernels(model.head, model.state, model.conv, model.expand * model.width)
    kind: Literal["cpu", "cuda"] = "cuda" if world.device.type == "cuda" else "cpu"
    optimizer = table_optimizer(config.embedding.optimizer, world.device)
    if optimizer == "adam" and config.embedding.dtype == "fp16":
        raise InputError(
            f"embedding.optimizer={config.embedding.optimizer} is adam here, which with "
            "embedding.dtype=fp16 is broken in FBGEMM; use partial_rowwise_adam or rowwise_adagrad"
        )
    rate = table_learning_rate(config.embedding, optimizer)
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    if data.batch_tokens is None:
        tokens = batch_tokens_for(data, dataset.n_train_U)
        most = None if data.max_history is None else min(data.max_history, tokens)
        data = replace(data, batch_tokens=tokens, max_history=most)
        config = replace(config, data=data)
    sequences = data.max_sequences
    if sequences is None:
        counts = sample_rule(config).counts(dataset.n_train_U)
        if not counts.samples:
            raise InputError(
                f"{data.path} has no user with two training events, so nothing to learn from; "
                "convert a larger log or lower min_user_events and min_item_events"
            )
        sequences = default_max_sequences(data.tokens_a_batch, counts.tokens / counts.samples)
    resolved = replace(
        config,
        embedding=replace(config.embedding, optimizer=optimizer, learning_rate=rate),
        trainer=replace(train, precision=precision, device=kind),
        data=replace(data, max_sequences=sequences),
    )
    needed = repeat_bytes(resolved, dataset.table_rows, world)
    if needed > REPEAT_BYTES:
        raise InputError(
            f"model.repeats=true needs {needed:,} bytes on each rank to tell the repeats among a "
            f"batch's candidates, above {REPEAT_BYTES:,}; use loss=sampled without loss.in_batch, "
            "lower data.max_sequences or data.batch_tokens, or set model.repeats=false"
        )
    return resolved


def batch_tokens_for(data: DataConfig, n_train_U: np.ndarray) -> int:
    """What `data.batch_tokens=null` stands for, whatever the number of ranks."""
    longest = int(n_train_U.max(initial=0)) + 1  # with what evaluation adds
    if data.max_history is not None:
        longest = min(longest, data.max_history)
    rule = SampleRule(OBJECTIVES[data.samples], longest, "truncate")
    return default_batch_tokens(int(rule.tokens_a_user(n_train_U).sum()), longest)


def sample_rule(config: Config) -> SampleRule:
    """How histories become training samples."""
    data = config.data
    return SampleRule(
        OBJECTIVES[data.samples],
        data.tokens_a_batch,
        data.long_history,
        data.overlap_tokens,
        data.max_history,
    )


def recommender(config: Config, table_rows: int, world: World) -> Recommender:
    """The model with its table on the meta device: no row exists before it is sharded."""
    torch.manual_seed(config.seed)
    with torch.device(world.device):
        encoder = Encoder(**asdict(config.model))
    loss: FullSoftmax | SampledSoftmax
    if config.loss.kind == "full":
        loss = FullSoftmax(world.rank, smoothing=config.loss.smoothing)
    else:
        loss = SampledSoftmax(config.loss.negatives, config.loss.in_batch, config.loss.logq)
    table = ItemTable(
        table_rows,
        config.model.width,
        DTYPES[config.embedding.dtype],
        device=torch.device("meta"),
    )
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Recommender(table, encoder, loss, kinds[config.trainer.precision])


def candidates(config: Config, table_rows: int, counts: Vocabulary, world: World) -> Candidates:
    """Each rank's slice of the rows for the full softmax, draws for the sampled one."""
    if config.loss.kind == "full":
        return FullCandidates(table_rows, world.rank, world.size)
    return SampledCandidates(
        config.loss.distribution,
        config.loss.negatives,
        counts.counts,
        config.loss.in_batch,
        config.seed,
    )


def candidate_count(config: Config, table_rows: int, world: World) -> int:
    """Candidates of a rank's batch: its slice of the rows, or the draws and the targets."""
    if config.loss.kind == "full":
        return -(-table_rows // world.size)
    return config.loss.negatives + reads(config)


def scored_candidates(config: Config, table_rows: int) -> int:
    """Candidates that a position is scored against, over all ranks."""
    if config.loss.kind == "full":
        return table_rows
    return config.loss.negatives + (reads(config) if config.loss.in_batch else 0)


def repeat_bytes(config: Config, table_rows: int, world: World) -> int:
    """Bytes of what tells the repeats among a rank's candidates; 0 without model.repeats."""
    if not config.model.repeats:
        return 0
    sequences = (config.data.max_sequences or 1) + 1
    if config.loss.kind == "full":
        candidates = candidate_count(config, table_rows, world)
        return first_bytes(sequences * world.size, candidates)
    # Twice: by distinct item, and by candidate.
    return 2 * first_bytes(sequences, scored_candidates(config, table_rows))


def reads(config: Config) -> int:
    """Read positions of a batch."""
    data = config.data
    return data.tokens_a_batch if data.samples == "histories" else data.max_sequences or 1


def training_steps(
    config: Config,
    dataset: HistoryDataset,
    drawn: Candidates,
    world: World,
    state: RunState,
) -> TrainingSteps:
    """This rank's steps from the state's position to the end of training."""
    data = config.data
    return TrainingSteps(
        dataset,
        objective=OBJECTIVES[data.samples],
        batch_tokens=data.tokens_a_batch,
        max_sequences=data.max_sequences or 1,
        mask_ratio=data.mask_ratio,
        reorder_ratio=data.reorder_ratio,
        long_history=data.long_history,
        overlap=data.overlap_tokens,
        max_history=data.max_history,
        window_tokens=data.window_tokens,
        seed=config.seed,
        candidates=drawn,
        rank=world.rank,
        world_size=world.size,
        max_epochs=config.trainer.max_epochs,
        position=state.position,
        hint=(state.epoch, state.epoch_start),
        pin_memory=world.device.type == "cuda",
    )


def evaluation_batches(
    config: Config, dataset: HistoryDataset, split: Split, world: World
) -> EvaluationBatches:
    """This rank's evaluation batches of a split, in the same number on every rank.

    Raises InputError for a split without a target.
    """
    data = config.data
    batches = EvaluationBatches(
        dataset,
        split,
        config.trainer.targets,
        data.tokens_a_batch,
        data.max_sequences or 1,
        world.rank,
        world.size,
        data.max_history,
    )
    if not batches.samples:
        raise InputError(
            f"{data.path} has no {split} target with a history before it; convert the log with "
            "another split"
        )
    return batches


def observer(
    config: Config,
    dataset: HistoryDataset,
    run_dir: Path,
    world: World,
    steps: TrainingSteps,
    state: RunState,
    stop: StopRequest,
) -> Observer:
    """The run's observer, which begins by saying what an epoch holds and what is resumed."""
    counts = steps.counts
    scored = scored_candidates(config, dataset.table_rows)
    eyes = Observer(
        run_dir,
        world,
        steps.estimated_steps(),
        state.step,
        config.trainer.log_every_steps,
        flops_per_token(config.model, scored, counts.targets / counts.tokens),
        stop,
    )
    eyes.say(
        f"an epoch: {counts.samples:,} samples, {counts.tokens:,} tokens, "
        f"{counts.targets:,} targets"
    )
    if counts.windowed_histories or counts.truncated_histories:
        limit = f"data.batch_tokens={config.data.tokens_a_batch}"
        if config.data.max_history is not None:
            limit = f"data.max_history={config.data.max_history}"
        eyes.say(
            f"histories longer than {limit}: "
            f"{counts.windowed_histories:,} in windows ({counts.repeated_tokens:,} tokens read "
            f"again), {counts.truncated_histories:,} truncated ({counts.dropped_tokens:,} tokens "
            "dropped)"
        )
    if state.step:
        eyes.say(f"resuming at step {state.step:,}")
    return eyes
