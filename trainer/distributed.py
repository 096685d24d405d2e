"""Process group, device and seeds of this rank, from torchrun's environment."""

import gc
import logging
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# Imported after the group is made, they would keep it in default arguments for ever.
import torch.distributed.nn.functional
import torch.distributed.optim

from configs.environment import quiet_fbgemm
from data.errors import InputError
from trainer.config import MAX_STALL_SECONDS
from trainer.world import World

# Of a collective. Above the watchdog's bound, which names the rank that all others wait for.
TIMEOUT = timedelta(seconds=2 * MAX_STALL_SECONDS)
IDS_CTAS = 4  # thread blocks of a collective of ids, which are few: they share the GPU with a step
_groups: dict[str, dist.ProcessGroup] = {}  # beside the default one


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """Join the process group that torchrun described; one process alone without torchrun.

    device: auto | cpu | cuda. LOCAL_RANK picks the GPU; NCCL serves CUDA, gloo the CPU. Products of
    fp32 numbers are exact from here on, whatever the environment asks of torch.

    What uses the group has to be out of scope when the block ends, so call a function there: the
    group's threads end with the last reference to it, and one that is still freeing a tensor when
    the interpreter goes down would abort the process.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    where = _device(device, local_rank, local_size)
    torch.set_float32_matmul_precision("highest")
    backend = "nccl" if where.type == "cuda" else "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        backend,
        rank=rank,
        world_size=size,
        store=_store(),
        timeout=TIMEOUT,
        device_id=where if where.type == "cuda" else None,
    )
    try:
        if size > 1:
            _groups["ids"] = _ids_group(backend)
        yield World(rank, size, local_rank, local_size, where)
    except BaseException as error:
        # What the failed calls held: a graph with collectives inside keeps NCCL from ending.
        traceback.clear_frames(error.__traceback__)
        gc.collect()
        # NCCL's shutdown waits for the other ranks, and they may be waiting for this one.
        if backend == "gloo":
            _leave()
        raise
    _leave()


def ids_group() -> dist.ProcessGroup | None:
    """A second group of all ranks, for the ids of lookups; None for a rank alone."""
    return _groups.get("ids")


def _ids_group(backend: str) -> dist.ProcessGroup:
    options = None
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = IDS_CTAS
        options._timeout = TIMEOUT
    group: dist.ProcessGroup = dist.new_group(timeout=TIMEOUT, pg_options=options)
    return group


def _leave() -> None:
    _groups.clear()
    gc.collect()  # TorchRec's modules are cycles
    dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the ranks find each other.

    torchrun may keep one store over its restarts, in which the addresses of ranks that died would
    be found again, so each attempt gets a part of its own. That needs one agent: several do not
    count attempts alike.
    """
    if "RANK" not in os.environ:
        return dist.HashStore()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    several = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
    if attempt and kept and several:
        raise InputError(
            "torchrun restarts on several hosts need a store of their own each time: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on every host"
        )
    store: dist.Store = next(dist.rendezvous("env://", timeout=TIMEOUT))[0]
    return dist.PrefixStore(f"attempt-{attempt}", store) if kept and not several else store


def _device(device: str, local_rank: int, local_size: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("trainer.device=cuda, but torch sees no GPU; use trainer.device=cpu")
    if local_size > torch.cuda.device_count():
        raise InputError(
            f"--nproc_per_node={local_size}, but this host has {torch.cuda.device_count()} GPUs; "
            "start one process a GPU"
        )
    return torch.device("cuda", local_rank)


def seed_step(seed: int, step: int, world: World) -> None:
    """Make the step's random numbers (dropout) a function of (seed, step, rank) alone.

    A resumed run thus needs no stored random state to equal the uninterrupted one. Only the
    generator of this rank's device is seeded: `torch.manual_seed` looks at every kind of device,
    which takes as long as a quarter of a small step on a GPU.
    """
    mixed = (seed * 1_000_003 + step) * 1_000_003 + world.rank
    generator = torch.default_generator
    if world.device.type == "cuda":
        generator = torch.cuda.default_generators[world.device.index]
    generator.manual_seed(mixed % 2**63)


def quiet_libraries() -> None:
    """Silence what libraries say of their own code, which neither we nor a user can change."""
    quiet_fbgemm()
    for name in ("torch.fx._symbolic_trace", "tensorboard"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"torchrec\..*", r"torch\.distributed\.checkpoint\..*"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    # Of groups whose device it asks for, at every plan and every table.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torchrec\.distributed\.types")
    for note in (r"\s*\x1b\[93m\s*\[FBGEMM_GPU\] NOTE", "TBE B200 optimization"):
        warnings.filterwarnings("ignore", category=UserWarning, message=note)
