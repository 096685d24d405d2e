"""`dry_run=true`: what a run would keep in memory, and how long a step would take at least.

Legend: T tokens, S read positions, C candidates looked up, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec.distributed.types import ShardingPlan

from modules.products import DTYPES
from modules.recommender import Recommender
from modules.softmax_memory import most_held
from tools.benchmarks.measure import Ceilings, Floor, Timer, link_rate, measure_ceilings
from trainer.config import Config
from trainer.memory import WEIGHT_BYTES, TableMemory, memory_by_rank, size
from trainer.observe import flops_per_token
from trainer.resolve import candidate_count, logits_of_step, repeat_bytes
from trainer.world import World

TRIAL_TOKENS = 1024  # of one history, for counting what the encoder saves
BUDGET_MS = 100.0  # of each ceiling's measurement
DENSE_PASSES = 7  # numbers read and written a dense parameter and step, by clipping and AdamW


@dataclass(frozen=True)
class Sizes:
    """What memory and time of a rank's step follow from."""

    ranks: int
    tokens: int  # T
    looked_up: int  # T + C rows
    width: int
    table_rows: int
    scored: int  # logits of a rank
    scored_bytes: int  # held of them
    repeat_bytes: int
    dense: int  # parameters

    @classmethod
    def of(cls, config: Config, model: Recommender, table_rows: int, world: World) -> "Sizes":
        candidates = candidate_count(config, table_rows, world)
        scored = logits_of_step(config, table_rows, world)
        number_bytes = DTYPES[config.trainer.precision].itemsize
        return cls(
            ranks=world.size,
            tokens=config.data.tokens_a_batch,
            looked_up=config.data.tokens_a_batch + candidates,
            width=config.model.width,
            table_rows=table_rows,
            scored=scored,
            scored_bytes=most_held(scored, number_bytes, world.device),
            repeat_bytes=repeat_bytes(config, table_rows, world),
            dense=sum(one.numel() for one in model.encoder.parameters()),
        )

    @property
    def looked_up_bytes(self) -> int:
        return 4 * self.looked_up * self.width


def report_dry_run(
    config: Config, model: Recommender, plan: ShardingPlan, table_rows: int, world: World
) -> None:
    """Print, on rank 0, memory by part and the estimated step. Measures the device's ceilings."""
    if not world.is_main:
        return
    sizes = Sizes.of(config, model, table_rows, world)
    tables = memory_by_rank(plan, config.embedding, world)
    timer = Timer(world.device, BUDGET_MS)
    link = link_rate(timer) if config.embedding.offload != "none" else None
    lines = memory_lines(sizes, tables, saved_bytes_per_token(model, world.device), world.device)
    lines += step_lines(config, sizes, tables, measure_ceilings(timer), link)
    print("\n".join(lines), flush=True)


def memory_lines(
    sizes: Sizes, tables: list[TableMemory], saved_per_token: float, device: torch.device
) -> list[str]:
    """Memory besides the table's own, which the plan's lines give, and each rank's sum."""
    parts = {
        f"encoder: {sizes.dense:,} parameters, gradients, AdamW state": 16 * sizes.dense,
        f"{sizes.looked_up:,} looked-up rows and gradients": 2 * sizes.looked_up_bytes,
        f"activations of {sizes.tokens:,} tokens": round(sizes.tokens * saved_per_token),
        "logits, or their exponentials": sizes.scored_bytes,
    }
    if sizes.repeat_bytes:
        parts["which candidates are repeats"] = sizes.repeat_bytes
    lines = [f"  every rank, estimate: {size(number)} {name}" for name, number in parts.items()]
    rest = sum(parts.values())
    for rank, table in enumerate(tables):
        needed = {"device": table.needed.device, "host": table.needed.host}
        needed["device" if device.type == "cuda" else "host"] += rest
        sums = " and ".join(f"{size(one)} of {kind} memory" for kind, one in needed.items() if one)
        lines.append(f"  rank {rank} in all, estimate: {sums}")
    return lines


def saved_bytes_per_token(model: Recommender, device: torch.device) -> float:
    """Bytes that the encoder keeps for its backward pass, counted on one history."""
    parameters = {one.untyped_storage().data_ptr() for one in model.encoder.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_TD = torch.randn(TRIAL_TOKENS, model.table.width, device=device, requires_grad=True)
    offsets_B1 = torch.tensor([0, TRIAL_TOKENS], device=device)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept = model.encode(x_TD, offsets_B1, None)  # alive, and with it what is saved
    del kept
    return sum(saved.values()) / TRIAL_TOKENS


def step_lines(
    config: Config,
    sizes: Sizes,
    tables: list[TableMemory],
    ceilings: Ceilings,
    link_bytes_per_second: float | None,
) -> list[str]:
    """The parts of the slowest rank's step at the device's ceilings, their sum and their basis.

    link_bytes_per_second: from host to device, where the table is offloaded.
    """
    precision = config.trainer.precision
    encoder = sizes.tokens * flops_per_token(config.model, 0, 0.0)
    loss = 3.0 * 2 * sizes.scored * sizes.width
    parts = {
        "encoder": Floor(0, encoder, precision).milliseconds(ceilings),
        "loss": Floor(0, loss, precision).milliseconds(ceilings),
        "table": max(
            table_milliseconds(config, sizes, tables, one, ceilings, link_bytes_per_second)
            for one in tables
        ),
        "dense update": Floor(4 * DENSE_PASSES * sizes.dense, 0, "fp32").milliseconds(ceilings),
    }
    rate = ceilings.flops_per_second[precision]
    basis = (
        f"bytes over a copy's {ceilings.bytes_per_second / 1e9:,.0f} GB/s, operations over a "
        f"{precision} matrix product's {rate / 1e12:,.2f} TFLOP/s"
    )
    if link_bytes_per_second is not None:
        basis += f", offloaded bytes over {link_bytes_per_second / 1e9:,.0f} GB/s from the host"
    return [
        f"expected step time, estimate: {sum(parts.values()):,.2f} ms and more = "
        + " + ".join(f"{name} {one:,.2f}" for name, one in parts.items()),
        f"  basis: {basis}, measured now; uniform ids; what kernels lose to that, launches and "
        "communication between ranks come on top",
    ]


def table_milliseconds(
    config: Config,
    sizes: Sizes,
    tables: list[TableMemory],
    table: TableMemory,
    ceilings: Ceilings,
    link_bytes_per_second: float | None,
) -> float:
    """A rank's lookups of all ranks' batches, and its fused update, by the bytes that they move."""
    share = table.weights / sum(one.weights for one in tables)
    distinct = share * min(sizes.ranks * sizes.looked_up, sizes.table_rows)
    # Weights are read by the lookup, then read and written by the update; so is the state.
    weights = 3 * distinct * sizes.width * WEIGHT_BYTES[config.embedding.dtype]
    state = 2 * distinct * sum(one.state for one in tables) / sizes.table_rows
    rows_and_gradients = 2 * share * sizes.ranks * sizes.looked_up_bytes
    milliseconds = 1e3 * rows_and_gradients / ceilings.bytes_per_second
    if link_bytes_per_second is None:
        return milliseconds + 1e3 * (weights + state) / ceilings.bytes_per_second
    cached = config.embedding.cache_share if config.embedding.offload == "uvm_caching" else 0.0
    milliseconds += 1e3 * cached * weights / ceilings.bytes_per_second
    return milliseconds + 1e3 * ((1 - cached) * weights + state) / link_bytes_per_second
