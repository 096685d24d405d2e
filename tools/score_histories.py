"""Score histories in batch: the top k items of every user, Parquet in, Parquet out.

    python -m tools.score_histories bundle=BUNDLE input=PATH|GLOB output=DIR k=100
    torchrun --nproc_per_node=N -m tools.score_histories …

The unit is an output file: some users of one row group of histories. Of N processes the r-th
writes every N-th unit, each under a temporary name that is renamed, so a killed run goes
on with what is missing. There is no collective: processes meet through files in the output folder
alone. A thread reads ahead and some write behind: memory is two row groups, a few batches and a few
files, however large the input.

A user without a history (nothing known, or nothing in the part that `upto` names) is counted and
left out. All options: configs/score.yaml.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.command import command
from data.bundle import Bundle
from data.bundle_manifest import FORMATS, TORCHSCRIPT
from data.compiled import AOTINDUCTOR
from data.cores import check_threads
from data.errors import InputError, check_whole
from data.item_filter import ItemFilter, read_filter
from data.log_files import LogFiles, find_files
from data.prefetch import Prefetcher
from data.reader import HistoryDataset, damaged_files
from data.schema import HISTORIES, MANIFEST, VOCABULARY, Manifest, sha256_of
from data.score_output import ScoreFolder, WriteBehind, summarise
from data.scoring import UPTO, Answer, Batch, Unit, UnitScores, batches, score_batches, units_of
from data.vocabulary import Vocabulary
from data.waits import Waits
from tools.place import DEVICES, Place
from tools.stages import print_table
from trainer.config import check_kernels
from trainer.parity import compare

if TYPE_CHECKING:
    from modules.kernel_scorer import KernelScorer

KERNELS = (*FORMATS, "bf16", "fp32")  # the bundle's own model, by its format; the trainer's
# A batch's temporaries should stay in a CPU's cache, and a GPU wants many tokens at once.
BATCH_TOKENS = {"cpu": 2048, "cuda": 65536}
KERNEL_BATCH_TOKENS = 262_144  # of the trainer's kernels, on a GPU
IN_FLIGHT = 4  # batches that a GPU has to do beside the one whose answer is waited for
BATCHES_AHEAD = 4  # that the reading thread holds ready
WRITERS = {"cpu": 1, "cuda": 8}  # threads
GATE_TOKENS, GATE_ITEMS = 65_536, 100  # at most, of the comparison before kernels are used
LOG_OPTIONS = ("max_bad_rows", "row_group_events", "memory_limit", "threads")  # of a raw log alone
GROUPED = "grouped"  # a raw log's histories, inside the output while it is unfinished


@dataclass(frozen=True)
class ScoreConfig:
    """The options of configs/score.yaml, checked."""

    bundle: str
    input: str | list[str]
    output: str
    k: int = 100
    exclude_seen: bool = True
    upto: str = "all"
    batch_tokens: int | None = None
    device: str = "auto"
    kernels: str = TORCHSCRIPT
    min_agreement: float = 0.95
    part_users: int | None = None
    allow_items: str | list[Any] | None = None
    block_items: str | list[Any] | None = None
    block_by_user: str | None = None
    block_by_user_column: str = "item_ids"
    columns: dict[str, str | None] = field(default_factory=dict)
    csv: dict[str, Any] = field(default_factory=dict)
    max_bad_rows: int = 0
    row_group_events: int = 1_000_000
    memory_limit: str = "4GB"
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"k": 1, "batch_tokens": 1, "part_users": 1, "row_group_events": 1}
        for name, minimum in (least | {"max_bad_rows": 0}).items():
            value = getattr(self, name)
            if name not in ("batch_tokens", "part_users") or value is not None:
                check_whole(name, value, minimum)
        if self.threads is not None:
            check_threads(self.threads)
        if not isinstance(self.exclude_seen, bool):
            raise InputError(f"exclude_seen={self.exclude_seen} must be true or false")
        if not isinstance(self.min_agreement, int | float) or not 0 <= self.min_agreement <= 1:
            raise InputError(f"min_agreement={self.min_agreement} is outside [0, 1]")
        for name, choices in (("upto", UPTO), ("device", DEVICES), ("kernels", KERNELS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name}={getattr(self, name)} is unknown; choose {' | '.join(choices)}"
                )


def score(config: ScoreConfig) -> dict[str, Any] | None:
    """Score all of the input with this process's share; rank 0's answer is the summary.

    Raises InputError for a bundle, an input, an option or an output that cannot be used.
    """
    started = time.monotonic()
    place = Place.of(config.device)
    # One process looks into every byte; all look at sizes, and torchrun ends all with the first.
    bundle = Bundle.open(
        config.bundle,
        place.device,
        hashes=place.rank == 0,
        native_code=config.kernels == AOTINDUCTOR,
    )
    if config.kernels == AOTINDUCTOR and bundle.manifest.format != AOTINDUCTOR:
        raise InputError(
            f"kernels={AOTINDUCTOR} is for a bundle of that format, and {config.bundle} is "
            f"{bundle.manifest.format}; leave kernels out"
        )
    bundle.check_k(config.k)
    files = None if _is_dataset(config.input) else find_files(config.input)
    dataset_folder = Path(str(config.input))
    items = read_filter(
        bundle.vocabulary,
        config.allow_items,
        config.block_items,
        config.block_by_user,
        config.block_by_user_column,
    )
    if files is None:
        _refuse_log_options(config)
        _check_same_items(Manifest.read(dataset_folder), bundle, dataset_folder)
        if place.rank == 0:
            _check_whole(dataset_folder)
    elif config.upto != "all":
        raise InputError(
            f"upto={config.upto} is for a converted data set; a raw log has no split, use upto=all"
        )

    folder = ScoreFolder(Path(config.output), _job(config, bundle, files), GROUPED)
    if not folder.begin(place.rank == 0):
        return None  # the others did all that there was before this process came
    try:
        return _score(config, folder, dataset_folder, files, bundle, items, place, started)
    except InputError:
        if place.rank > 0 and folder.finished:
            return None  # nothing was left for this process, and its input has been cleared away
        if place.rank == 0:
            folder.abandon()
        raise


def _score(
    config: ScoreConfig,
    folder: ScoreFolder,
    dataset_folder: Path,
    files: LogFiles | None,
    bundle: Bundle,
    items: ItemFilter,
    place: Place,
    started: float,
) -> dict[str, Any] | None:
    """Group a raw log (the first process alone), score this process's units, and sum up."""
    log_counts: dict[str, int] = {}
    if files is not None:
        dataset_folder = folder.path / GROUPED
        if place.rank == 0 and not dataset_folder.exists():
            _group(config, files, bundle, dataset_folder)
        folder.wait_for(dataset_folder / MANIFEST)
        log_counts = Manifest.read(dataset_folder).counts
    dataset = HistoryDataset(dataset_folder)
    units = units_of(dataset, config.part_users)
    launch = launcher(config, dataset, bundle, items, place)
    ready = time.monotonic()
    waits = Waits()
    _score_units(config, folder, dataset, bundle, items, units, launch, place, waits)
    if place.rank > 0:
        return None
    for unit in units:
        folder.wait_for(folder.path / unit.name)
    summary = summarise(folder, [unit.name for unit in units], log_counts)
    summary |= {
        "bundle": {"fingerprint": bundle.manifest.fingerprint, **bundle.manifest.checkpoint},
        "seconds": time.monotonic() - started,
        "seconds_to_start": ready - started,
        "seconds_waiting": waits.seconds,
        "world_size": place.size,
        "device": place.device.type,
        "kernels": config.kernels,
    }
    folder.finish(summary)
    return summary


Launch = Callable[[Batch], Callable[[], Answer]]


def launcher(
    config: ScoreConfig, dataset: HistoryDataset, bundle: Bundle, items: ItemFilter, place: Place
) -> Launch:
    """What starts a batch: the bundle's own model, or the trainer's kernels if they agree with it.

    Raises InputError where they do not.
    """

    def by_bundle(batch: Batch) -> Callable[[], Answer]:
        answer = bundle.score(
            batch.items_T.long(),
            batch.offsets_B1,
            config.k,
            config.exclude_seen,
            batch.excluded,
            items.allowed_V,
        )
        return lambda: answer

    if config.kernels in FORMATS:
        return by_bundle
    scorer = kernel_scorer(bundle, place.device, config.kernels, items.allowed_V)
    _gate(config, dataset, bundle, items, scorer, place.rank == 0)

    def by_kernels(batch: Batch) -> Callable[[], Answer]:
        wait = scorer.launch(
            batch.items_T, batch.offsets_B1, config.k, config.exclude_seen, batch.excluded
        )
        return lambda: bundle.checked(*wait())

    return by_kernels


def kernel_scorer(
    bundle: Bundle, device: torch.device, kernels: str, allowed_V: Tensor | None = None
) -> "KernelScorer":
    """The trainer's kernels with the bundle's weights, whose rows they share. kernels: bf16 | fp32.

    Raises InputError for sizes that no CUDA kernel has.
    """
    from modules.kernel_scorer import KernelScorer  # scoring with a bundle alone needs none of it

    sizes = bundle.manifest.model
    if device.type == "cuda":
        inner = sizes["expand"] * sizes["width"]
        check_kernels(sizes["head"], sizes["state"], sizes["conv"], inner)
    return KernelScorer(bundle.model, sizes, device, kernels, allowed_V)


def _gate(
    config: ScoreConfig,
    dataset: HistoryDataset,
    bundle: Bundle,
    items: ItemFilter,
    scorer: "KernelScorer",
    is_main: bool,
) -> None:
    """Compare the kernels' answers to the input's first histories with the bundle's own."""
    units = units_of(dataset, config.part_users)
    some = batches(dataset, units, config.upto, ItemFilter(), GATE_TOKENS)
    batch = next((one for one in some if len(one)), None)
    if batch is None:
        return  # nothing to score either
    items_T, k = batch.items_T.long(), min(config.k, GATE_ITEMS)
    here = [one.to(bundle.device) for one in (items_T, batch.offsets_B1, items_T[:0])]
    allowed_V = None if items.allowed_V is None else items.allowed_V.to(bundle.device)
    h_BD = bundle.model.hidden(here[0], here[1])
    rows_BK, scores_BK = bundle.model.top(h_BD, k, here[2], here[2], allowed_V)
    rows_BK, scores_BK = bundle.checked(rows_BK.cpu(), scores_BK.cpu())
    probe = {"history": items_T, "offsets": batch.offsets_B1, "items": rows_BK, "scores": scores_BK}
    parity = compare(scorer, probe)
    if is_main:
        print(f"kernels={config.kernels} against the bundle's own model, {parity}")
    if not parity.overlap >= config.min_agreement:  # NaN is not enough either
        raise InputError(
            f"kernels={config.kernels} find {parity.overlap:.4f} of the bundle's top {k} items, "
            f"below min_agreement={config.min_agreement}; use kernels={TORCHSCRIPT}"
        )


def _score_units(
    config: ScoreConfig,
    folder: ScoreFolder,
    dataset: HistoryDataset,
    bundle: Bundle,
    items: ItemFilter,
    units: list[Unit],
    launch: Launch,
    place: Place,
    waits: Waits,
) -> None:
    """Write this process's units that are not written yet.

    waits: for batches to be read, for answers, and for files to be written.
    """
    mine = units[place.rank :: place.size]
    missing = [unit for unit in mine if not (folder.path / unit.name).exists()]
    tokens = config.batch_tokens or default_tokens(config.kernels, place.device.type)
    in_flight = 0 if config.kernels in FORMATS else IN_FLIGHT
    work = batches(dataset, missing, config.upto, items, tokens)
    with (
        _single_threaded(place.device.type == "cuda"),
        folder.progress(sum(unit.users for unit in mine), place.rank, place.size) as bar,
        WriteBehind(WRITERS[place.device.type]) as writers,
        Prefetcher(work, BATCHES_AHEAD) as ahead,
    ):
        bar.update(sum(unit.users for unit in mine) - sum(unit.users for unit in missing))
        read = waits.each("batches", ahead)
        for scores in score_batches(read, partial(_waited, launch, waits), in_flight):
            job = partial(_write, folder, bundle.vocabulary, config.k, scores)
            waits.of("files", writers.submit, job)
            bar.update(scores.users.unit.users)
        waits.of("files", writers.finish)


@contextmanager
def _single_threaded(wanted: bool) -> Iterator[None]:
    """Have torch compute on the thread that asks, without a team of threads that helps it.

    Beside a GPU the host reads, launches and writes, each in threads of its own. A team as large as
    the machine for each of them, spinning while it waits, cost a fifth of the users/s on 16 cores.
    """
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _waited(launch: Launch, waits: Waits, batch: Batch) -> Callable[[], Answer]:
    return partial(waits.of, "answers", launch(batch))


def default_tokens(kernels: str, device: str) -> int:
    """History events scored at once where batch_tokens says nothing. device: cpu | cuda."""
    if device == "cuda" and kernels not in FORMATS:
        return KERNEL_BATCH_TOKENS
    return BATCH_TOKENS[device]


def _write(folder: ScoreFolder, vocabulary: Vocabulary, k: int, scores: UnitScores) -> None:
    folder.write(scores.users.unit.name, scores.table(vocabulary, k))


def _is_dataset(source: str | list[str]) -> bool:
    """A folder with a manifest or a histories folder is a data set, or means to be one."""
    if not isinstance(source, str):
        return False
    folder = Path(source)
    return folder.is_dir() and ((folder / MANIFEST).exists() or (folder / HISTORIES).is_dir())


def _refuse_log_options(config: ScoreConfig) -> None:
    """A data set has been read already: the options of reading a log would change nothing."""
    given = {f"columns.{role}": name for role, name in config.columns.items()}
    given |= {f"csv.{name}": value for name, value in config.csv.items() if value != {}}
    for one in fields(config):
        if one.name in LOG_OPTIONS and getattr(config, one.name) != one.default:
            given[one.name] = getattr(config, one.name)
    for name, value in given.items():
        if value is not None:
            raise InputError(
                f"{name}={value} is for a raw log, but input={config.input} is a data set; "
                f"leave {name} out"
            )


def _check_whole(folder: Path) -> None:
    for path, what in damaged_files(folder).items():
        raise InputError(f"{folder / path} {what}; copy the data set or convert its log again")


def _check_same_items(manifest: Manifest, bundle: Bundle, folder: Path) -> None:
    if manifest.vocabulary.sha256 != bundle.manifest.hash_of(VOCABULARY):
        raise InputError(
            f"data set {folder} and bundle {bundle.folder} number their items differently (another "
            "vocabulary.parquet); score the raw log instead"
        )


def _job(config: ScoreConfig, bundle: Bundle, files: LogFiles | None) -> dict[str, Any]:
    """What the output depends on, so that a run goes on only with what is its own."""
    source: Any
    if files is None:
        source = sha256_of(Path(str(config.input)) / MANIFEST)
    else:
        facts = [(path, os.stat(path)) for path in files.paths]
        source = [[path, stat.st_size, stat.st_mtime_ns] for path, stat in facts]
    kept = (
        *("k", "exclude_seen", "upto", "kernels", "part_users", "columns", "csv"),
        "row_group_events",
    )
    options = {name: value for name, value in asdict(config).items() if name in kept}
    for name in ("allow_items", "block_items", "block_by_user"):
        value = getattr(config, name)
        options[name] = sha256_of(Path(value)) if isinstance(value, str) else value
    options["block_by_user_column"] = config.block_by_user_column
    return {"bundle": bundle.manifest.fingerprint, "input": source, **options}


def _group(config: ScoreConfig, files: LogFiles, bundle: Bundle, folder: Path) -> None:
    # Scoring a data set needs no DuckDB, which not every machine with a GPU has.
    from data.score_input import GroupingLimits, group_log, rules_for

    rules = rules_for(
        bundle.manifest.data["options"],
        config.columns,
        config.csv.get("delimiter"),
        config.csv.get("types"),
    )
    limits = GroupingLimits(
        config.max_bad_rows, config.row_group_events, config.memory_limit, config.threads
    )
    group_log(files, rules, bundle, folder, limits)


def _report(summary: dict[str, Any], output: str) -> None:
    rows = [
        ("users scored", f"{summary['users_scored']:,}"),
        ("without a history", f"{summary['users_without_history']:,} (left out)"),
        ("with fewer than k items", f"{summary['users_short']:,}"),
        ("history events", f"{summary['events']:,}"),
    ]
    if "events_unknown" in summary:
        rows += [("events of unknown items", f"{summary['events_unknown']:,} (passed over)")]
        rows += [("bad rows", f"{summary['events_bad']:,} (skipped)")]
    before = summary["seconds_to_start"]
    seconds = summary["seconds"] - before
    rows += [
        ("scores", f"{output} ({len(summary['parts'])} file(s))"),
        ("seconds", f"{seconds:.1f} ({summary['users_scored'] / seconds:,.0f} users/s)"),
        ("seconds before the first", f"{before:.1f}"),
        ("seconds of waiting", describe_waits(summary["seconds_waiting"])),
    ]
    print_table(rows)


def describe_waits(seconds: dict[str, float]) -> str:
    """What this process waited for: where little of it is, it had its own hands full."""
    return ", ".join(f"for {name} {spent:.1f}" for name, spent in seconds.items())


@command("score")
def main(options: dict[str, Any]) -> None:
    config = ScoreConfig(**options)
    summary = score(config)
    if summary is not None:
        _report(summary, config.output)


if __name__ == "__main__":
    main()
