"""Writing checkpoints: by all ranks together, in a thread if wanted, and never half."""

import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from data.errors import InputError, reason
from data.schema import write_atomically
from trainer import checkpoint_files as files
from trainer.checkpoint import (
    CONFIG,
    PROBE,
    STATE,
    RunState,
    checkpoint_path,
    list_checkpoints,
    read_state,
    state_tensors,
)
from trainer.sharding import Sharded
from trainer.world import World

T = TypeVar("T")


class Saver:
    """Writes a run's checkpoints and deletes what is neither among the newest `keep` nor the best.

    With `asynchronous`, a save holds training up only for the copy of the state to host memory; a
    thread writes it. The copy's memory is kept for the next one: getting new pages takes several
    times as long as filling them. Every method is collective. A save that fails, for a full disk
    say, ends nothing: it is said, and the checkpoints before it stay.
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
        self._executor = _writer_thread(world) if asynchronous else None
        self._copy: dict[str, Any] = {}
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
        tensors = state_tensors(self._sharded)
        if self._executor is not None:
            self._copy = host_copy(tensors, self._copy)
            written = self._executor.submit(self._write, self._copy, state, probe)
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
            prune(self._run_dir, self._keep)
        return failure


def _writer_thread(world: World) -> ThreadPoolExecutor:
    """One thread on this rank's GPU, whose current stream DCP waits for."""
    if world.device.type == "cuda":
        return ThreadPoolExecutor(1, "checkpoint", torch.cuda.set_device, (world.device,))
    return ThreadPoolExecutor(1, "checkpoint")


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


def host_copy(value: Any, kept: Any = None) -> Any:
    """Nested dicts of tensors, copied to host memory; a ShardedTensor's local shards are.

    kept: an earlier copy, whose tensors are written anew where they have the same shape and dtype.
    """
    if isinstance(value, dict):
        earlier = kept if isinstance(kept, dict) else {}
        return {name: host_copy(one, earlier.get(name)) for name, one in value.items()}
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
        shards = value.local_shards()
        earlier_shards = kept.local_shards() if isinstance(kept, ShardedTensor) else []
        pairs = zip_longest(shards, earlier_shards[: len(shards)])
        copied._local_shards = [_host_shard(one, earlier) for one, earlier in pairs]
        return copied
    if isinstance(value, Tensor):
        if isinstance(kept, Tensor) and (kept.shape, kept.dtype) == (value.shape, value.dtype):
            return kept.copy_(value.detach())
        return value.detach().to("cpu", copy=True)
    return value


def _host_shard(shard: Shard, kept: Shard | None) -> Shard:
    """The shard with its values in host memory, its metadata as they are: a new `Shard` would
    refuse values that are not on the device of its placement."""
    copied = copy(shard)
    copied.tensor = host_copy(shard.tensor, None if kept is None else kept.tensor)
    return copied


def prune(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one of each. For rank 0 alone.

    A run that has to go on from an older checkpoint needs the best of that time.
    """
    checkpoints = list_checkpoints(run_dir)
    newest = checkpoints[-keep:]
    best = {checkpoint_path(run_dir, read_state(one).best_step) for one in newest}
    for one in checkpoints[:-keep]:
        if one not in best:
            trash = one.rename(one.with_name(one.name + ".tmp"))  # however far rmtree gets
            shutil.rmtree(trash, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
