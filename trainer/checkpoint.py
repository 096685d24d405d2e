"""Checkpoints: torch.distributed.checkpoint for tensors, JSON for the run's state.

    checkpoints/step-00001200/   .metadata, *.distcp: model and optimizer, a shard a rank
                                 state.json: position, epoch, early stopping, metrics
                                 config.yaml: the run's resolved config
                                 probe.pt: what the model answers for some users (the export's gate)
                                 files.json: size and checksum of all of these

A folder is written under a temporary name and renamed by rank 0 once every rank has finished, so
a folder with the final name is whole; what happens to it later its checksums find.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import LoadPlanner

from data.errors import InputError, reason
from data.schema import write_atomically
from trainer import checkpoint_files as files
from trainer.distributed import World
from trainer.sharding import Sharded

T = TypeVar("T")

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


class Saver:
    """Writes a run's checkpoints and deletes what is neither among the newest `keep` nor the best.

    With `asynchronous`, a save holds training up only for the copy of the state to host memory; a
    thread writes it. Every method is collective. A save that fails, for a full disk say, ends
    nothing: it is said, and the checkpoints before it stay.
    """

    def __init__(
        self,
        run_dir: Path,
        sharded: Sharded,
        world: World,
        before: RunState,
        config_text: str,
        keep: int,
        asynchronous: bool,
        say: Callable[[str], None],
    ) -> None:
        """before: the state that the run begins or resumes with."""
        self._run_dir, self._sharded, self._world = run_dir, sharded, world
        self._config_text, self._keep, self._say = config_text, keep, say
        # The thread needs collectives of its own beside those of the steps.
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._executor = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._written = before
        self._pending: tuple[RunState, Future[str | None]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown()

    def save(self, state: RunState, probe: dict[str, Any]) -> None:
        """Write a checkpoint of this state; `settle` comes before and after.

        probe: rank 0's content of PROBE (tensors only).
        """
        tensors = _tensors(self._sharded)
        if self._executor is not None:
            written = self._executor.submit(self._write, host_copy(tensors), state, probe)
        else:
            written = Future()
            written.set_result(self._write(tensors, state, probe))
        self._pending = state, written

    def settle(self, state: RunState) -> RunState:
        """Wait for the checkpoint under way; `state`, with its best corrected if that was lost.

        The best model is the best on the disk: a run can end with no other.
        """
        if self._pending is None:
            return state
        (pending, written), self._pending = self._pending, None
        failure = written.result()
        if failure is None:
            self._written = pending
            return state
        self._say(
            f"the checkpoint of step {pending.step:,} was not written ({failure}); training goes "
            "on, and what was saved before is kept"
        )
        return _without_best(state, pending.step, self._written)

    def require_written(self, state: RunState) -> None:
        """Raise InputError unless this state, the last one, is on the disk."""
        if self._written.step != state.step:
            raise InputError(
                f"the last checkpoint, of step {state.step:,}, could not be written to "
                f"{self._run_dir}; make room there and give the same command, which goes on from "
                f"step {self._written.step:,}"
            )

    def _write(self, tensors: dict[str, Any], state: RunState, probe: dict[str, Any]) -> str | None:
        texts = {
            CONFIG: self._config_text.encode(),
            STATE: json.dumps(asdict(state), indent=1).encode(),
        }
        final = checkpoint_path(self._run_dir, state.step)
        failure = write(final, tensors, texts, probe, self._world, self._group)
        if failure is None and self._world.is_main:
            prune(self._run_dir, state, self._keep)
        return failure


def _without_best(state: RunState, lost: int, before: RunState) -> RunState:
    """The state as if the lost checkpoint had not been the best."""
    if state.best_step != lost:
        return state
    since = sum(one["step"] > before.best_step for one in state.evaluations)
    return state.with_(
        best_step=before.best_step,
        best_value=before.best_value,
        evaluations_since_best=since,
    )


def write(
    final: Path,
    tensors: dict[str, Any],
    texts: dict[str, bytes],
    probe: dict[str, Any],
    world: World,
    group: dist.ProcessGroup | None = None,
) -> str | None:
    """Write a checkpoint folder; why it could not be, on every rank alike, or None. Collective.

    texts, probe: rank 0's further files. Nothing stays behind of one that failed.
    """
    temporary = final.with_name(final.name + ".tmp")

    def begin() -> None:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish_own() -> dict[str, dict[str, Any]]:
        if world.is_main:
            buffer = io.BytesIO()
            torch.save(probe, buffer)
            for name, content in {**texts, PROBE: buffer.getvalue()}.items():
                write_atomically(temporary / name, content)
        return files.checksums(one for one in temporary.iterdir() if _writer(one) == world.rank)

    def commit() -> None:
        if world.is_main:
            files.write_manifest(temporary, {k: v for one in parts for k, v in one.items()})
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            _sync_folder(final.parent)

    try:
        _on_all_ranks(begin, world, group)
        dcp.save(tensors, checkpoint_id=str(temporary), process_group=group)
        parts = _on_all_ranks(finish_own, world, group)
        _on_all_ranks(commit, world, group)
    except (_SaveError, dcp.api.CheckpointException) as error:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        return _cause(error)
    return None


class _SaveError(Exception):
    """A rank could not write."""


def _on_all_ranks(do: Callable[[], T], world: World, group: dist.ProcessGroup | None) -> list[T]:
    """What `do` returns on each rank. Raises _SaveError on all ranks when it fails on one."""
    value, failure = None, None
    try:
        value = do()
    except OSError as error:
        failure = f"rank {world.rank}: {error.strerror}: {error.filename}"
    every: list[Any] = [None] * world.size
    dist.all_gather_object(every, (value, failure), group=group)
    failures = [one for _, one in every if one is not None]
    if failures:
        raise _SaveError(failures[0])
    return [one for one, _ in every]


def _writer(path: Path) -> int:
    """The rank that writes a file: DCP names those of rank R `__R_N.distcp`; the rest are 0's."""
    return int(path.name.split("_")[2]) if path.name.startswith("__") else 0


def _cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason(cause)}"
    return reason(error)


def host_copy(value: Any) -> Any:
    """Nested dicts of tensors, copied to host memory; a ShardedTensor's local shards are."""
    if isinstance(value, dict):
        return {name: host_copy(one) for name, one in value.items()}
    if isinstance(value, ShardedTensor):
        metadata = value.metadata()
        copied = ShardedTensor.__new__(
            ShardedTensor,
            value.sharding_spec(),
            metadata.size,
            dtype=metadata.tensor_properties.dtype,
            layout=metadata.tensor_properties.layout,
            pin_memory=False,
            requires_grad=False,
        )
        copied.__dict__.update(value.__dict__)
        copied._local_shards = [
            Shard(host_copy(one.tensor), one.metadata) for one in value.local_shards()
        ]
        return copied
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return value


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
    target = _tensors(sharded)
    _load(target, folder, planner)
    sharded.model.load_state_dict(target["model"])
    sharded.optimizer.load_state_dict(target["optimizer"])
    sharded.optimizer.set_optimizer_step(_steps_taken(sharded))
    return state


def _steps_taken(sharded: Sharded) -> int:
    """The dense optimizer's count, warm starts included: FBGEMM's Adam stores none of its own."""
    dense = dict(sharded.optimizer.optimizers)["matrices"]
    return int(next(iter(dense.state.values()))["step"])


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
        raise InputError(f"checkpoint {folder} is damaged: {damage}; use another one")


def find_damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint's files, equal on every rank, or None. Collective."""
    found: list[str | None] = [None] * world.size
    dist.all_gather_object(found, files.find_damage(folder, world.rank, world.size))
    return next((one for one in found if one is not None), None)


def _tensors(sharded: Sharded) -> dict[str, Any]:
    return {"model": sharded.model.state_dict(), "optimizer": sharded.optimizer.state_dict()}


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint folder. Raises InputError for a folder that is none."""
    path = folder / STATE
    if not path.exists() or not (folder / files.MANIFEST).exists():
        raise InputError(
            f"{folder} is no finished checkpoint: it has no {STATE} or no {files.MANIFEST}"
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


def require(run_dir: Path, step: int) -> None:
    """Raise InputError when the run's best checkpoint, which its end needs, is gone."""
    if step and checkpoint_path(run_dir, step) not in list_checkpoints(run_dir):
        raise InputError(
            f"the best checkpoint {checkpoint_path(run_dir, step)} is gone, which this run's test "
            "figures need; put it back, or start a new run_dir with init_from"
        )


def prune(run_dir: Path, state: RunState, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best. For rank 0 alone."""
    checkpoints = list_checkpoints(run_dir)
    best = checkpoint_path(run_dir, state.best_step)
    for one in checkpoints[: -keep or None]:
        if one != best:
            trash = one.rename(one.with_name(one.name + ".tmp"))  # however far rmtree gets
            shutil.rmtree(trash)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
