"""The parts of a run, each made from its piece of the config."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from data.batch import SequenceBatch
from data.errors import InputError
from data.evaluation import EvaluationBatches
from data.loader import TrainingSteps
from data.negatives import Candidates, FullCandidates, SampledCandidates
from data.packing import default_max_sequences
from data.reader import HistoryDataset
from data.samples import Objective, SampleRule, Split
from data.schema import MANIFEST, RESERVED_ROWS, write_atomically
from data.vocabulary import Vocabulary
from modules.encoder import Encoder
from modules.item_table import ItemTable
from modules.losses import FullSoftmax, SampledSoftmax
from modules.recommender import Recommender
from trainer.checkpoint import CONFIG, RunState
from trainer.config import Config
from trainer.distributed import World
from trainer.sharding import DTYPES, table_optimizer

OBJECTIVES: dict[str, Objective] = {"histories": "causal", "prefixes": "prefix"}
KERNEL_SIZES = (16, 32, 64, 128)  # head and state sizes of modules.kernels.ssd
# What may differ between a run and its resumption: how long and how it is watched.
FREE_KEYS = {
    "run_dir",
    "dry_run",
    "data.path",  # the data's fingerprint is compared instead
    "trainer.max_epochs",
    "trainer.patience",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_every_steps",
    "trainer.log_every_steps",
    "trainer.cuda_graphs",
}


def resolve(config: Config, world: World, dataset: HistoryDataset) -> Config:
    """The config with every `auto` and null replaced by what it stands for here.

    Raises InputError for sizes that this device has no kernel for, and data without a sample.
    """
    train, data = config.trainer, config.data
    if world.device.type == "cuda":
        for key, size in (("model.head", config.model.head), ("model.state", config.model.state)):
            if size not in KERNEL_SIZES:
                raise InputError(
                    f"{key}={size} has no CUDA kernel; it is one of "
                    f"{', '.join(map(str, KERNEL_SIZES))}"
                )
    kind: Literal["cpu", "cuda"] = "cuda" if world.device.type == "cuda" else "cpu"
    precision = train.precision
    if precision == "auto":
        precision = "bf16" if world.device.type == "cuda" else "fp32"
    sequences = data.max_sequences
    if sequences is None:
        counts = sample_rule(config).counts(dataset.n_train_U)
        if not counts.samples:
            raise InputError(
                f"{data.path} has no user with two training events, so nothing to learn from; "
                "convert a larger log or lower min_user_events and min_item_events"
            )
        sequences = default_max_sequences(data.batch_tokens, counts.tokens / counts.samples)
    return replace(
        config,
        embedding=replace(
            config.embedding, optimizer=table_optimizer(config.embedding.optimizer, world.device)
        ),
        trainer=replace(train, precision=precision, device=kind),
        data=replace(data, max_sequences=sequences),
    )


def sample_rule(config: Config) -> SampleRule:
    """How histories become training samples."""
    data = config.data
    return SampleRule(
        OBJECTIVES[data.samples],
        data.batch_tokens,
        data.long_history,
        data.overlap_tokens,
    )


def recommender(config: Config, table_rows: int, world: World) -> Recommender:
    """The model with its table on the meta device: no row exists before it is sharded."""
    torch.manual_seed(config.seed)
    with torch.device(world.device):
        encoder = Encoder(**asdict(config.model))
    loss: FullSoftmax | SampledSoftmax
    if config.loss.kind == "full":
        loss = FullSoftmax(world.rank)
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
    causal = config.data.samples == "histories"
    reads = config.data.batch_tokens if causal else config.data.max_sequences or 1
    return config.loss.negatives + reads


def sample_batch(config: Config, drawn: Candidates) -> SequenceBatch:
    """A batch of the run's shapes, of one-token histories: what CUDA graphs are captured on."""
    tokens, sequences = config.data.batch_tokens, config.data.max_sequences or 1
    offsets_B1 = torch.arange(sequences + 1).clamp(max=tokens)
    reads = None if config.data.samples == "histories" else offsets_B1[:-1].clamp(max=tokens - 1)
    targets_S = torch.full((tokens if reads is None else sequences,), RESERVED_ROWS)
    candidates_C, log_counts_C = drawn.for_pack(0, targets_S.numpy())
    return SequenceBatch.build(
        torch.full((tokens,), RESERVED_ROWS),
        torch.as_tensor(candidates_C),
        offsets_B1,
        targets_S,
        reads,
        None if log_counts_C is None else torch.as_tensor(log_counts_C),
        float(len(targets_S)),
    )


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
        batch_tokens=data.batch_tokens,
        max_sequences=data.max_sequences or 1,
        mask_ratio=data.mask_ratio,
        long_history=data.long_history,
        overlap=data.overlap_tokens,
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
    """This rank's evaluation batches of a split, in the same number on every rank."""
    data = config.data
    return EvaluationBatches(
        dataset,
        split,
        config.trainer.targets,
        data.batch_tokens,
        data.max_sequences or 1,
        world.rank,
        world.size,
    )


def prepare_run_folder(
    config: Config, run_dir: Path, dataset: HistoryDataset, world: World, resumes: bool
) -> str:
    """Write config.yaml for a new run, or compare it with the one that is resumed; its text.

    Raises InputError, naming each key, when a resumed run's config or data set differs.
    """
    fingerprint = hashlib.sha256((dataset.folder / MANIFEST).read_bytes()).hexdigest()
    content = {**asdict(config), "data_sha256": fingerprint}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    path = run_dir / CONFIG
    if resumes and path.exists():
        before = flatten(yaml.safe_load(path.read_text()))
        now = flatten(content)
        changed = [
            f"{key} was {before.get(key)}, now {now.get(key)}"
            for key in sorted({*before, *now} - FREE_KEYS)
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise InputError(
                f"{run_dir} holds a run of another config ({'; '.join(changed)}); resume it with "
                "its own, or give a new run_dir"
            )
    elif world.is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
    if world.is_main:
        write_atomically(path, text.encode())
    return text


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; values as JSON would have them, so that 1 and 1.0 are one."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
