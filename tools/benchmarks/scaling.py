"""The ranks of tools.measure_scaling: each case's step timed, and where its time goes.

    torchrun --nproc_per_node=N -m tools.benchmarks.scaling output=FILE.json data.path=FOLDER …

The step is the trainer's own: loader thread, copy, exchanged lookups, encoder, loss, all updates.
FOLDER holds a data set a case; what is measured is added to FILE.json. Two sizes of batch: `weak`
gives every rank the case's tokens, `strong` shares them out over the ranks.
"""

# ruff: noqa: E402
from configs.environment import check_versions

check_versions()  # a mismatch would break the imports below

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from configs.command import command
from data.batch import SequenceBatch
from data.errors import InputError
from data.loader import TrainingSteps
from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from tools.benchmarks.data import with_data
from tools.benchmarks.inputs import ML1M_ITEMS, ML1M_USERS, write_data_set
from tools.benchmarks.measure import Timer, Times, release
from tools.benchmarks.report import device_name, write
from tools.benchmarks.step import loaded, placed
from trainer.config import Config
from trainer.distributed import process_group, quiet_libraries
from trainer.resolve import resolve
from trainer.sharding import Sharded
from trainer.stepper import Stepper
from trainer.world import World

NEGATIVES = 1_024  # of the sampled cases, where the config has none
USERS = 4 * ML1M_USERS  # 4 M events: an epoch is several steps of eight large batches


@dataclass(frozen=True)
class Case:
    """What is trained. tokens: of a batch of one rank (weak), of all ranks (strong).

    width: of the table and model, the config's where None. counted: negatives go by popularity,
    which takes a count an item; otherwise they are uniform. group: steps between two waits on CUDA,
    where a run waits at its log lines: each wait costs what the host needs for a step.
    """

    name: str
    loss: Literal["full", "sampled"]
    items: int
    tokens: int
    width: int | None = None
    dtype: Literal["fp32", "fp16"] = "fp32"
    optimizer: str = "auto"
    counted: bool = True
    group: int = 40


def _large(name: str, items: int, tokens: int, width: int | None) -> Case:
    return Case(name, "sampled", items, tokens, width, "fp16", "rowwise_adagrad", counted=False)


CASES = {
    "cuda": (
        Case("full-3k", "full", ML1M_ITEMS, 16_384),
        Case("full-1m", "full", 1_000_000, 32_768, group=5),
        Case("sampled-1m", "sampled", 1_000_000, 65_536),
        _large("sampled-1m-128", 1_000_000, 65_536, 128),
        _large("sampled-100m", 100_000_000, 65_536, 128),
        _large("sampled-400m", 400_000_000, 65_536, 128),
        _large("sampled-500m", 500_000_000, 65_536, 128),
        _large("sampled-600m", 600_000_000, 65_536, 128),
    ),
    "cpu": (
        Case("full-2k", "full", 2_000, 1_024),
        Case("sampled-2k", "sampled", 2_000, 1_024),
        _large("sampled-20k", 20_000, 1_024, None),
    ),
}


@dataclass(frozen=True)
class Measured:
    """One row of the answer; times in milliseconds.

    tokens: real ones a step, over all ranks. peak_bytes: allocated on the fullest GPU, table
    included. parts: rank 0's step on its own device, from mark to mark, waits for others included:
    `loader` until a batch is there, `lookup` with the exchange of ids and rows, `model, loss`,
    `all-reduce` of the dense gradients, `table grad` with the exchange of gradients and the fused
    update, `update` of the dense parameters.
    """

    case: str
    scaling: Literal["weak", "strong"]
    ranks: int
    tokens_a_rank: int
    tokens: float
    times: Times
    peak_bytes: int | None
    parts: dict[str, float]
    device: str

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.tokens / self.times.median_ms

    def plain(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}


class MarkedStepper(Stepper):
    """Takes the trainer's steps and, once told, notes when each part of them is over."""

    marks: list[tuple[str, Any]] | None = None

    def mark(self, part: str) -> None:
        """`part` is over, once the device gets here."""
        if self.marks is None:
            return
        moment: Any = time.perf_counter()
        if self.world.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((part, moment))

    def _place(self, batch: SequenceBatch) -> None:
        self.mark("loader")
        super()._place(batch)

    def _place_rows(self, rows: tuple[Tensor, Tensor]) -> None:
        self.mark("lookup")
        super()._place_rows(rows)

    def _average(self) -> None:
        self.mark("model, loss")
        super()._average()
        self.mark("all-reduce")

    def _update(self) -> Tensor | None:
        self.mark("table grad")
        norm = super()._update()
        self.mark("update")
        return norm


@command("measure_scaling")
def main(options: dict[str, Any]) -> None:
    output, device = Path(options.pop("output")), options.pop("device")
    names = options.pop("cases")
    for name in ("ranks", "launch_seconds"):
        options.pop(name)
    config = Config.of(options)
    quiet_libraries()
    with process_group(device) as world:
        for case in chosen(names, world.device.type):
            measure_case(case, config, world, output)
            release(world.device)


def chosen(names: list[str] | None, device: str) -> list[Case]:
    """The device's cases of these names, or all. Raises InputError for one that is unknown."""
    cases = {case.name: case for case in CASES[device]}
    unknown = [name for name in names or [] if name not in cases]
    if unknown or names == []:
        raise InputError(f"cases={names} is unknown on {device}; there are {', '.join(cases)}")
    return [cases[name] for name in names or cases]


def write_case(case: Case, folder: Path) -> None:
    """The case's data set, in its place in `folder`."""
    write_data_set(folder / case.name, USERS, case.items, seed=1, counted=case.counted)


def measure_case(case: Case, config: Config, world: World, output: Path) -> None:
    """Add this number of ranks' figures to the answer, or why there are none. Collective."""
    dataset = HistoryDataset(Path(config.data.path) / case.name)
    try:
        sharded = placed(
            resolve(case_config(case, config, dataset.folder, case.tokens), world, dataset),
            dataset.table_rows,
            world,
        )
    except InputError as error:  # on every rank alike: no room for the table
        if world.is_main:
            reason = {"case": case.name, "ranks": world.size, "reason": str(error)}
            add(output, "skipped", [reason])
            print(f"{case.name} on {world.size}: {error}", flush=True)
        return
    sizes: dict[Literal["weak", "strong"], int] = {"weak": case.tokens}
    if world.size > 1:
        sizes["strong"] = case.tokens // world.size
    for scaling, tokens in sizes.items():
        release(world.device)  # the steps before
        one = case_config(case, config, dataset.folder, tokens)
        row = measure(case, scaling, one, sharded, dataset, world)
        if world.is_main:
            same = [replace(row, scaling="strong")] if world.size == 1 else []
            add(output, "rows", [each.plain() for each in (row, *same)])
            print(describe(row), flush=True)


def case_config(case: Case, config: Config, path: Path, tokens: int) -> Config:
    """The config, changed to what the case fixes, with so many tokens a rank."""
    config = with_data(config, path, "histories", tokens)
    return replace(
        config,
        model=replace(config.model, width=case.width or config.model.width),
        loss=replace(
            config.loss,
            kind=case.loss,
            negatives=config.loss.negatives or NEGATIVES,
            distribution="popularity" if case.counted else "uniform",
        ),
        embedding=replace(config.embedding, dtype=case.dtype, optimizer=case.optimizer),
        data=replace(config.data, long_history="windows"),  # a strong batch may be short
    )


def measure(
    case: Case,
    scaling: Literal["weak", "strong"],
    config: Config,
    sharded: Sharded,
    dataset: HistoryDataset,
    world: World,
) -> Measured:
    """Time the steps of one size of batch on a table that is there. Collective."""
    config = resolve(config, world, dataset)
    on_gpu = world.device.type == "cuda"
    warm_up, each, groups = (8, case.group, 5) if on_gpu else (1, 1, 2)
    counts = Vocabulary(pa.nulls(0), np.zeros(dataset.table_rows, np.int64))
    if case.counted:
        counts = Vocabulary.read(dataset.folder)
    stepper = MarkedStepper(sharded, config.trainer, world, config.seed)
    tokens: list[int] = []
    with loaded(config, dataset, counts, world) as steps:

        def step() -> None:
            one = next(steps)
            stepper.take(one, len(tokens))
            tokens.append(one.tokens)

        if on_gpu:
            torch.cuda.reset_peak_memory_stats(world.device)
        times = Timer(world.device, budget_ms=0.0).steps(step, warm_up, each, groups)
        timed = tokens[warm_up:]
        parts = part_times(stepper, steps, len(tokens), 2 * each)
    return Measured(
        case.name,
        scaling,
        world.size,
        config.data.tokens_a_batch,
        sum(timed) / len(timed),
        times,
        _peak(world),
        parts,
        device_name(world.device),
    )


def part_times(
    stepper: MarkedStepper, steps: TrainingSteps, first: int, count: int
) -> dict[str, float]:
    """Mean milliseconds of each part over `count` further steps, without a wait between them."""
    stepper.marks = []
    stepper.mark("")
    for number in range(first, first + count):
        stepper.take(next(steps), number)
    if stepper.world.device.type == "cuda":
        torch.cuda.synchronize(stepper.world.device)
    sums: dict[str, float] = {}
    for (_, before), (part, after) in zip(stepper.marks, stepper.marks[1:], strict=False):
        passed = 1e3 * (after - before) if isinstance(after, float) else before.elapsed_time(after)
        sums[part] = sums.get(part, 0.0) + passed / count
    stepper.marks = None
    return sums


def _peak(world: World) -> int | None:
    if world.device.type != "cuda":
        return None
    most = torch.tensor(torch.cuda.max_memory_allocated(world.device), device=world.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def add(output: Path, key: str, values: list[dict[str, Any]]) -> None:
    """Add to a list of the answer's document."""
    content = json.loads(output.read_bytes())
    content[key] += values
    write(output, content)


def describe(row: Measured) -> str:
    """One line while the command runs."""
    return (
        f"{row.case} {row.scaling} on {row.ranks}: {row.times.median_ms:,.2f} ms a step, "
        f"{row.tokens_per_second:,.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
