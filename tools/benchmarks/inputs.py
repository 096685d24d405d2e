"""Random inputs of the suites: history lengths, packed offsets, a converted data set.

Legend: T tokens, B sequences, U users, V table rows.
"""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.schema import (
    HISTORIES,
    RESERVED_ROWS,
    VOCABULARY,
    DataFile,
    Manifest,
    history_schema,
    vocabulary_schema,
)
from data.spread import stride
from data.synthetic import Process

# MovieLens-1M's shape: users, items, mean, shortest and longest history.
ML1M_USERS, ML1M_ITEMS, ML1M_MEAN, ML1M_SHORTEST, ML1M_LONGEST = 6_040, 3_416, 165, 20, 2_277
SIGMA = 1.0  # of lognormal lengths: ML-1M's median is 0.58 of its mean


def lognormal_lengths(mean: float, users: int, random: np.random.Generator) -> np.ndarray:
    """int64 [U] of about this mean, 1 and above."""
    drawn = random.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, users)
    return np.maximum(np.rint(drawn), 1).astype(np.int64)


def ml1m_lengths(users: int, random: np.random.Generator) -> np.ndarray:
    return np.clip(lognormal_lengths(ML1M_MEAN, users, random), ML1M_SHORTEST, ML1M_LONGEST)


def filling_lengths(tokens: int, mean: int, seed: int) -> np.ndarray:
    """Lognormal lengths that sum to `tokens`: the last is cut."""
    random = np.random.default_rng(seed)
    lengths = lognormal_lengths(mean, 4 * tokens // mean + 64, random)
    total = np.cumsum(lengths)
    last = int(np.searchsorted(total, tokens))
    lengths = lengths[: last + 1]
    lengths[-1] -= total[last] - tokens
    return lengths


def prefix_lengths(prefixes: int, seed: int, longest: int = ML1M_LONGEST) -> np.ndarray:
    """Lengths of prefixes drawn uniformly among all proper prefixes of ML-1M-like histories."""
    random = np.random.default_rng(seed)
    lengths = np.minimum(ml1m_lengths(ML1M_USERS, random), longest)
    ends = np.cumsum(lengths - 1)
    number = random.integers(0, ends[-1], prefixes)
    user = np.searchsorted(ends, number, side="right")
    return number - (ends[user] - (lengths[user] - 1)) + 1


def offsets_of(lengths: np.ndarray, device: torch.device) -> Tensor:
    """int64 [B + 1]."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])).to(device)


def write_data_set(
    folder: Path,
    users: int,
    items: int,
    seed: int,
    counted: bool = True,
    group_users: int | None = None,
) -> Path:
    """A converted data set with ML-1M-like lengths and Zipf items, as tools.convert_logs leaves it;
    all but the last two events of a user train. Returns the folder.

    counted=False leaves the vocabulary without rows: a hundred million take longer to write than
    what reads the histories alone. group_users: of a row group; None for one group.
    """
    random = np.random.default_rng(seed)
    lengths = ml1m_lengths(users, random)
    process = Process(events=1, users=1, items=items, seed=seed)
    ranks_N = process.zipf(random.random(int(lengths.sum())))
    items_N = ranks_N * stride(items) % items + RESERVED_ROWS
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    times_N = np.arange(len(items_N), dtype=np.int64)
    (folder / HISTORIES).mkdir(parents=True)
    table = pa.table(
        [
            pa.array(np.arange(users)),
            pa.ListArray.from_arrays(offsets, items_N.astype(np.int32)),
            pa.ListArray.from_arrays(offsets, times_N),
            pa.array((lengths - 2).astype(np.int32)),
            pa.array(np.ones(users, np.int32)),
        ],
        schema=history_schema(pa.int64(), pa.int32(), pa.int64(), {}),
    )
    histories = folder / HISTORIES / "part-00000.parquet"
    pq.write_table(table, histories, row_group_size=group_users)
    rows, counts = np.arange(0), np.arange(0)
    if counted:
        last_U = offsets[1:] - 1
        trained_N = np.delete(items_N, np.concatenate([last_U, last_U - 1]))
        counts = np.bincount(trained_N, minlength=RESERVED_ROWS + items)[RESERVED_ROWS:]
        rows = np.arange(RESERVED_ROWS, RESERVED_ROWS + items)
    vocabulary = pa.table([rows, rows, counts], schema=vocabulary_schema(pa.int64()))
    pq.write_table(vocabulary, folder / VOCABULARY)
    events = int(lengths.sum())
    Manifest(
        options={},
        counts={
            "users": users,
            "items": items,
            "events": events,
            "train_events": events - 2 * users,
            "validation_events": users,
            "test_events": users,
        },
        split="leave_one_out",
        table_rows=RESERVED_ROWS + items,
        longest_history=int(lengths.max()),
        vocabulary=_describe(folder, folder / VOCABULARY, len(rows)),
        histories=[_describe(folder, histories, users)],
    ).write(folder)
    return folder


def write_first_groups(source: Path, folder: Path, groups: int) -> Path:
    """A data set of the first row groups of the first file of another. Returns the folder."""
    manifest = Manifest.read(source)
    (folder / HISTORIES).mkdir(parents=True)
    shutil.copyfile(source / VOCABULARY, folder / VOCABULARY)
    with pq.ParquetFile(source / manifest.histories[0].path) as file:
        table = file.read_row_groups(range(groups))
    histories = folder / HISTORIES / "part-00000.parquet"
    pq.write_table(table, histories, row_group_size=-(-len(table) // groups))
    replace(manifest, histories=[_describe(folder, histories, len(table))]).write(folder)
    return folder


def _describe(folder: Path, path: Path, rows: int) -> DataFile:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return DataFile(path.relative_to(folder).as_posix(), rows, len(content), digest)
