"""The data set of a run, opened alike on every rank."""

from pathlib import Path

import torch.distributed as dist

from data.errors import InputError
from data.reader import HistoryDataset, damaged_files
from trainer.config import DataConfig
from trainer.world import World


def open_data(folder: Path, data: DataConfig, world: World) -> HistoryDataset:
    """The data set, without its damaged files where `data` skips them. Collective.

    The ranks of a host read its copy of every file once, and all ranks leave out what any of them
    found damaged: with other files a rank would have other users, and other batches.
    Raises InputError on every rank for a damaged file that is not to be skipped, and where no file
    is left.
    """
    found: list[dict[str, str]] = [{} for _ in range(world.size)]
    dist.all_gather_object(found, damaged_files(folder, world.local_rank, world.local_size))
    damaged = {path: reason for one in found for path, reason in sorted(one.items())}
    for path, reason in sorted(damaged.items()):
        if data.damaged_files == "fatal":
            raise InputError(
                f"{folder / path} {reason}; copy the data set again, convert the log again, or "
                "leave such files out with data.damaged_files=skip"
            )
        if world.is_main:
            print(f"skipping {folder / path}: it {reason}", flush=True)
    dataset = HistoryDataset(folder, damaged)
    if not dataset.files:
        raise InputError(f"every history file of {folder} is damaged; convert the log again")
    if damaged and world.is_main:
        lost = dataset.manifest.counts["users"] - len(dataset)
        print(f"skipped {len(damaged)} damaged file(s) with {lost:,} users", flush=True)
    return dataset
