"""The run's folder: one live run in it, the resolved config, and what a resumed run may change."""

import fcntl
import hashlib
import json
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import yaml

from data.errors import InputError
from data.reader import HistoryDataset
from data.schema import MANIFEST, write_atomically
from data.vocabulary import Vocabulary
from trainer.checkpoint import CONFIG, FOLDER, find_damage, list_checkpoints
from trainer.config import Config, completed
from trainer.world import World

T = TypeVar("T")

SUMMARY = "summary.json"  # of a run that has ended
LOCK = ".lock"
TOKEN = ".token"  # how the hosts find out whether they share the folder
SHARED_SECONDS = 10.0  # that a network file system may take to show a file
# What changes no result: where a run lies, how it is watched and saved.
WATCHING_KEYS = {
    "run_dir",
    "dry_run",
    "data.path",  # the data's fingerprint is compared instead
    "trainer.keep_checkpoints",
    "trainer.checkpoint_every_steps",
    "trainer.asynchronous_checkpoints",
    "trainer.log_every_steps",
    "trainer.stall_seconds",
    "trainer.cuda_graphs",
}
# What may differ between a run and its resumption.
FREE_KEYS = WATCHING_KEYS | {
    "data.damaged_files",  # which files were left out is compared
    "embedding.sharding",
    "embedding.offload",
    "embedding.cache_share",
    "trainer.max_epochs",
    "trainer.patience",
    "trainer.nonfinite",
}


@dataclass(frozen=True)
class RunFolder:
    """path: the folder; config_text: the resolved config; newest: the checkpoint to resume;
    finished: a run ended here before. Equal on every rank."""

    path: Path
    config_text: str
    newest: Path | None
    finished: bool


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
    require_agreement(text, world)
    lock = _on_main(lambda: _take(run_dir), world)
    require_shared(run_dir, world)  # until here rank 0 may remove what a killed run left
    try:
        _on_main(lambda: _compare_last_start(run_dir, content), world)
        newest = newest_whole(run_dir, world)
        if newest is not None:
            _compare(run_dir, yaml.safe_load((newest / CONFIG).read_text()), content)
        finished = [(run_dir / SUMMARY).exists()]
        dist.barrier()  # all have compared
        dist.broadcast_object_list(finished, src=0)
        if world.is_main:
            write_atomically(run_dir / CONFIG, text.encode())
        yield RunFolder(run_dir, text, newest, finished[0])
    finally:
        if lock is not None:
            lock.close()


def newest_whole(run_dir: Path, world: World) -> Path | None:
    """The newest checkpoint whose files are as they were written, or None before the first.

    Collective. Damaged ones in front of it are named and set aside under another name, for a person
    to look at. Raises InputError on every rank when none is whole.
    """
    names = [[one.name for one in list_checkpoints(run_dir)]]
    dist.broadcast_object_list(names, src=0)  # a network file system may show ranks different ones
    damaged: dict[Path, str] = {}
    for name in reversed(names[0]):
        folder = run_dir / FOLDER / name
        damage = find_damage(folder, world)
        if damage is None:
            dist.barrier()  # nobody reads the damaged ones any more
            if world.is_main:
                for one, what in damaged.items():
                    print(
                        f"checkpoint {one} is damaged ({what}): it is now {_set_aside(one).name}, "
                        f"and {name} is used",
                        flush=True,
                    )
            return folder
        damaged[folder] = damage
    if damaged:
        newest, what = next(iter(damaged.items()))
        raise InputError(
            f"none of the {len(damaged)} checkpoints in {run_dir} is whole ({newest}: {what}); "
            "copy the folder again, files.json included, or give a new run_dir"
        )
    return None


def _set_aside(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.damaged{number}")).exists():
        number += 1
    return folder.rename(aside)


def require_agreement(text: str, world: World) -> None:
    """Raise InputError on every rank unless all have one config and data set."""
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, text)
    mine = flatten(yaml.safe_load(texts[0]))
    for rank, other in enumerate(texts):
        theirs = flatten(yaml.safe_load(other)) if other != texts[0] else mine
        # Hosts mount folders as they like.
        known = sorted({*mine, *theirs} - {"data.path", "run_dir"})
        keys = [key for key in known if mine.get(key) != theirs.get(key)]
        if keys:
            raise InputError(
                f"rank {rank} was started with another config than rank 0 ("
                + "; ".join(f"{key} is {theirs.get(key)}, not {mine.get(key)}" for key in keys)
                + "); give every host the same command"
            )


def require_shared(run_dir: Path, world: World, seconds: float = SHARED_SECONDS) -> None:
    """Raise InputError on every rank unless all see what rank 0 writes there. Collective.

    seconds: how long a network file system may take to show it.
    """
    token = [secrets.token_hex(16)]
    dist.broadcast_object_list(token, src=0)
    path = run_dir / TOKEN
    if world.is_main:
        write_atomically(path, token[0].encode())
    dist.barrier()
    seen: list[str | None] = [None] * world.size
    dist.all_gather_object(seen, None if _reads(path, token[0], seconds) else socket.gethostname())
    blind = sorted({one for one in seen if one is not None})
    if world.is_main:
        path.unlink()
    if blind:
        raise InputError(
            f"run_dir={run_dir} is not one folder for all hosts: {', '.join(blind)} does not see "
            "what rank 0 writes there; put it on a file system that they share"
        )


def _reads(path: Path, token: str, seconds: float) -> bool:
    """Whether the file holds the token within so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if path.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def describe(config: Config, dataset: HistoryDataset, vocabulary: Vocabulary) -> dict[str, Any]:
    """The config as plain values, with what identifies its data set and the meaning of its rows."""
    content = asdict(config)
    content["data"]["path"] = str(dataset.folder.resolve())
    if config.init_from:
        content["init_from"] = str(Path(config.init_from).resolve())
    manifest = (dataset.folder / MANIFEST).read_bytes()
    content["data_sha256"] = hashlib.sha256(manifest).hexdigest()
    items = vocabulary.size
    content["vocabulary"] = {"items": items, "sha256": vocabulary.digest(items)}
    if dataset.left_out:
        content["data_skipped"] = dataset.left_out
    return content


def _on_main(do: Callable[[], T], world: World) -> T | None:
    """What rank 0's call returns, None on the others; its InputError is raised on every rank."""
    value, failure = None, [""]
    if world.is_main:
        try:
            value = do()
        except InputError as error:
            failure = [str(error)]
    dist.broadcast_object_list(failure, src=0)
    if failure[0]:
        raise InputError(failure[0])
    return value


def _compare_last_start(run_dir: Path, content: dict[str, Any]) -> None:
    """Before anything in the folder is touched: what its last start wrote, if it saved anything."""
    path = run_dir / CONFIG
    if not path.exists() or not list_checkpoints(run_dir):
        return
    try:
        before = yaml.safe_load(path.read_text())
    except (ValueError, yaml.YAMLError):
        before = None
    if not isinstance(before, dict):
        raise InputError(f"{path} is damaged; copy the one of the newest checkpoint there")
    _compare(run_dir, before, content)


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
    for one in (run_dir / FOLDER).glob("step-*.tmp"):
        shutil.rmtree(one, ignore_errors=True)
    return lock


def _compare(run_dir: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    old, new = flatten(completed(before)), flatten(now)
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
