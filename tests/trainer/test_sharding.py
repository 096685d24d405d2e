"""Plans of large tables for cards that are not here, on the meta device: kernels and refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from data.errors import InputError
from modules.item_table import ItemTable
from tests.trainer.test_config import composed
from trainer import sharding
from trainer.config import TableConfig
from trainer.distributed import process_group
from trainer.memory import Memory, TableMemory, memory_by_rank
from trainer.resolve import table_optimizer
from trainer.sharding import DTYPES, describe_plan, plan_table
from trainer.world import World

GIB = 2**30
CUDA = torch.device("cuda", 0)
ROWS = 100_000_000


class Table(nn.Module):
    """As much of a recommender as planning looks at."""

    def __init__(self, rows: int, width: int, dtype: str) -> None:
        super().__init__()
        self.table = ItemTable(rows, width, DTYPES[dtype], torch.device("meta"))


@pytest.fixture(scope="module")
def world():
    with process_group("cpu") as world:
        yield replace(world, device=CUDA)


def table(*overrides: str) -> TableConfig:
    return composed(*(f"embedding.{one}" for one in overrides)).embedding


def planned(monkeypatch, world: World, there: Memory, config: TableConfig, rows: int = ROWS):
    monkeypatch.setattr(sharding, "free_memory", lambda world: there)
    return plan_table(Table(rows, 128, config.dtype), config, world, 16_384, 17_408)


def test_a_table_in_device_memory(monkeypatch, world):
    config = table("dtype=fp16", "optimizer=rowwise_adagrad")
    plan = planned(monkeypatch, world, Memory(67 * GIB, 200 * GIB), config)
    lines = describe_plan(plan, config, world)
    assert lines[0].endswith("kernel fused")
    assert lines[1] == "  rank 0: rows 0 to 100,000,000, columns 0 to 128"
    assert lines[2].startswith("  rank 0: weights 23.8 GiB, optimizer state 381.5 MiB in device")


@pytest.mark.parametrize(
    ("overrides", "there", "message"),
    [
        (
            ["dtype=fp32", "optimizer=rowwise_adagrad"],
            Memory(48 * GIB, 200 * GIB),
            r"48.1 GiB of device memory a rank \(51,600,000,000 bytes.* and 48.0 GiB .*use more "
            "ranks, embedding.dtype=fp16, embedding.offload=uvm_caching or a smaller model.width",
        ),
        (  # the weights alone would fit
            ["dtype=fp16", "optimizer=partial_rowwise_adam"],
            Memory(67 * GIB, 200 * GIB),
            "71.9 GiB of device memory .* embedding.optimizer=rowwise_adagrad",
        ),
        (
            ["dtype=fp16", "optimizer=rowwise_adagrad", "offload=uvm"],
            Memory(67 * GIB, 20 * GIB),
            "24.2 GiB of host memory a rank .* and 20.0 GiB .* use more hosts or a smaller",
        ),
        (
            ["dtype=fp16", "optimizer=sgd", "offload=uvm_caching", "cache_share=0.3"],
            Memory(2 * GIB, 200 * GIB),
            "8.0 GiB of device memory .* a smaller embedding.cache_share",
        ),
    ],
)
def test_what_does_not_fit_is_refused(monkeypatch, world, overrides, there, message):
    with pytest.raises(InputError, match=message):
        planned(monkeypatch, world, there, table(*overrides))


def test_a_batch_that_does_not_fit_beside_the_table(monkeypatch, world):
    config = table("dtype=fp16", "optimizer=sgd")
    just_the_rows = Memory(ROWS * 256 + 1000, 200 * GIB)
    with pytest.raises(InputError, match="beside the rows that a batch looks up"):
        planned(monkeypatch, world, just_the_rows, config)


@pytest.mark.parametrize(("offload", "cache"), [("uvm", None), ("uvm_caching", 0.2)])
def test_only_what_is_asked_for_is_offloaded(monkeypatch, world, offload, cache):
    config = table(
        "dtype=fp16", "optimizer=rowwise_adagrad", f"offload={offload}", "cache_share=0.2"
    )
    plan = planned(monkeypatch, world, Memory(67 * GIB, 200 * GIB), config, 4 * ROWS)
    (how,) = (one for parameters in plan.plan.values() for one in parameters.values())
    assert how.compute_kernel == f"fused_{offload}"
    assert (how.cache_params and how.cache_params.load_factor) == cache
    assert sharding.sharder(config).fused_params == {"uvm_host_mapped": True}
    (memory,) = memory_by_rank(plan, config, world)
    assert memory.needed.host >= 4 * ROWS * 260
    # A fifth of the rows with 16 bytes a slot, and 4 bytes a row.
    assert memory.needed.device == (4 * ROWS // 5 * 272 + 16 * ROWS if cache else 0)


def test_the_host_has_no_offload(world):
    cpu = replace(world, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"embedding\.offload=uvm is for CUDA"):
        plan_table(Table(100, 16, "fp32"), table("offload=uvm"), cpu, 64, 64)


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [("adam", 1024), ("partial_rowwise_adam", 516), ("rowwise_adagrad", 4), ("sgd", 0)],
)
def test_state_is_fp32_whatever_the_rows_are(optimizer, state):
    memory = TableMemory.of(1000, 128, table(f"optimizer={optimizer}", "dtype=fp16"), CUDA)
    assert (memory.weights, memory.state) == (256_000, 1000 * state)
    assert memory.needed == Memory(memory.weights + memory.state, 0)


def test_an_optimizer_that_the_host_lacks():
    with pytest.raises(InputError, match=r"adam does not exist on cpu; it is one of auto, rowwise"):
        table_optimizer("adam", torch.device("cpu"))


def test_no_rank_is_left_without_a_row(monkeypatch, world):
    """Nine rows on four ranks are 3, 3, 3 and none; ten leave the last one."""
    four = replace(world, size=4)
    with pytest.raises(InputError, match=r"one of 4 ranks none of the table's 9 rows; use"):
        planned(monkeypatch, four, Memory(GIB, GIB), table("sharding=row_wise"), rows=9)
    for rows, kinds in ((9, ["table_wise"]), (10, ["row_wise", "table_wise"])):
        chosen = sharding._constraint(Table(rows, 128, "fp32"), table(), four, 16, 16)
        assert chosen.sharding_types == kinds
