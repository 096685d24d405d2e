"""The run's config as dataclasses, built and cross-checked once, at the start.

Every check raises InputError with the key, its value, the limit and the fix. Modules below the
trainer take plain values and never see these classes.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from data.errors import InputError

MAX_STALL_SECONDS = 7200
MOST_TOKENS = 2**31 - 1  # samples count them in 32 bits
# Keys that older runs' stored configs lack, and what that stands for.
ADDED = {"model": {"repeats": False}, "loss": {"smoothing": 0.0}, "data": {"reorder_ratio": 0.0}}
KERNEL_SIZES = (16, 32, 64, 128)  # head and state sizes of modules.kernels.ssd
KERNEL_TAPS = (1, 2, 3, 4)  # of modules.kernels.conv
KERNEL_WIDTH = 8192  # of modules.kernels.gated_norm, at most


@dataclass(frozen=True)
class ModelConfig:
    kind: Literal["causal", "bidirectional"]
    width: int
    layers: int
    state: int
    head: int
    expand: int
    conv: int
    dropout: float
    norm_embedding: bool
    beta: float
    restore_order: bool
    repeats: bool


def completed(stored: dict[str, Any]) -> dict[str, Any]:
    """A run's stored config with the keys that were added after it."""
    parts = {part: values | stored[part] for part, values in ADDED.items() if part in stored}
    return stored | parts


def check_kernels(head: int, state: int, conv: int, inner: int) -> None:
    """Raises InputError for sizes that no CUDA kernel has. inner: expand * width."""
    if inner > KERNEL_WIDTH:
        raise InputError(
            f"model.expand * model.width = {inner} has no CUDA kernel; it is {KERNEL_WIDTH} at most"
        )
    for key, size, sizes in [
        ("model.head", head, KERNEL_SIZES),
        ("model.state", state, KERNEL_SIZES),
        ("model.conv", conv, KERNEL_TAPS),
    ]:
        if size not in sizes:
            raise InputError(
                f"{key}={size} has no CUDA kernel; it is one of {', '.join(map(str, sizes))}"
            )


@dataclass(frozen=True)
class LossConfig:
    kind: Literal["full", "sampled"]
    negatives: int
    distribution: Literal["uniform", "popularity"]
    in_batch: bool
    logq: bool
    smoothing: float


@dataclass(frozen=True)
class TableConfig:
    sharding: Literal["auto", "row_wise", "table_wise", "column_wise"]
    dtype: Literal["fp32", "fp16"]
    offload: Literal["none", "uvm", "uvm_caching"]
    cache_share: float
    optimizer: str
    learning_rate: float | None
    beta1: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class DataConfig:
    path: str
    samples: Literal["histories", "prefixes"]
    batch_tokens: int | None
    max_sequences: int | None
    mask_ratio: float
    reorder_ratio: float
    max_history: int | None
    long_history: Literal["refuse", "windows", "truncate"]
    overlap_tokens: int
    window_tokens: int
    damaged_files: Literal["fatal", "skip"]

    @property
    def tokens_a_batch(self) -> int:
        """`batch_tokens` of a resolved config."""
        if self.batch_tokens is None:
            raise ValueError("this config is not resolved")
        return self.batch_tokens


@dataclass(frozen=True)
class TrainerConfig:
    device: Literal["auto", "cpu", "cuda"]
    precision: Literal["auto", "fp32", "tf32", "bf16"]
    cuda_graphs: bool
    max_epochs: int
    learning_rate: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    schedule: Literal["constant", "cosine"]
    warmup_steps: int
    evaluate_every_epochs: int
    monitor: str
    patience: int
    targets: Literal["all", "first"]
    checkpoint_every_steps: int
    keep_checkpoints: int
    asynchronous_checkpoints: bool
    log_every_steps: int
    nonfinite: Literal["fatal", "skip"]
    stall_seconds: float


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    loss: LossConfig
    embedding: TableConfig
    data: DataConfig
    trainer: TrainerConfig
    run_dir: str
    seed: int
    init_from: str | None
    init_optimizer: bool
    dry_run: bool

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Config":
        """Build and check the config that Hydra composed.

        Raises InputError for a wrong type, a value outside its range, or values that exclude
        each other.
        """
        config = _build(cls, plain, "")
        _check_values(config)
        _check_combinations(config)
        return config


T = TypeVar("T")


def _build(kind: type[T], plain: dict[str, Any], prefix: str) -> T:
    hints = get_type_hints(kind)
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(plain) - names)
    if unknown:
        raise InputError(
            f"{prefix}{unknown[0]} is no key of the config; {prefix}* has {_list(names)}"
        )
    return kind(**{name: _value(hints[name], plain[name], prefix + name) for name in names})


def _value(hint: Any, value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return _build(hint, value, key + ".")
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if get_origin(hint) is Literal:
        if value in get_args(hint):
            return value
        raise InputError(f"{key}={value} is unknown; it is one of {_list(get_args(hint))}")
    # YAML 1.1 reads 1e-3 as a string.
    if float in kinds and value is not None and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            pass
        else:
            if math.isfinite(number):
                return number
            raise InputError(f"{key}={value} is not a finite number")
    elif type(value) in kinds:
        return value
    names = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
    raise InputError(f"{key}={value!r} is not of type {names}")


def _check_values(config: Config) -> None:
    model, table, data, train = config.model, config.embedding, config.data, config.trainer
    for key, number, least in [
        ("model.width", model.width, 4),
        ("model.layers", model.layers, 1),
        ("model.state", model.state, 1),
        ("model.head", model.head, 1),
        ("model.expand", model.expand, 1),
        ("model.conv", model.conv, 1),
        ("data.batch_tokens", 2 if data.batch_tokens is None else data.batch_tokens, 2),
        ("data.max_sequences", data.max_sequences or 1, 1),
        ("data.max_history", 1 if data.max_history is None else data.max_history, 1),
        ("data.overlap_tokens", data.overlap_tokens, 0),
        ("data.window_tokens", data.window_tokens, 1),
        ("trainer.max_epochs", train.max_epochs, 1),
        ("trainer.warmup_steps", train.warmup_steps, 0),
        ("trainer.evaluate_every_epochs", train.evaluate_every_epochs, 1),
        ("trainer.patience", train.patience, 0),
        ("trainer.checkpoint_every_steps", train.checkpoint_every_steps, 0),
        ("trainer.keep_checkpoints", train.keep_checkpoints, 1),
        ("trainer.log_every_steps", train.log_every_steps, 1),
        ("trainer.stall_seconds", train.stall_seconds, 0.0),
        ("trainer.clip_norm", train.clip_norm, 0.0),
        ("embedding.eps", table.eps, 0.0),
        ("trainer.weight_decay", train.weight_decay, 0.0),
    ]:
        if number < least:
            raise InputError(f"{key}={number} is below its least value {least}")
    for key, tokens in [
        ("data.batch_tokens", data.batch_tokens),
        ("data.max_sequences", data.max_sequences),
        ("data.max_history", data.max_history),
        ("data.overlap_tokens", data.overlap_tokens),
    ]:
        if tokens is not None and tokens > MOST_TOKENS:
            raise InputError(f"{key}={tokens} is above {MOST_TOKENS}; set a smaller one")
    for key, share in [
        ("model.dropout", model.dropout),
        ("data.mask_ratio", data.mask_ratio),
        ("data.reorder_ratio", data.reorder_ratio),
        ("trainer.beta1", train.beta1),
        ("trainer.beta2", train.beta2),
        ("loss.smoothing", config.loss.smoothing),
        ("embedding.beta1", table.beta1),
        ("embedding.beta2", table.beta2),
    ]:
        if not 0.0 <= share < 1.0:
            raise InputError(f"{key}={share} is outside [0, 1)")
    if not 0.0 < table.cache_share < 1.0:
        raise InputError(f"embedding.cache_share={table.cache_share} is outside (0, 1)")
    for key, rate in [
        ("trainer.learning_rate", train.learning_rate),
        ("embedding.learning_rate", table.learning_rate),
    ]:
        if rate is not None and rate <= 0:
            raise InputError(f"{key}={rate} must be above 0")
    if train.stall_seconds > MAX_STALL_SECONDS:
        raise InputError(
            f"trainer.stall_seconds={train.stall_seconds} is above {MAX_STALL_SECONDS}; 0 is off"
        )
    if not 0 <= config.seed < 2**31:
        raise InputError(f"seed={config.seed} is outside [0, 2^31)")


def _check_combinations(config: Config) -> None:
    model, loss, data = config.model, config.loss, config.data
    inner = model.expand * model.width
    if inner % model.head:
        raise InputError(
            f"model.head={model.head} does not divide the inner width expand * width = {inner}"
        )
    if model.width % 4:
        raise InputError(
            f"model.width={model.width} is no multiple of 4, which FBGEMM's rows need; use "
            f"{-(-model.width // 4) * 4}"
        )
    if model.kind == "bidirectional" and data.samples == "histories":
        raise InputError(
            "model.kind=bidirectional sees the items that data.samples=histories would have it "
            "predict; train it with data=prefixes"
        )
    if data.long_history == "windows" and data.samples == "prefixes":
        raise InputError("data.long_history=windows is for data.samples=histories; use truncate")
    limit = "data.batch_tokens"
    tokens = math.inf if data.batch_tokens is None else data.batch_tokens
    if data.max_history is not None:
        if data.max_history > tokens:
            raise InputError(
                f"data.max_history={data.max_history} is above data.batch_tokens={tokens}; null "
                "shows whole histories"
            )
        limit, tokens = "data.max_history", data.max_history
    if data.overlap_tokens >= tokens:
        raise InputError(
            f"data.overlap_tokens={data.overlap_tokens} must be below {limit}={tokens}"
        )
    if loss.kind == "sampled" and loss.negatives < (0 if loss.in_batch else 1):
        raise InputError(
            f"loss.negatives={loss.negatives} with loss.kind=sampled; draw at least 1, or 0 with "
            "loss.in_batch=true"
        )
    if loss.kind == "sampled" and loss.smoothing:
        raise InputError(
            f"loss.smoothing={loss.smoothing} is for the full softmax; loss=sampled has 0"
        )
    parts = config.trainer.monitor.split(".")
    if len(parts) != 3 or parts[0] != "validation" or parts[1] not in ("filtered", "unfiltered"):
        raise InputError(
            f"trainer.monitor={config.trainer.monitor} is no validation figure; "
            "it reads validation.(filtered|unfiltered).(hr|ndcg|mrr)@(10|20)"
        )
    figures = [f"{name}@{k}" for name in ("hr", "ndcg", "mrr") for k in (10, 20)]
    if parts[2] not in figures:
        raise InputError(f"trainer.monitor ends in {parts[2]}; it is one of {_list(figures)}")


def resolve_paths(config: Config) -> tuple[Path, Path]:
    """(data folder, run folder) as absolute paths, so that a later change of folder is harmless."""
    return Path(config.data.path).resolve(), Path(config.run_dir).resolve()


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
