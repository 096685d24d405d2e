"""What a config stands for on a device and a data set: its sizes, and each `auto` and null.

Without FBGEMM and TorchRec: a process that imports neither knows the shapes of a run as well.
"""

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from data.errors import InputError
from data.packing import default_batch_tokens, default_max_sequences
from data.reader import HistoryDataset
from data.samples import Objective, SampleRule
from modules.repeats import first_bytes
from trainer.config import Config, DataConfig, TableConfig, check_kernels
from trainer.world import World

OBJECTIVES: dict[str, Objective] = {"histories": "causal", "prefixes": "prefix"}
REPEAT_BYTES = 1 << 32  # of `modules.repeats.Repeats.first_ZC`
# What FBGEMM 1.6 and 1.8 have for each device; on the CPU every Adam fails.
TABLE_OPTIMIZERS = {
    "cpu": ("rowwise_adagrad", "adagrad", "sgd"),
    "cuda": ("adam", "partial_rowwise_adam", "rowwise_adagrad", "adagrad", "sgd"),
}
# embedding.learning_rate=null: Adam's as in docs/experiments.md, partial_rowwise_adam's after it,
# Adagrad's as the demo trains with.
TABLE_RATES = {"adam": 2e-3, "partial_rowwise_adam": 2e-3, "rowwise_adagrad": 0.04}


def resolve(config: Config, world: World, dataset: HistoryDataset) -> Config:
    """The config with every `auto` and null replaced by what it stands for here.

    Raises InputError for sizes that this device has no kernel for, data without a sample, and
    histories longer than a batch where data.long_history refuses them.
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
    rule = sample_rule(config)
    rule.check_lengths(dataset.n_train_U)
    sequences = data.max_sequences
    if sequences is None:
        counts = rule.counts(dataset.n_train_U)
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


def table_optimizer(name: str, device: torch.device) -> str:
    """The table optimizer that `embedding.optimizer` stands for on this device.

    auto is adam on CUDA and rowwise_adagrad on the CPU. Raises InputError for one that the
    device lacks.
    """
    allowed = TABLE_OPTIMIZERS[device.type]
    if name == "auto":
        return allowed[0]
    if name not in allowed:
        raise InputError(
            f"embedding.optimizer={name} does not exist on {device.type}; "
            f"it is one of auto, {', '.join(allowed)}"
        )
    return name


def table_learning_rate(config: TableConfig, optimizer: str) -> float:
    """What `embedding.learning_rate` stands for. Raises InputError where null has no meaning."""
    rate = config.learning_rate or TABLE_RATES.get(optimizer)
    if rate is None:
        raise InputError(
            f"embedding.optimizer={optimizer} has no default learning rate; set "
            "embedding.learning_rate"
        )
    return rate


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


def logits_of_step(config: Config, table_rows: int, world: World) -> int:
    """How many logits a rank's loss has."""
    positions, rivals = reads(config), scored_candidates(config, table_rows)
    if config.loss.kind == "full":  # candidate-parallel: all ranks' positions, its own rows
        positions, rivals = positions * world.size, candidate_count(config, table_rows, world)
    return positions * rivals


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
