"""The run's folder: one live run in it, the resolved config, and what a resumed run may change."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from data.errors import InputError
from data.reader import HistoryDataset
from data.schema import MANIFEST, write_atomically
from data.vocabulary import Vocabulary
from trainer.checkpoint import CONFIG, FOLDER, STATE, list_checkpoints
from trainer.config import Config
from trainer.distributed import World

LOCK = ".lock"
# What may differ between a run and its resumption: how long, how it is watched, where it lies.
FREE_KEYS = {
    "run_dir",
    "dry_run",
    "data.path",  # the data's fingerprint is compared instead
    "embedding.sharding",
    "embedding.offload",
    "embedding.cache_share",
    "trainer.max_epochs",
    "trainer.patience",
    "trainer.keep_checkpoints",
    "trainer.checkpoint_every_steps",
    "trainer.log_every_steps",
    "trainer.cuda_graphs",
}


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; config_text: the resolved config; newest: the checkpoint to resume."""

    path: Path
    config_text: str
    newest: Path | None


@contextmanager
def run_folder(
    run_dir: Path, config: Config, dataset: HistoryDataset, vocabulary: Vocabulary, world: World
) -> Iterator[RunFolder]:
    """Take the folder for this run until the block ends, and write its config.yaml. Collective.

    Raises InputError when another live run has it, when it cannot be written, or when it holds a
    run of another config or data set, naming each key that differs.
    """
    content = describe(config, dataset, vocabulary)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    lock = _take(run_dir) if world.is_main else None
    dist.barrier()  # until here rank 0 may remove what a killed run left
    try:
        checkpoints = list_checkpoints(run_dir)
        newest = checkpoints[-1] if checkpoints else None
        if newest is not None:
            _compare(run_dir, yaml.safe_load((newest / CONFIG).read_text()), content)
        dist.barrier()  # all have compared
        if world.is_main:
            write_atomically(run_dir / CONFIG, text.encode())
        yield RunFolder(run_dir, text, newest)
    finally:
        if lock is not None:
            lock.close()


def describe(config: Config, dataset: HistoryDataset, vocabulary: Vocabulary) -> dict[str, Any]:
    """The config as plain values, with what identifies its data set and the meaning of its rows."""
    content = asdict(config)
    content["data"]["path"] = str(dataset.folder.resolve())
    manifest = (dataset.folder / MANIFEST).read_bytes()
    content["data_sha256"] = hashlib.sha256(manifest).hexdigest()
    items = vocabulary.size
    content["vocabulary"] = {"items": items, "sha256": vocabulary.digest(items)}
    return content


def _take(run_dir: Path) -> Any:
    """Lock the folder, and remove what a killed run left half-written or half-removed."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / LOCK).open("w")
    except OSError as error:
        raise InputError(
            f"cannot write run_dir={run_dir}: {error.strerror}; name a writable folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another run is writing {run_dir}; wait for it, or give a new run_dir"
        ) from error
    for one in (run_dir / FOLDER).glob("step-*"):
        if one.suffix == ".tmp" or not (one / STATE).exists():
            shutil.rmtree(one)
    return lock


def _compare(run_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = flatten(before), flatten(now)
    changed = [
        f"{key} was {old.get(key)}, now {new.get(key)}"
        for key in sorted({*old, *new} - FREE_KEYS)
        if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"{run_dir} holds a run of another config ({'; '.join(changed)}); resume it with its "
            "own, or give a new run_dir"
        )


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; values as JSON would have them, so that 1 and 1.0 are one."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
