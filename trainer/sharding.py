"""From a recommender to a sharded one: plan, optimizers, rows, in that order.

The item table's optimizer runs inside the backward pass (FBGEMM's fused update), so the table
never has a gradient tensor; everything else is data parallel with AdamW.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from data.errors import InputError
from modules.item_table import TABLE, fill_rows
from modules.recommender import Recommender
from trainer.config import TableConfig, TrainerConfig
from trainer.distributed import World

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
# What FBGEMM 1.6 and 1.8 have for each device; on the CPU every Adam fails.
TABLE_OPTIMIZERS = {
    "cpu": ("rowwise_adagrad", "adagrad", "sgd"),
    "cuda": ("adam", "partial_rowwise_adam", "rowwise_adagrad", "adagrad", "sgd"),
}
# Numbers of optimizer state beside a row of D weights, as a multiple of D and a constant.
STATE_NUMBERS = {
    "adam": (2, 0),
    "partial_rowwise_adam": (1, 1),
    "rowwise_adagrad": (0, 1),
    "adagrad": (1, 0),
    "sgd": (0, 0),
}
RESERVED_SHARE = 0.15  # of the device's memory, for activations and the dense part


@dataclass(frozen=True)
class Sharded:
    """A recommender ready to train."""

    model: DistributedModelParallel
    optimizer: CombinedOptimizer
    dense_parameters: list[nn.Parameter]  # data parallel; the table has no gradient tensor

    @property
    def recommender(self) -> Recommender:
        """The module inside, for lookups and hidden states without a gradient."""
        return self.model.module


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


def plan_table(
    module: Recommender, config: TableConfig, world: World, batch_tokens: int, candidates: int
) -> ShardingPlan:
    """The planner's choice within `embedding.sharding`, against the real memory of this device.

    Collective. Raises InputError when no sharding fits, with the bytes needed and there.
    """
    # Not column-wise unless asked: it changes what a row-wise optimizer does.
    kinds = ["row_wise", "table_wise"] if config.sharding == "auto" else [config.sharding]
    constraint = ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        min_partition=_least_columns(module, world.size),
        pooling_factors=[float(batch_tokens), float(candidates)],
        num_poolings=[1.0, 1.0],
        batch_sizes=[1, 1],
    )
    device_bytes, host_bytes = memory_bytes(world)
    # Warns that only Meta's own factory be used, which torchrec 1.6 does not have.
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    topology = Topology(
        world_size=world.size,
        compute_device=world.device.type,
        hbm_cap=device_bytes,
        ddr_cap=host_bytes,
        local_world_size=world.local_size,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=1,
        constraints={TABLE: constraint},
        storage_reservation=FixedPercentageStorageReservation(RESERVED_SHARE),
        debug=False,
    )
    try:
        return planner.collective_plan(
            module, [EmbeddingCollectionSharder()], dist.GroupMember.WORLD
        )
    except PlannerError as error:
        there = device_bytes if world.device.type == "cuda" else host_bytes
        needed = table_bytes(module, config, world.device)
        raise InputError(
            f"the item table needs {needed / 2**30:.1f} GiB with its optimizer state over "
            f"{world.size} ranks of {there / 2**30:.1f} GiB each (embedding.sharding="
            f"{config.sharding}), which does not fit; use more ranks, a smaller model.width, "
            "embedding.dtype=fp16 or a row-wise optimizer"
        ) from error


def shard(
    recommender: Recommender,
    plan: ShardingPlan,
    table: TableConfig,
    train: TrainerConfig,
    world: World,
    seed: int,
) -> Sharded:
    """Shard the table by the plan, wrap the rest in DDP, attach both optimizers, fill the rows."""
    # TorchRec's classes, since the arguments reach FBGEMM under its own names (beta1, not betas).
    kind, arguments = _fused_optimizer(table_optimizer(table.optimizer, world.device), table)
    apply_optimizer_in_backward(kind, recommender.table.parameters(), arguments)
    model = DistributedModelParallel(
        module=recommender,
        device=world.device,
        plan=plan,
        sharders=[EmbeddingCollectionSharder()],
    )
    for weight, row, column in local_shards(model):
        fill_rows(weight, seed, row, column)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    optimizers = [("table", model.fused_optimizer)]
    matrices = {name: one for name, one in dense.items() if one.dim() > 1 and "conv" not in name}
    others = {name: one for name, one in dense.items() if name not in matrices}
    for name, parameters, decay in [
        ("matrices", matrices, train.weight_decay),
        ("others", others, 0.0),  # A, dt bias, D, norms, biases, convolution
    ]:
        optimizers.append((name, _adamw(parameters, train, decay, world.device)))
    return Sharded(model, CombinedOptimizer(optimizers), list(dense.values()))


def local_shards(model: DistributedModelParallel) -> list[tuple[torch.Tensor, int, int]]:
    """This rank's parts of the item table: (weights, first row, first column)."""
    parts = []
    for name, value in model.state_dict().items():
        if name.endswith(f"embeddings.{TABLE}.weight"):
            for part in value.local_shards():
                row, column = part.metadata.shard_offsets
                parts.append((part.tensor, row, column))
    return parts


def _fused_optimizer(name: str, config: TableConfig) -> tuple[type, dict[str, Any]]:
    adam = {
        "lr": config.learning_rate,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "eps": config.eps,
        "weight_decay": 0.0,
    }
    plain = {"lr": config.learning_rate, "eps": config.eps}
    match name:
        case "adam":
            return Adam, adam
        case "partial_rowwise_adam":
            return PartialRowWiseAdam, adam
        case "rowwise_adagrad":
            return RowWiseAdagrad, plain
        case "adagrad":
            return Adagrad, plain
        case _:
            return SGD, {"lr": config.learning_rate}


def _adamw(
    parameters: dict[str, nn.Parameter], config: TrainerConfig, decay: float, device: torch.device
) -> KeyedOptimizerWrapper:
    return KeyedOptimizerWrapper(
        parameters,
        lambda values: torch.optim.AdamW(
            values,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=decay,
            fused=device.type == "cuda",
        ),
    )


def _least_columns(module: Recommender, ranks: int) -> int:
    """Columns a shard at least under column_wise: an equal share, in FBGEMM's multiples of 4."""
    width = next(iter(module.table.parameters())).shape[1]
    return max(4, width // ranks // 4 * 4)


def table_bytes(module: Recommender, config: TableConfig, device: torch.device) -> int:
    """Bytes of all rows and of their optimizer state, over all ranks."""
    rows, width = next(iter(module.table.parameters())).shape
    per_width, constant = STATE_NUMBERS[table_optimizer(config.optimizer, device)]
    weight = 2 if config.dtype == "fp16" else 4
    return rows * (width * weight + 4 * (per_width * width + constant))


def describe_memory(module: Recommender, config: TableConfig, world: World) -> list[str]:
    """What a run keeps for good, by part."""
    dense = sum(one.numel() for one in module.encoder.parameters())
    table = table_bytes(module, config, world.device)
    return [
        f"item table with {config.optimizer} state: {table / 2**20:,.1f} MiB over "
        f"{world.size} x {world.device.type}",
        f"encoder: {dense:,} parameters, {16 * dense / 2**20:,.1f} MiB a rank with gradients and "
        "AdamW state",
    ]


def memory_bytes(world: World) -> tuple[int, int]:
    """(device memory, host memory) in bytes that one rank may use; device is 0 on the CPU."""
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's own limit
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        host = min(host, int(text))
    device = 0
    if world.device.type == "cuda":
        device = torch.cuda.get_device_properties(world.device).total_memory
    return device, host // world.local_size


def describe_plan(plan: ShardingPlan) -> list[str]:
    """One line a shard: its rank, rows and columns."""
    lines = []
    for parameters in plan.plan.values():
        for name, how in parameters.items():
            lines.append(f"table {name}: {how.sharding_type}, kernel {how.compute_kernel}")
            for part in how.sharding_spec.shards:
                (row, column), (rows, columns) = part.shard_offsets, part.shard_sizes
                lines.append(
                    f"  rank {part.placement.rank()}: rows {row:,} to {row + rows:,}, "
                    f"columns {column} to {column + columns}"
                )
    return lines
