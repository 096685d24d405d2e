"""From a recommender to a sharded one: plan, optimizers, rows, in that order.

The item table's optimizer runs inside the backward pass (FBGEMM's fused update), so the table
never has a gradient tensor; everything else is data parallel with AdamW.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
)
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.optim import SGD, Adagrad, Adam, PartialRowWiseAdam, RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from data.errors import InputError
from modules.item_table import TABLE, ItemTable, fill_rows
from modules.recommender import Recommender
from modules.row_exchange import RowExchange
from trainer.config import TableConfig, TrainerConfig
from trainer.distributed import ids_group
from trainer.memory import Memory, TableMemory, free_memory, memory_by_rank, require_room
from trainer.resolve import table_learning_rate, table_optimizer
from trainer.world import World

DTYPES = {"fp32": DataType.FP32, "fp16": DataType.FP16}
KERNELS = {
    "none": EmbeddingComputeKernel.FUSED,
    "uvm": EmbeddingComputeKernel.FUSED_UVM,
    "uvm_caching": EmbeddingComputeKernel.FUSED_UVM_CACHING,
}


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

    def updates(self) -> int:
        """Updates so far, by the dense optimizer's count: FBGEMM's Adam counts lookups."""
        state = dict(self.optimizer.optimizers)["matrices"].state
        return int(next(iter(state.values()))["step"]) if state else 0


def plan_table(
    module: Recommender, config: TableConfig, world: World, batch_tokens: int, candidates: int
) -> ShardingPlan:
    """The planner's choice within `embedding.sharding` and `embedding.offload`.

    Collective, and before anything is allocated. Raises InputError for an offload on the CPU, and
    when no sharding fits the free memory, with the bytes needed and there, and where `row_wise`
    would leave a rank without a row.
    """
    if config.offload != "none" and world.device.type == "cpu":
        raise InputError(
            f"embedding.offload={config.offload} is for CUDA: on the CPU the table is in host "
            "memory anyway; use embedding.offload=none"
        )
    rows, _ = _shape(module)
    if config.sharding == "row_wise" and _leaves_a_rank_empty(rows, world.size):
        raise InputError(
            f"embedding.sharding=row_wise leaves one of {world.size} ranks none of the table's "
            f"{rows:,} rows; use embedding.sharding=table_wise, or fewer ranks"
        )
    config = replace(config, optimizer=table_optimizer(config.optimizer, world.device))
    whole = TableMemory.of(*_shape(module), config, world.device)
    there = free_memory(world)
    planner = EmbeddingShardingPlanner(
        topology=_topology(whole, there, world),
        batch_size=1,
        constraints={TABLE: _constraint(module, config, world, batch_tokens, candidates)},
        storage_reservation=FixedPercentageStorageReservation(0.0),
        debug=False,
    )
    try:
        plan = planner.collective_plan(module, [sharder(config)], dist.GroupMember.WORLD)
    except PlannerError as error:
        least = TableMemory.of(*_least_shard(module, config, world), config, world.device)
        require_room(least, there, config, world)
        raise InputError(
            f"no embedding.sharding={config.sharding} of the item table fits beside the rows that "
            f"a batch looks up ({str(error).strip().splitlines()[0]}); use a smaller "
            "data.batch_tokens, fewer loss.negatives, or more ranks"
        ) from error
    for part in memory_by_rank(plan, config, world):
        require_room(part, there, config, world)
    return plan


def _constraint(
    module: Recommender, config: TableConfig, world: World, batch_tokens: int, candidates: int
) -> ParameterConstraints:
    kinds = [config.sharding]
    if config.sharding == "auto":
        # Not column-wise: it changes what a row-wise optimizer does. One rank owns every row.
        kinds = ["row_wise", "table_wise"]
        if world.size == 1 or _leaves_a_rank_empty(_shape(module)[0], world.size):
            kinds = ["table_wise"]
    cached = config.offload == "uvm_caching"
    return ParameterConstraints(
        sharding_types=kinds,
        compute_kernels=[KERNELS[config.offload].value],
        cache_params=CacheParams(load_factor=config.cache_share) if cached else None,
        min_partition=_least_columns(module, world.size),
        pooling_factors=[float(batch_tokens), float(candidates)],
        num_poolings=[1.0, 1.0],
        batch_sizes=[1, 1],
    )


def _leaves_a_rank_empty(rows: int, ranks: int) -> bool:
    """Of equal runs of rows, rounded up, the last ranks may get none."""
    return -(-rows // ranks) * (ranks - 1) >= rows


def sharder(config: TableConfig) -> EmbeddingCollectionSharder:
    """Host-mapped where the table is offloaded: managed memory beyond the card's can hang it."""
    mapped = {"uvm_host_mapped": True} if config.offload != "none" else None
    return EmbeddingCollectionSharder(fused_params=mapped)


def _topology(whole: TableMemory, there: Memory, world: World) -> Topology:
    """The planner counts weights without optimizer state, so it is told of that much less room."""
    # Warns that only Meta's own factory be used, which torchrec 1.6 does not have.
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    weights_share = whole.weights / whole.kept
    in_host = whole.place == "host"
    return Topology(
        world_size=world.size,
        compute_device=world.device.type,
        hbm_cap=there.device if in_host else int(there.device * weights_share),
        ddr_cap=int(there.host * weights_share) if in_host else there.host,
        local_world_size=world.local_size,
    )


def shard(
    recommender: Recommender,
    plan: ShardingPlan,
    table: TableConfig,
    train: TrainerConfig,
    world: World,
    seed: int,
) -> Sharded:
    """Shard the table by the plan, attach both optimizers, fill the rows. Collective.

    Every rank starts from rank 0's dense parameters.
    """
    # TorchRec's classes, since the arguments reach FBGEMM under its own names (beta1, not betas).
    kind, arguments = _fused_optimizer(table_optimizer(table.optimizer, world.device), table)
    _apply_optimizer_in_backward(kind, recommender.table.parameters(), arguments)
    model = DistributedModelParallel(
        module=recommender,
        device=world.device,
        plan=plan,
        sharders=[sharder(table)],
        init_data_parallel=False,  # `Stepper` averages the dense gradients
    )
    for weight, row, column in local_shards(model):
        fill_rows(weight, seed, row, column)
    _look_up_by_ours(model, recommender.table, plan, world)
    _exchange_ids_apart(model)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    for one in dense.values():
        dist.broadcast(one.detach(), src=0)
    optimizers = [("table", model.fused_optimizer)]
    matrices = {name: one for name, one in dense.items() if one.dim() > 1 and "conv" not in name}
    others = {name: one for name, one in dense.items() if name not in matrices}
    for name, parameters, decay in [
        ("matrices", matrices, train.weight_decay),
        ("others", others, 0.0),  # A, dt bias, D, norms, biases, convolution
    ]:
        optimizers.append((name, _adamw(parameters, train, decay, world.device)))
    return Sharded(model, CombinedOptimizer(optimizers), list(dense.values()))


def _look_up_by_ours(
    model: DistributedModelParallel, table: ItemTable, plan: ShardingPlan, world: World
) -> None:
    """Have the table go around TorchRec's modules, where every rank has one run of its rows."""
    if world.size == 1 and sharding_type(plan) == "table_wise":
        table.serve_alone(*table_kernels(model))
    elif world.size > 1 and sharding_type(plan) == "row_wise":
        (kernel,) = table_kernels(model)
        rows_a_rank = -(-table.rows // world.size)
        table.serve_runs(RowExchange(kernel.forward, rows_a_rank, ids_group()))


def _exchange_ids_apart(model: DistributedModelParallel) -> None:
    """Have the ids cross between ranks on `ids_group`, and the rows on the default group.

    Collectives of one group wait for each other, so ids would wait for the gradients of the step
    before. TorchRec has one group for both, which it asks for at the first exchange of ids; what
    exchanges the rows it has made already.
    """
    for module in model.modules():
        for sharding in getattr(module, "_sharding_type_to_sharding", {}).values():
            sharding._pg = ids_group() or sharding._pg


def local_shards(model: DistributedModelParallel) -> list[tuple[torch.Tensor, int, int]]:
    """This rank's parts of the item table: (weights, first row, first column)."""
    parts = []
    for name, value in model.state_dict().items():
        if name.endswith(f"embeddings.{TABLE}.weight"):
            for part in value.local_shards():
                row, column = part.metadata.shard_offsets
                parts.append((part.tensor, row, column))
    return parts


def table_kernels(model: DistributedModelParallel) -> list[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules under this rank's shards, which TorchRec keeps out of `modules()`."""
    lookups = [one for module in model.modules() for one in getattr(module, "_lookups", [])]
    return [
        one
        for lookup in lookups
        for one in lookup.modules()
        if isinstance(one, SplitTableBatchedEmbeddingBagsCodegen)
    ]


def _fused_optimizer(name: str, config: TableConfig) -> tuple[type, dict[str, Any]]:
    rate = table_learning_rate(config, name)
    adam = {
        "lr": rate,
        "beta1": config.beta1,
        "beta2": config.beta2,
        "eps": config.eps,
        "weight_decay": 0.0,
    }
    plain = {"lr": rate, "eps": config.eps}
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
            return SGD, {"lr": rate}


def _adamw(
    parameters: dict[str, nn.Parameter], config: TrainerConfig, decay: float, device: torch.device
) -> KeyedOptimizerWrapper:
    on_gpu = device.type == "cuda"
    rate = config.learning_rate
    return KeyedOptimizerWrapper(
        parameters,
        lambda values: torch.optim.AdamW(
            values,
            lr=torch.tensor(rate, device=device) if on_gpu else rate,  # a graph can read a tensor
            betas=(config.beta1, config.beta2),
            weight_decay=decay,
            fused=on_gpu,
            capturable=on_gpu,
        ),
    )


def _shape(module: Recommender) -> tuple[int, int]:
    """Rows and width of the item table."""
    rows, width = next(iter(module.table.parameters())).shape
    return rows, width


def _least_columns(module: Recommender, ranks: int) -> int:
    """Columns a shard at least under column_wise: an equal share, in FBGEMM's multiples of 4."""
    return max(4, _shape(module)[1] // ranks // 4 * 4)


def _least_shard(module: Recommender, config: TableConfig, world: World) -> tuple[int, int]:
    """Rows and columns of the smallest largest shard that the sharding allows."""
    rows, width = _shape(module)
    match config.sharding:
        case "table_wise":
            return rows, width
        case "column_wise":
            return rows, _least_columns(module, world.size)
        case _:
            return -(-rows // world.size), width


def sharding_type(plan: ShardingPlan) -> str:
    """How the plan shards the item table."""
    return next(how.sharding_type for one in plan.plan.values() for how in one.values())


def describe_plan(plan: ShardingPlan, config: TableConfig, world: World) -> list[str]:
    """One line a shard, its rank, rows and columns; then each rank's memory for the table."""
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
    for rank, part in enumerate(memory_by_rank(plan, config, world)):
        lines.append(f"  rank {rank}: {part.describe()}, {config.optimizer}")
    return lines
