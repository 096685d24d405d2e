"""What one rank of the two-rank tests does; run by 1 process and by torchrun with 2.

Trains on the same global batches whatever the number of ranks, with very different numbers of
targets a rank, and writes what the ranks then agree on as JSON: python -m tests.distributed.worker
OUT FOLDER [cpu|cuda] [all|graphs]. On CUDA it leaves out what does not depend on the device.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from data.batch import SequenceBatch
from data.errors import InputError
from data.evaluation import EvaluationBatches
from data.loader import Step
from data.negatives import full_slice
from data.reader import HistoryDataset
from data.schema import PADDING_ROW, RESERVED_ROWS
from modules.encoder import Encoder
from modules.item_table import ItemTable
from modules.losses import FullSoftmax, SampledSoftmax
from modules.recommender import Recommender
from trainer.checkpoint import RunState, checkpoint_path, load, verify
from trainer.config import DataConfig, TableConfig, TrainerConfig
from trainer.distributed import ids_group, process_group, quiet_libraries
from trainer.evaluate import evaluate, top_items
from trainer.open_data import open_data
from trainer.run_folder import require_agreement, require_shared
from trainer.saver import Saver
from trainer.sharding import Sharded, plan_table, shard
from trainer.stepper import Stepper
from trainer.warm_start import GrownTable
from trainer.world import World

ROWS, WIDTH, TOKENS, NEGATIVES, STEPS = 101, 64, 32, 24, 8
STATE, HEAD = 16, 32  # there are kernels for these
GROWN_ROWS = 118
# Of the table; neither depends on how a row is cut into columns.
OPTIMIZERS = {"cpu": "adagrad", "cuda": "adam"}
EVERY_DEVICE = "rowwise_adagrad"  # for checkpoints that another kind of device reads
TRAIN = TrainerConfig(
    "cpu",
    "fp32",
    False,
    1,
    1e-2,
    0.9,
    0.98,
    0.1,
    1.0,
    "constant",
    0,
    1,
    "",
    0,
    "all",
    0,
    1,
    False,
    1,
    "fatal",
    0,
)
SHARDINGS = ("row_wise", "table_wise", "column_wise")


def main(out: Path, folder: Path, device: str = "cpu", part: str = "all") -> None:
    quiet_libraries()
    torch.set_num_threads(1)
    with process_group(device) as world:
        results = {"graphs": graphs, "all": measure, "save": save_own}[part](world, folder)
    results["threads"] = [one.read_text().strip() for one in Path("/proc/self/task").glob("*/comm")]
    if world.is_main:
        out.write_text(json.dumps(results))


def measure(world: World, folder: Path) -> dict:
    """The results of this number of ranks by name; of three, only what more ranks could change."""
    results: dict = {"skipped": skipped(world), **resume(world, folder)}
    if world.size > 2:
        return results
    for sharding in SHARDINGS:
        sharded = build(world, sharding, FullSoftmax(world.rank, smoothing=0.1))
        results[f"rows {sharding}"] = table_rows(sharded)
        results[f"full {sharding}"] = [step(sharded, world, n, sampled=False) for n in range(8)]
        results[f"top {sharding}"] = best(sharded, world)
    sampled = build(world, "row_wise", loss())
    results["sampled"] = [step(sampled, world, n, sampled=True) for n in range(STEPS)]
    results["groups"] = groups(sampled, world)
    results["against TorchRec"] = against_torchrec(world)
    results |= evaluations(world, folder)
    if world.device.type == "cuda":
        return results
    results["refusals"] = refusals(world, folder)
    return {**results, **damaged_data(world, folder), **grow(world, folder)}


def graphs(world: World, folder: Path) -> dict[str, list]:
    """Losses of one `Stepper` each, whose steps are CUDA graphs."""
    found: dict[str, list] = {}
    for name, objective in (("full", FullSoftmax(world.rank, smoothing=0.1)), ("sampled", loss())):
        stepper = Stepper(
            build(world, "row_wise", objective), replace(TRAIN, cuda_graphs=True), world, seed=1
        )
        found[name] = [
            step_of(stepper, world, number, name == "sampled") for number in range(STEPS)
        ]
    return found


def groups(sharded: Sharded, world: World) -> list[str]:
    """The group of each all-to-all of a step with a sampled loss: "ids" or "default"."""
    plain, found = dist.all_to_all_single, []

    def noted(*args, **options):
        group = options.get("group") or dist.group.WORLD
        assert group in (dist.group.WORLD, ids_group())
        found.append("default" if group is dist.group.WORLD else "ids")
        return plain(*args, **options)

    dist.all_to_all_single = noted
    try:
        step(sharded, world, 0, sampled=True)
    finally:
        dist.all_to_all_single = plain
    return found


def against_torchrec(world: World) -> float:
    """The largest difference of rows, looked up and updated, from those by TorchRec's modules.

    Ranks differ in the numbers of their ids; at first all ids are of the first rank's rows.
    """
    ours, theirs = (build(world, "row_wise", loss()) for _ in range(2))
    theirs.recommender.table._runs = None
    difference = 0.0
    for number in range(4):
        g = torch.Generator().manual_seed(10 * number + world.rank)
        T, C = [(1, 1), (27, 5), (4, 23)][(world.rank + number) % 3]
        ids = torch.randint(0, ROWS if number else 5, (T + C,), generator=g)
        gradients = torch.randn(T + C, WIDTH, generator=g).to(world.device).split([T, C])
        batch = SequenceBatch.build(ids[:T], ids[T:], torch.tensor([0, T]), ids[:T])
        found = []
        for one in (ours, theirs):
            rows = one.recommender.table(batch.to(world.device).features)
            torch.autograd.backward(rows, gradients)
            found.append(torch.cat(rows))
        difference = max(difference, float((found[0] - found[1]).abs().max()))
    return difference


def evaluations(world: World, folder: Path) -> dict[str, list]:
    """Train, save and evaluate; evaluate what other ranks saved so. For "ranks from-2", say."""
    sharded = build(
        world, "row_wise", FullSoftmax(world.rank, smoothing=0.1), optimizer=EVERY_DEVICE
    )
    for number in range(4):
        step(sharded, world, number, sampled=False)
    save(folder / f"evaluated-{world.size}", sharded, world)
    return {"ranks": ranks(sharded, world, folder), **evaluate_saved(world, folder)}


def evaluate_saved(world: World, folder: Path) -> dict[str, list]:
    """Both protocols' ranks, and the next losses, of each checkpoint that `evaluations` saved."""
    found: dict[str, list] = {}
    for saved in sorted(folder.glob("evaluated-*")):
        sharded = build(
            world, "row_wise", FullSoftmax(world.rank, smoothing=0.1), optimizer=EVERY_DEVICE
        )
        load(checkpoint_path(saved, 4), sharded)
        number_of_ranks = saved.name.removeprefix("evaluated-")
        found[f"ranks of {number_of_ranks}"] = ranks(sharded, world, folder)
        found[f"losses of {number_of_ranks}"] = [
            step(sharded, world, number, sampled=False) for number in range(4, STEPS)
        ]
    return found


def ranks(sharded: Sharded, world: World, folder: Path) -> list[list[int]]:
    """(filtered rank, unfiltered rank, target, history length) of each target, in one order."""
    batches = EvaluationBatches(
        HistoryDataset(folder / "histories"), "test", "all", TOKENS, 4, world.rank, world.size
    )
    found = evaluate(sharded.recommender, batches, world, ROWS)
    columns = found.filtered_N, found.unfiltered_N, found.targets_N, found.history_length_N
    return sorted(list(map(int, one)) for one in zip(*columns, strict=True))


def skipped(world: World) -> list[bool]:
    """Which of three steps are skipped where the last rank alone has a loss that is no number."""
    sharded = build(world, "row_wise", FullSoftmax(world.rank, smoothing=0.1))
    stepper = Stepper(sharded, replace(TRAIN, nonfinite="skip"), world, seed=1)
    forward, found = sharded.recommender.loss_of_rows, []
    for number in range(3):
        if number == 1 and world.rank == world.size - 1:
            sharded.recommender.loss_of_rows = lambda *args: forward(*args) * torch.nan
        batch = global_batch(number % 2, world, sampled=False)
        found.append(
            stepper.take(Step(batch, number, 0, 0, False, 0.0, 2 * TOKENS, 25), number).skipped
        )
        sharded.recommender.loss_of_rows = forward
    return found


def refusals(world: World, folder: Path) -> list[str]:
    """What each rank is told where rank 0 has another config, or a run folder of its own."""
    own = folder / f"host-{world.rank}"
    own.mkdir(exist_ok=True)
    told = []
    for ask in (
        lambda: require_agreement(f"{{model: {{width: {16 + world.rank}}}}}", world),
        lambda: require_shared(own, world, seconds=0.2),
        lambda: require_shared(folder, world, seconds=0.2),
    ):
        try:
            ask()
            told.append("")
        except InputError as error:
            told.append(str(error))
    every: list[list[str]] = [[]] * world.size
    dist.all_gather_object(every, told)
    assert len({tuple(map(bool, one)) for one in every}) == 1, "all ranks refuse, or none"
    return told


def damaged_data(world: World, folder: Path) -> dict[str, list]:
    """What each rank opens of data sets of four files: one host's copy, then a copy a host."""
    alone = replace(world, local_rank=0, local_size=1)
    found = {}
    for name, where, place in [
        ("one copy", world, folder / "data0"),
        ("a copy a host", alone, folder / f"data{world.rank}"),
    ]:
        dataset = open_data(place, data_config("skip"), where)
        groups = [dataset.read(number).user_ids for number in range(len(dataset.groups))]
        users = [user for group in groups for user in group.to_pylist()]
        try:
            open_data(place, data_config("fatal"), where)
            message = ""
        except InputError as error:
            message = str(error)
        answers: list = [None] * world.size
        dist.all_gather_object(answers, [dataset.left_out, users, message])
        found[name] = answers
    return found


def data_config(damaged_files: str) -> DataConfig:
    return DataConfig("", "histories", 8, 2, 0.0, 0.0, None, "refuse", 0, 8, damaged_files)  # type: ignore[arg-type]


def build(
    world: World, sharding: str, loss, rows: int = ROWS, optimizer: str | None = None
) -> Sharded:
    optimizer = optimizer or OPTIMIZERS[world.device.type]
    table = TableConfig(sharding, "fp32", "none", 0.1, optimizer, 0.05, 0.9, 0.98, 1e-8)
    torch.manual_seed(1)
    with torch.device(world.device):
        encoder = Encoder("causal", WIDTH, 1, STATE, HEAD, 2, 4, 0.0, True, repeats=True)
    recommender = Recommender(ItemTable(rows, WIDTH, device=torch.device("meta")), encoder, loss)
    plan = plan_table(recommender, table, world, TOKENS, rows)
    return shard(recommender, plan, table, TRAIN, world, seed=3)


def step(sharded: Sharded, world: World, number: int, sampled: bool) -> float:
    """One step on global batch `number`; the mean loss over all its targets."""
    return step_of(Stepper(sharded, TRAIN, world, seed=1), world, number, sampled)


def step_of(stepper: Stepper, world: World, number: int, sampled: bool) -> float:
    batch = global_batch(number % 2, world, sampled)
    total = stepper.take(Step(batch, number, 0, 0, False, 0.0, 2 * TOKENS, 25), number).loss
    dist.all_reduce(total)
    return float(total / batch.step_targets)


def global_batch(number: int, world: World, sampled: bool) -> SequenceBatch:
    """This rank's part of the batch: two halves of TOKENS, of 20 and of 5 targets."""
    random = torch.Generator().manual_seed(number)
    ids = torch.randint(RESERVED_ROWS, ROWS, (2, TOKENS), generator=random)
    targets = torch.randint(RESERVED_ROWS, ROWS, (2, TOKENS), generator=random)
    targets[0, 20:] = PADDING_ROW
    targets[1, 5:] = PADDING_ROW
    negatives = torch.randint(RESERVED_ROWS, ROWS, (NEGATIVES,), generator=random)
    offsets = torch.arange(0, TOKENS + 1, 8)
    # Of three ranks the last gets the other half's ids and no target.
    mine = [0, 1] if world.size == 1 else [min(world.rank, 1)]
    if world.rank == 2:
        targets[:] = PADDING_ROW
    history, wanted = ids[mine].flatten(), targets[mine].flatten()
    bounds = torch.cat([offsets, *(offsets[1:] + TOKENS * n for n in range(1, len(mine)))])
    candidates = torch.as_tensor(full_slice(ROWS, world.rank, world.size))
    log_counts = None
    if sampled:
        candidates = torch.cat([negatives, wanted])
        log_counts = torch.zeros(len(candidates))
    ids = history, candidates, bounds, wanted
    return SequenceBatch.build(*ids, log_counts_C=log_counts, step_targets=25.0)


def table_rows(sharded: Sharded, rows: int = ROWS) -> list[list[float]]:
    """The table's rows by lookup."""
    ids = torch.arange(rows)
    batch = SequenceBatch.build(ids, ids[:1], torch.tensor([0, rows]), ids)
    with torch.no_grad():
        batch = batch.to(sharded.dense_parameters[0].device)
        return sharded.recommender.table(batch.features)[0].tolist()


def best(sharded: Sharded, world: World) -> list[list[int]]:
    h = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(world.device)
    with torch.no_grad():
        return top_items(sharded.recommender, h, 10, world, ROWS)[0].tolist()


def save_own(world: World, folder: Path) -> dict[str, list[float]]:
    """Save after 4 steps, with two shardings; no result."""
    for sharding, place in (("row_wise", "from-"), ("table_wise", "from-tables-of-")):
        sharded = build(world, sharding, FullSoftmax(world.rank, smoothing=0.1))
        for number in range(4):
            step(sharded, world, number, sampled=False)
        save(folder / f"{place}{world.size}", sharded, world)
    return {}


def resume(world: World, folder: Path) -> dict[str, list[float]]:
    """Save, and go on from what these and other ranks saved, with two shardings."""
    results = save_own(world, folder)
    for saved in sorted(folder.glob("from-*")):
        verify(checkpoint_path(saved, 4), world)
        for sharding in ("row_wise", "table_wise"):
            sharded = build(world, sharding, FullSoftmax(world.rank, smoothing=0.1))
            step(sharded, world, 9, sampled=False)  # something that the load must overwrite
            assert load(checkpoint_path(saved, 4), sharded).step == sharded.updates() == 4
            results[f"{saved.name} {sharding}"] = [
                step(sharded, world, number, sampled=False) for number in range(4, STEPS)
            ]
    return results


def save(folder: Path, sharded: Sharded, world: World) -> None:
    state = RunState(step=4)
    with Saver(folder, sharded, world, RunState(), "", 1, True, print) as saver:
        saver.save(state, {})
        saver.require_written(saver.settle(state))


def grow(world: World, folder: Path) -> dict[str, list]:
    """Load into a larger table what `resume` saved, and what a row-wise optimizer saved by columns.

    The sampled loss touches no new row, so it must go on as with the table of the checkpoint.
    """
    results = {}
    if world.size == 2:
        sharded = build(world, "column_wise", loss(), optimizer="rowwise_adagrad")
        for number in range(4):
            step(sharded, world, number, sampled=True)
        save(folder / "by-columns", sharded, world)
    cases = [("adagrad", sharding, "from-2") for sharding in SHARDINGS]
    if world.size == 2:  # its state has a part for each column shard
        cases.append(("rowwise_adagrad", "column_wise", "by-columns"))
    for optimizer, sharding, saved in cases:
        for rows in (ROWS, GROWN_ROWS):
            sharded = build(world, sharding, loss(), rows, optimizer)
            load(checkpoint_path(folder / saved, 4), sharded, GrownTable(ROWS, rows))
            name = f"{optimizer} {sharding} {rows}"
            results[f"rows {name}"] = table_rows(sharded, rows)
            results[f"loss {name}"] = [step(sharded, world, n, sampled=True) for n in range(4)]
    return results


def loss() -> SampledSoftmax:
    return SampledSoftmax(NEGATIVES, False, True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
