"""Checkpoints: torch.distributed.checkpoint for tensors, JSON for the run's state.

    checkpoints/step-00001200/   .metadata, *.distcp: model and optimizer, a shard a rank
                                 state.json: position, epoch, early stopping, metrics
                                 config.yaml: the run's resolved config
                                 probe.pt: what the model answers for some users (the export's gate)
                                 files.json: size and checksum of all of these

A folder is written under a temporary name and renamed by rank 0 once every rank has finished, so
a folder with the final name is whole; what happens to it later its checksums find.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import LoadPlanner

from data.errors import InputError, reason
from trainer import checkpoint_files as files
from trainer.sharding import Sharded
from trainer.world import World

FOLDER = "checkpoints"
STATE = "state.json"
PROBE = "probe.pt"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class RunState:
    """Everything besides tensors that a resumed run needs; equal on every rank.

    position: packs consumed (`data.packing.PackOrder`), the one integer that places the data.
    epoch, epoch_start: the epoch at hand and the position of its first pack, to seek quickly.
    """

    step: int = 0
    position: int = 0
    epoch: int = 0
    epoch_start: int = 0
    best_value: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    epochs: float = 0.0  # done, with the share of the one at hand
    tokens: int = 0
    seconds: float = 0.0  # of all processes of the run, from their start
    training_seconds: float = 0.0  # of those, in steps: no start, evaluation or checkpoint
    skipped: int = 0  # steps left out for a loss or gradient that was not finite

    def with_(self, **changes: Any) -> "RunState":
        return replace(self, **changes)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:08d}"


def load(folder: Path, sharded: Sharded, planner: LoadPlanner | None = None) -> RunState:
    """Load weights and optimizer state in place, at any number of ranks and sharding. Collective.

    planner: what is read for what is there; by default sizes must be equal.
    Raises InputError for a folder that is no checkpoint of this model.
    """
    state = read_state(folder)
    # AdamW makes its state at the first step, and what is absent DCP skips without a word. The
    # step that makes it moves the parameters, which the load overwrites.
    for name, optimizer in sharded.optimizer.optimizers:
        if name != "table":
            optimizer.init_state()
    target = state_tensors(sharded)
    _load(target, folder, planner)
    sharded.model.load_state_dict(target["model"])
    sharded.optimizer.load_state_dict(target["optimizer"])
    return state


def load_weights(folder: Path, sharded: Sharded, planner: LoadPlanner | None = None) -> None:
    """Load the weights alone. Collective. `planner` as in `load`."""
    target = {"model": sharded.model.state_dict()}
    _load(target, folder, planner)
    sharded.model.load_state_dict(target["model"])


def _load(target: dict[str, Any], folder: Path, planner: LoadPlanner | None) -> None:
    try:
        dcp.load(target, storage_reader=files.Reader(folder), planner=planner or files.Planner())
    except dcp.api.CheckpointException as error:
        causes = [one[0] for one in error.failures.values()]
        if isinstance(causes[0], InputError):
            raise causes[0] from error
        raise InputError(
            f"checkpoint {folder} does not fit this config's model ({reason(causes[0])}); "
            "use the config.yaml of its run"
        ) from error


def verify(folder: Path, world: World) -> None:
    """Raise InputError on every rank when a file of the checkpoint is not as it was written.

    Collective: each rank reads its share of the files.
    """
    damage = find_damage(folder, world)
    if damage is not None:
        raise InputError(
            f"checkpoint {folder} is damaged: {damage}; copy it again, or use another one"
        )


def find_damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint's files, equal on every rank, or None. Collective.

    Raises InputError on every rank for files that one cannot read.
    """
    found, failure = None, None
    try:
        found = files.find_damage(folder, world.rank, world.size, world.local_size)
    except InputError as error:
        failure = str(error)
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, (found, failure))
    failures = [one for _, one in every if one is not None]
    if failures:
        raise InputError(failures[0])
    return next((one for one, _ in every if one is not None), None)


def state_tensors(sharded: Sharded) -> dict[str, Any]:
    """All that a checkpoint stores as tensors: weights and optimizer state."""
    return {"model": sharded.model.state_dict(), "optimizer": sharded.optimizer.state_dict()}


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint folder. Raises InputError for a folder that is none."""
    path = folder / STATE
    if not path.exists() or not (folder / files.MANIFEST).exists():
        absent = STATE if not path.exists() else files.MANIFEST
        raise InputError(
            f"{folder} is no finished checkpoint, it has no {absent}; copy the whole folder again"
        )
    try:
        return RunState(**json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); use an earlier checkpoint") from error


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; `find_damage` says whether one is as it was."""
    return sorted((run_dir / FOLDER).glob("step-????????"))


def find(path: Path) -> Path:
    """The checkpoint that a run or checkpoint folder names: a run's best one.

    Raises InputError for a folder that is neither.
    """
    if (path / files.MANIFEST).exists():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise InputError(f"{path} is no checkpoint and no run with a finished one")
    best = checkpoint_path(path, read_state(checkpoints[-1]).best_step)
    return best if best in checkpoints else checkpoints[-1]


def require_best(run_dir: Path, state: RunState, world: World) -> None:
    """Raise InputError when the run's best checkpoint, which its end needs, is gone or damaged.

    Collective. Better now than after the rest of the training.
    """
    best = checkpoint_path(run_dir, state.best_step)
    if not state.best_step or state.best_step == state.step:
        return
    damage = find_damage(best, world)
    if damage is not None:
        raise InputError(
            f"the best checkpoint {best} is lost ({damage}), which this run's test figures need; "
            "put a copy back, or start a new run_dir with init_from"
        )
