"""Memory of the item table by part, what a rank may use, and the refusal of what does not fit.

The planner chooses among shardings by cost; whether a choice fits is decided here, in exact bytes,
because its own count leaves out the optimizer (attached after planning) and halves fp16's fp32
state.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torchrec.distributed.types import ShardingPlan

from data.errors import InputError
from trainer.config import TableConfig
from trainer.world import World

# Numbers of optimizer state beside a row of D weights, as a multiple of D and a constant.
STATE_NUMBERS = {
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "rowwise_adagrad": (0, 1),
    "adagrad": (1, 0),
    "sgd": (0, 0),
}
WEIGHT_BYTES = {"fp32": 4, "fp16": 2}
RESERVED_SHARE = 0.15  # of the device's memory, for activations and the dense part
# FBGEMM's cache (split_table_batched_embeddings_ops_training.py, `_apply_cache_state`): slots come
# in sets of 32, each with an int64 id and an int64 time; an int32 a row maps rows to the table.
CACHE_SET = 32
SLOT_BYTES = 16
INDEX_BYTES = 4
# That map is first made of Python lists, twice 8 bytes a row, and copied from there.
INDEX_HOST_BYTES = 20


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank may use."""

    device: int  # 0 on the CPU
    host: int


@dataclass(frozen=True)
class TableMemory:
    """Bytes of one rank's part of the item table. state: the optimizer's."""

    place: Literal["device", "host"]  # of weights and optimizer state
    weights: int
    state: int
    cache: int = 0  # rows on the device of a table in host memory, and their index
    building: int = 0  # host memory for a moment, while the cache is made

    @classmethod
    def of(
        cls, rows: int, columns: int, config: TableConfig, device: torch.device
    ) -> "TableMemory":
        """Of a shard of that size. `config.optimizer` is resolved, not auto."""
        per_width, constant = STATE_NUMBERS[config.optimizer]
        row = columns * WEIGHT_BYTES[config.dtype]
        in_host = device.type == "cpu" or config.offload != "none"
        cache = building = 0
        if config.offload == "uvm_caching" and rows:
            slots = CACHE_SET * max(1, -(-int(rows * config.cache_share) // CACHE_SET))
            cache = slots * (row + SLOT_BYTES) + rows * INDEX_BYTES
            building = rows * INDEX_HOST_BYTES
        return cls(
            "host" if in_host else "device",
            rows * row,
            rows * 4 * (per_width * columns + constant),
            cache,
            building,
        )

    def __add__(self, other: "TableMemory") -> "TableMemory":
        return TableMemory(
            self.place,
            self.weights + other.weights,
            self.state + other.state,
            self.cache + other.cache,
            self.building + other.building,
        )

    @property
    def kept(self) -> int:
        """Weights and optimizer state."""
        return self.weights + self.state

    @property
    def needed(self) -> Memory:
        """What this rank must have."""
        if self.place == "host":
            return Memory(self.cache, self.kept + self.building)
        return Memory(self.kept, 0)

    def describe(self) -> str:
        parts = [f"weights {size(self.weights)}", f"optimizer state {size(self.state)}"]
        text = f"{', '.join(parts)} in {self.place} memory"
        return f"{text}, cache {size(self.cache)} in device memory" if self.cache else text


def memory_by_rank(plan: ShardingPlan, config: TableConfig, world: World) -> list[TableMemory]:
    """Each rank's part of the item table under a plan."""
    ranks = [TableMemory.of(0, 0, config, world.device)] * world.size
    for parameters in plan.plan.values():
        for how in parameters.values():
            for part in how.sharding_spec.shards:
                rows, columns = part.shard_sizes
                ranks[part.placement.rank()] += TableMemory.of(rows, columns, config, world.device)
    return ranks


def free_memory(world: World) -> Memory:
    """What the rank with the least may use, at this moment. Collective: equal on every rank.

    The device's without RESERVED_SHARE of the whole, the host's shared by its ranks.
    """
    device = 0
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(world.device)
        device = max(0, int(free - RESERVED_SHARE * total))
    bytes_2 = torch.tensor([device, _free_host() // world.local_size], device=world.device)
    dist.all_reduce(bytes_2, dist.ReduceOp.MIN)
    return Memory(*bytes_2.tolist())


def _free_host() -> int:
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = Path("/proc/meminfo")  # what can be had without swapping, caches given up
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        used = int(limit.with_name("memory.current").read_text())
        stat = dict(one.split() for one in limit.with_name("memory.stat").read_text().splitlines())
        free = min(free, int(text) - used + int(stat["inactive_file"]))
    return free


def require_room(table: TableMemory, there: Memory, config: TableConfig, world: World) -> None:
    """Raise InputError when a rank's part of the table needs more than there is."""
    for kind, needed, free in (
        ("device", table.needed.device, there.device),
        ("host", table.needed.host, there.host),
    ):
        if needed > free:
            raise InputError(
                f"the item table needs {size(needed)} of {kind} memory a rank ({needed:,} bytes: "
                f"{table.describe()}) and {size(free)} ({free:,} bytes) are there for it with "
                f"{world.size} {'rank' if world.size == 1 else 'ranks'}, "
                f"embedding.sharding={config.sharding} and embedding.offload={config.offload}; "
                f"use {_remedies(kind, table.place, config, world)}"
            )


def _remedies(kind: str, place: str, config: TableConfig, world: World) -> str:
    remedies = ["more ranks" if kind == "device" else "more hosts"]
    if world.size > 1 and config.sharding == "table_wise":
        remedies.append("embedding.sharding=row_wise")
    if config.dtype == "fp32":
        remedies.append("embedding.dtype=fp16")
    if STATE_NUMBERS[config.optimizer][0] and kind == place:
        remedies.append("embedding.optimizer=rowwise_adagrad")
    if kind == "device":
        smaller = "a smaller embedding.cache_share"
        cached = config.offload == "uvm_caching"
        remedies.append(smaller if cached else "embedding.offload=uvm_caching")
    return ", ".join(remedies) + " or a smaller model.width"


def size(number: float) -> str:
    """Bytes as a person reads them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}"
    return f"{number / 1024:,.1f} KiB"
