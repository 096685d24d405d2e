"""Items to table rows: those of an existing vocabulary keep theirs, new ones are appended."""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.engine import first_line, one_row, quoted_path, scalar
from data.errors import InputError
from data.events import Events
from data.k_core import ITEM_COUNTS
from data.schema import (
    COMPRESSION,
    RESERVED_ROWS,
    VOCABULARY,
    Manifest,
    damage,
    sha256_of,
    vocabulary_schema,
)
from data.spread import stride

KNOWN_ITEMS, NUMBERED_ITEMS = "known_items", "numbered_items"


@dataclass(frozen=True)
class KnownVocabulary:
    """A vocabulary.parquet whose items keep their rows."""

    path: Path
    sha256: str

    @classmethod
    def find(cls, place: Path) -> "KnownVocabulary":
        """`place` is a data set's folder or a vocabulary file of one, or of a bundle.

        Raises InputError when it is absent, or its folder is no data set of this version.
        """
        if place.is_file():
            return cls(place, sha256_of(place))
        expected = Manifest.read(place).vocabulary
        if reason := damage(place, expected):
            raise InputError(f"{place / VOCABULARY} {reason}; copy the data set again")
        return cls(place / expected.path, expected.sha256)

    def load(self, events: Events) -> int:
        """Create KNOWN_ITEMS(item_id, item), to be numbered with. Returns how many.

        Raises InputError for a file that is no vocabulary, or is of other item ids than `events`.
        """
        connection = events.connection
        source = f"read_parquet({quoted_path(str(self.path))})"
        try:
            connection.execute(
                f"CREATE TABLE {KNOWN_ITEMS} AS SELECT item_id, item::BIGINT AS item FROM {source}"
            )
        except (duckdb.OutOfMemoryException, duckdb.InterruptException):
            raise
        except duckdb.Error as error:
            raise InputError(
                f"{self.path} is no readable vocabulary ({first_line(error)}); name a data set or "
                "its vocabulary.parquet"
            ) from error
        (known,) = connection.sql(f"SELECT item_id FROM {KNOWN_ITEMS}").types
        met = events.kind("item_id")
        if str(known) != met:
            raise InputError(f"item ids are {met} in the log but {known} in {self.path}; cast them")
        items, distinct, in_order = one_row(
            connection,
            f"SELECT count(*), count(DISTINCT item_id), bool_and(item = rowid + {RESERVED_ROWS}) "
            f"FROM {KNOWN_ITEMS}",
        )
        if items and not in_order:
            raise InputError(f"{self.path} does not count rows from {RESERVED_ROWS}; name another")
        if distinct != items:
            raise InputError(f"{self.path} has a null or repeated item_id; name another vocabulary")
        return int(items)


def unseen_items(connection: duckdb.DuckDBPyConnection) -> int:
    """How many of KNOWN_ITEMS have no event; ITEM_COUNTS are those before any k-core."""
    query = f"SELECT count(*) FROM {KNOWN_ITEMS} ANTI JOIN {ITEM_COUNTS} USING (item_id)"
    return int(scalar(connection, query))


def number_items(connection: duckdb.DuckDBPyConnection, known: int) -> int:
    """Create NUMBERED_ITEMS(item_id, item), and `vocabulary` of those that ITEM_COUNTS keeps.

    The `known` items of KNOWN_ITEMS keep their rows, kept or not. The others follow, numbered from
    the one of most training events (all events under leave-one-out; equally frequent ones by raw
    id) by `data.spread`: a shard is a run of rows, and so each serves its share of the lookups.
    Returns how many items there are.
    """
    new = f"ANTI JOIN {KNOWN_ITEMS} USING (item_id)" if known else ""
    connection.execute(
        f"CREATE TABLE new_items AS SELECT item_id FROM {ITEM_COUNTS} {new} "
        "ORDER BY trained DESC, item_id"
    )
    appended = int(scalar(connection, "SELECT count(*) FROM new_items"))
    items = known + appended
    kind, wide = ("INTEGER", "BIGINT") if items + RESERVED_ROWS < 2**31 else ("BIGINT", "HUGEINT")
    place = f"rowid::{wide} * {stride(appended)} % {max(appended, 1)}"
    rows = f"SELECT item_id, ({place} + {RESERVED_ROWS + known})::{kind} AS item FROM new_items"
    if known:
        rows = f"SELECT item_id, item::{kind} AS item FROM {KNOWN_ITEMS} UNION ALL {rows}"
    connection.execute(f"CREATE VIEW {NUMBERED_ITEMS} AS {rows}")
    kept = f"SEMI JOIN {ITEM_COUNTS} USING (item_id)" if known else ""
    connection.execute(f"CREATE VIEW vocabulary AS FROM {NUMBERED_ITEMS} {kept}")
    return items


def write_vocabulary(
    folder: Path, connection: duckdb.DuckDBPyConnection, count_by_row: np.ndarray
) -> None:
    """Write `vocabulary.parquet` from NUMBERED_ITEMS and the counts over table rows."""
    query = f"SELECT item_id, item::BIGINT AS item FROM {NUMBERED_ITEMS} ORDER BY item"
    reader = connection.sql(query).to_arrow_reader(1 << 20)
    schema = vocabulary_schema(reader.schema.field("item_id").type)
    options = {"compression": COMPRESSION, "write_page_checksum": True}
    with pq.ParquetWriter(folder / VOCABULARY, schema, **options) as writer:
        for batch in reader:
            counts = pa.array(count_by_row[batch["item"].to_numpy()])
            writer.write_table(pa.table([batch["item_id"], batch["item"], counts], schema=schema))
