"""From grouped events to a data set's files: history shards, their counts, sealed files."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.log_query import OWN_COLUMNS
from data.schema import COMPRESSION, HISTORIES, DataFile, history_schema, sha256_of


@dataclass
class HistoryCounts:
    """What was written; `by_row` counts training events over table rows."""

    by_row: np.ndarray
    events: int = 0
    train_events: int = 0
    validation_events: int = 0
    tied_events: int = 0  # at the same time as the user's event before

    def add(self, histories: pa.Table) -> None:
        """Count one table of histories."""
        offsets_U1 = _flat(histories["items"]).offsets.to_numpy().astype(np.int64)
        items_L = _flat(histories["items"]).values.to_numpy()
        n_train_U = histories["n_train"].to_numpy()
        position_L = np.arange(len(items_L)) - np.repeat(offsets_U1[:-1], np.diff(offsets_U1))
        trained_L = position_L < np.repeat(n_train_U, np.diff(offsets_U1))
        np.add.at(self.by_row, items_L[trained_L], 1)
        times_L = _flat(histories["timestamps"]).values
        tied_L = pc.equal(times_L[1:], times_L[:-1]).to_numpy(zero_copy_only=False)
        self.tied_events += int(np.count_nonzero(tied_L & (position_L[1:] > 0)))
        self.events += len(items_L)
        self.train_events += int(n_train_U.sum())
        self.validation_events += int(histories["n_validation"].to_numpy().sum())


def _flat(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def _schema(histories: pa.Table) -> pa.Schema:
    kinds = {
        field.name: field.type.value_type if pa.types.is_list(field.type) else field.type
        for field in histories.schema
    }
    features = {name: kind for name, kind in kinds.items() if name not in OWN_COLUMNS}
    return history_schema(kinds["user_id"], kinds["items"], kinds["timestamps"], features)


def history_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Without statistics: those of a list's values serve no reader."""
    options = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    return pq.ParquetWriter(path, schema, compression=COMPRESSION, **options)


def write_histories(
    folder: Path, stream: Iterable[tuple[int, pa.Table]], counts: HistoryCounts
) -> Iterator[int]:
    """Write `histories/part-NNNNN.parquet`, a file a shard and a row group a table, and count.

    Yields the number of events after each row group, for a progress bar.
    """
    (folder / HISTORIES).mkdir()
    writer, open_shard = None, -1
    try:
        for shard, table in stream:
            if writer is None or shard != open_shard:
                if writer is not None:
                    writer.close()
                path = folder / HISTORIES / f"part-{shard:05d}.parquet"
                writer = history_writer(path, schema := _schema(table))
                open_shard = shard
            _require_values(table)
            counts.add(table)
            writer.write_table(table.cast(schema), row_group_size=table.num_rows)
            yield counts.events
    finally:
        if writer is not None:
            writer.close()


def _require_values(table: pa.Table) -> None:
    """Rows without a value were left out by now, unless a file's own statistics deny them.

    Raises InputError.
    """
    for name in ("items", "timestamps"):
        if any(chunk.flatten().null_count for chunk in table[name].chunks):
            raise InputError(
                f"the log's {name} hold a null where a file's statistics say that there is none: "
                "that file is damaged; write it again"
            )


def sealed(folder: Path, path: Path) -> DataFile:
    """A finished Parquet file as the manifest names it, on the disk for good."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    rows, size = pq.read_metadata(path).num_rows, path.stat().st_size
    return DataFile(path.relative_to(folder).as_posix(), rows, size, sha256_of(path))
