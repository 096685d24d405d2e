"""Tiny converted data sets for tests, written with the schemas and no converter."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.schema import (
    HISTORIES,
    RESERVED_ROWS,
    VOCABULARY,
    DataFile,
    Manifest,
    history_schema,
    vocabulary_schema,
)


def write_dataset(
    folder: Path,
    histories: Sequence[Sequence[int]],
    n_train: Sequence[int] | None = None,
    n_validation: Sequence[int] | None = None,
    files: int = 1,
    row_group_users: int | None = None,
    item_type: pa.DataType | None = None,
    table_rows: int | None = None,
) -> Path:
    """A data set of these histories (lists of table rows, RESERVED_ROWS and above), one a user.

    n_train, n_validation: events of each user, by default leave-one-out: the last event is test,
    the one before validation, where there are that many. files: users are spread over them in
    order; row_group_users: users of a row group, by default a whole file.
    Users are called 'u0', 'u1', …, items 'i8', 'i9', … after their rows. Returns the folder.
    """
    if n_train is None:
        n_train = [max(len(one) - 2, 0) for one in histories]
    if n_validation is None:
        n_validation = [min(max(len(h) - t, 0), 1) for h, t in zip(histories, n_train, strict=True)]
    highest = max((max(one) for one in histories if len(one)), default=RESERVED_ROWS)
    table_rows = highest + 1 if table_rows is None else table_rows
    (folder / HISTORIES).mkdir(parents=True, exist_ok=True)

    schema = history_schema(pa.string(), item_type or pa.int32(), pa.int64(), {})
    table = pa.table(
        {
            "user_id": [f"u{user}" for user in range(len(histories))],
            "items": [list(one) for one in histories],
            "timestamps": [list(range(len(one))) for one in histories],
            "n_train": list(n_train),
            "n_validation": list(n_validation),
        },
        schema=schema,
    )
    written = []
    for number, part in enumerate(np.array_split(np.arange(len(histories)), files)):
        path = folder / HISTORIES / f"part-{number:05d}.parquet"
        rows = table.slice(int(part[0]) if len(part) else 0, len(part))
        size = row_group_users or max(len(part), 1)
        pq.write_table(rows, path, row_group_size=size, write_page_checksum=True)
        written.append(_describe(folder, path, len(part)))

    trained = [item for one, n in zip(histories, n_train, strict=True) for item in one[:n]]
    counts = np.bincount(np.array(trained, dtype=np.int64), minlength=table_rows)
    rows = np.arange(RESERVED_ROWS, table_rows)
    vocabulary = {
        "item_id": [f"i{row}" for row in rows],
        "item": rows,
        "count": counts[RESERVED_ROWS:table_rows],
    }
    table = pa.table(vocabulary, schema=vocabulary_schema(pa.string()))
    pq.write_table(table, folder / VOCABULARY, write_page_checksum=True)
    events, train, validation = sum(map(len, histories)), sum(n_train), sum(n_validation)
    Manifest(
        options={},
        counts={
            "users": len(histories),
            "items": table_rows - RESERVED_ROWS,
            "events": events,
            "train_events": train,
            "validation_events": validation,
            "test_events": events - train - validation,
        },
        split="leave_one_out",
        table_rows=table_rows,
        longest_history=max(map(len, histories), default=0),
        vocabulary=_describe(folder, folder / VOCABULARY, len(rows)),
        histories=written,
    ).write(folder)
    return folder


def random_histories(users: int, longest: int, items: int, seed: int = 0) -> list[list[int]]:
    """Histories of 1 to `longest` events over `items` items."""
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest + 1, users)
    return [random.integers(RESERVED_ROWS, RESERVED_ROWS + items, n).tolist() for n in lengths]


def _describe(folder: Path, path: Path, rows: int) -> DataFile:
    content = path.read_bytes()
    name = path.relative_to(folder).as_posix()
    return DataFile(name, rows, len(content), hashlib.sha256(content).hexdigest())
