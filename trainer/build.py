"""The parts of a run, each made from its piece of the config."""

from pathlib import Path

import torch

from data.errors import InputError
from data.evaluation import EvaluationBatches
from data.loader import TrainingSteps
from data.negatives import Candidates
from data.reader import HistoryDataset
from data.samples import Split
from modules.item_table import ItemTable
from modules.recommender import Recommender
from trainer.checkpoint import RunState
from trainer.config import Config
from trainer.observe import Observer, flops_per_token
from trainer.parts import encoder_and_loss
from trainer.resolve import OBJECTIVES, scored_candidates
from trainer.sharding import DTYPES
from trainer.stop import StopRequest
from trainer.world import World


def recommender(config: Config, table_rows: int, world: World) -> Recommender:
    """The model with its table on the meta device: no row exists before it is sharded."""
    parts = encoder_and_loss(config, world)
    table = ItemTable(
        table_rows,
        config.model.width,
        DTYPES[config.embedding.dtype],
        device=torch.device("meta"),
    )
    return Recommender(table, *parts)


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
