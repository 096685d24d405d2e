"""From grouped events to a data set's files: k-core, vocabulary, history shards, manifest."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.engine import scalar
from data.errors import InputError
from data.log_query import OWN_COLUMNS
from data.schema import (
    HISTORIES,
    RESERVED_ROWS,
    VOCABULARY,
    DataFile,
    history_schema,
    vocabulary_schema,
)
from data.split import Split

CORE_USERS, CORE_ITEMS = "core_users", "core_items"
COMPRESSION = "zstd"


def k_core(
    connection: duckdb.DuckDBPyConnection, min_user_events: int, min_item_events: int, split: Split
) -> bool:
    """Keep users and items with enough training events of each other, to the fixpoint.

    Leaves the tables CORE_USERS and CORE_ITEMS of the ids kept and returns True, or returns False
    where nothing had to go. Under a temporal split only training events count, and users and
    items that have none (first seen later) stay. Raises InputError when nothing is left.
    """
    if min_user_events <= 1 and min_item_events <= 1:
        return False
    dropped = _shrink(connection, "user_id", min_user_events, split, "")
    dropped += _shrink(connection, "item_id", min_item_events, split, CORE_USERS)
    if dropped == 0:
        return False
    while dropped:
        dropped = _shrink(connection, "user_id", min_user_events, split, CORE_ITEMS)
        dropped = dropped and _shrink(connection, "item_id", min_item_events, split, CORE_USERS)
    if scalar(connection, f"SELECT count(*) FROM {CORE_ITEMS}") == 0:
        raise InputError(
            f"nothing is left: no user has {min_user_events} training events on items that have "
            f"{min_item_events} themselves; lower min_user_events or min_item_events"
        )
    if split.kind == "temporal":
        for key, core in (("user_id", CORE_USERS), ("item_id", CORE_ITEMS)):
            connection.execute(
                f"INSERT INTO {core} SELECT {key} FROM events GROUP BY {key} "
                f"HAVING NOT bool_or({split.in_training})"
            )
    return True


def _shrink(
    connection: duckdb.DuckDBPyConnection, key: str, minimum: int, split: Split, other: str
) -> int:
    """One half round: count `key` over events of the kept `other` ids. Returns how many went."""
    core = CORE_USERS if key == "user_id" else CORE_ITEMS
    other_key = "item_id" if key == "user_id" else "user_id"
    among = f"SEMI JOIN {other} USING ({other_key})" if other else ""
    connection.execute(
        f"CREATE OR REPLACE TABLE counted AS SELECT {key}, count(*) AS n FROM events {among} "
        f"WHERE {split.in_training} GROUP BY {key}"
    )
    tables = f"SELECT count(*) FROM duckdb_tables() WHERE table_name = '{core}'"
    earlier = core if scalar(connection, tables) else "counted"
    before = scalar(connection, f"SELECT count(*) FROM {earlier}")
    connection.execute(
        f"CREATE OR REPLACE TABLE {core} AS SELECT {key} FROM counted WHERE n >= {minimum}"
    )
    connection.execute("DROP TABLE counted")
    return int(before - scalar(connection, f"SELECT count(*) FROM {core}"))


def order_items(connection: duckdb.DuckDBPyConnection, split: Split, core: bool) -> int:
    """Create `vocabulary(item_id, item)`, most frequent item first. Returns how many items.

    Frequency counts all events under leave-one-out and training events under a temporal split,
    where items without one come last. Equally frequent items are ordered by raw id.
    """
    among = ""
    if core:
        among = f"SEMI JOIN {CORE_USERS} USING (user_id) SEMI JOIN {CORE_ITEMS} USING (item_id)"
    connection.execute(
        f"CREATE TABLE ranked_items AS SELECT item_id FROM events {among} GROUP BY item_id "
        f"ORDER BY count(*) FILTER ({split.in_training}) DESC, item_id"
    )
    items = int(scalar(connection, "SELECT count(*) FROM ranked_items"))
    kind = "INTEGER" if items + RESERVED_ROWS < 2**31 else "BIGINT"
    connection.execute(
        f"CREATE VIEW vocabulary AS SELECT item_id, (rowid + {RESERVED_ROWS})::{kind} AS item "
        "FROM ranked_items"
    )
    return items


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


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Without statistics: those of a list's values serve no reader."""
    options = {"use_dictionary": False, "write_statistics": False}
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
                writer = _writer(path, schema := _schema(table))
                open_shard = shard
            counts.add(table)
            writer.write_table(table.cast(schema), row_group_size=table.num_rows)
            yield counts.events
    finally:
        if writer is not None:
            writer.close()


def write_vocabulary(
    folder: Path, connection: duckdb.DuckDBPyConnection, count_by_row: np.ndarray
) -> None:
    """Write `vocabulary.parquet` from the view `vocabulary` and the counts over table rows."""
    query = "SELECT item_id, item::BIGINT AS item FROM vocabulary ORDER BY item"
    reader = connection.sql(query).to_arrow_reader(1 << 20)
    schema = vocabulary_schema(reader.schema.field("item_id").type)
    with pq.ParquetWriter(folder / VOCABULARY, schema, compression=COMPRESSION) as writer:
        for batch in reader:
            counts = pa.array(count_by_row[batch["item"].to_numpy()])
            writer.write_table(pa.table([batch["item_id"], batch["item"], counts], schema=schema))


def sealed(folder: Path, path: Path) -> DataFile:
    """A finished Parquet file as the manifest names it, on the disk for good."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        size = file.tell()
    rows = pq.read_metadata(path).num_rows
    return DataFile(path.relative_to(folder).as_posix(), rows, size, digest)
