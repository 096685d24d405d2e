"""Raw item ids and rows of the item table, both ways, vectorised.

The items of a data set stand in a row behind the reserved rows, frequent and rare ones mixed, so
the row of an item is its place in the list plus RESERVED_ROWS.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.errors import InputError
from data.schema import RESERVED_ROWS, VOCABULARY, vocabulary_schema

UNKNOWN = -1  # the row of a raw id that the vocabulary lacks


class Vocabulary:
    """The items of a data set: `item_ids` are raw (int64 or string), in the order of their rows.

    Invariants: `counts` (int64, training events) has `table_rows` entries, 0 for reserved rows.
    """

    def __init__(self, item_ids: pa.Array, counts: np.ndarray) -> None:
        """`item_ids` of rows RESERVED_ROWS, RESERVED_ROWS + 1, … and `counts` over table rows."""
        self.item_ids = item_ids
        self.counts = counts

    @classmethod
    def read(cls, folder: Path) -> "Vocabulary":
        """Read `folder`/vocabulary.parquet of a converted data set or a bundle.

        Raises InputError when it is absent or damaged, or when its rows are not consecutive.
        """
        path = folder / VOCABULARY
        if not path.exists():
            raise InputError(f"{path} does not exist; make a data set with tools.convert_logs")
        try:
            table = pq.read_table(path, memory_map=True, page_checksum_verification=True)
            table = table.combine_chunks()
            item_ids = _whole(table["item_id"])
            table = table.cast(vocabulary_schema(item_ids.type))
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise InputError(f"{path} is damaged ({error}); convert the log again") from error
        rows = table["item"].to_numpy()
        if not np.array_equal(rows, np.arange(RESERVED_ROWS, RESERVED_ROWS + len(rows))):
            raise InputError(f"{path} does not count rows from {RESERVED_ROWS}; convert again")
        counts = np.zeros(RESERVED_ROWS + len(rows), np.int64)
        counts[RESERVED_ROWS:] = table["count"].to_numpy()
        return cls(item_ids, counts)

    @property
    def size(self) -> int:
        """How many items there are."""
        return len(self.item_ids)

    @property
    def table_rows(self) -> int:
        """How many rows the item table needs: the items and the reserved rows."""
        return RESERVED_ROWS + self.size

    def digest(self, items: int) -> str:
        """SHA-256 of the raw ids of the first `items` items: equal ids in equal rows."""
        ids = self.item_ids.slice(0, items)
        if not _is_text(ids.type):
            return hashlib.sha256(ids.cast(pa.int64()).to_numpy()).hexdigest()
        ids = ids.cast(pa.large_string())
        digest = hashlib.sha256(pc.binary_length(ids).to_numpy())
        offsets = np.frombuffer(ids.buffers()[1], np.int64)[ids.offset :]
        digest.update(memoryview(ids.buffers()[2])[offsets[0] : offsets[len(ids)]])
        return digest.hexdigest()

    def rows(self, raw_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """The table row of each raw id, int64; UNKNOWN (-1) for null and for what is not an item.

        Integers of any width look up integer ids, strings look up string ids. Raises InputError
        for the other kind. With string ids a call costs a pass over the vocabulary: look up many.
        """
        ids = _whole(raw_ids)
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        integers = pa.types.is_integer(self.item_ids.type)
        same_kind = pa.types.is_integer(ids.type) if integers else _is_text(ids.type)
        if not same_kind:
            raise InputError(
                f"item ids are {ids.type} here but {self.item_ids.type} in the data set; cast them"
            )
        if integers:
            return self._rows_of_integers(ids)
        ids = ids.cast(self.item_ids.type)
        place = pc.index_in(ids, value_set=self.item_ids, skip_nulls=True)
        found = pc.add(place.cast(pa.int64()), RESERVED_ROWS)
        return pc.fill_null(found, UNKNOWN).to_numpy(zero_copy_only=False)

    def _rows_of_integers(self, ids: pa.Array) -> np.ndarray:
        sorted_ids, order = self._sorted
        if not self.size:
            return np.full(len(ids), UNKNOWN, np.int64)
        known_L = pc.is_valid(ids).to_numpy(zero_copy_only=False)
        if ids.type == pa.uint64():  # beyond int64 no id can be an item
            fits = pc.less_equal(ids, pa.scalar(2**63 - 1, pa.uint64()))
            known_L &= pc.fill_null(fits, False).to_numpy(zero_copy_only=False)
        ids_L = pc.fill_null(ids, 0).to_numpy(zero_copy_only=False).astype(np.int64)
        place_L = np.minimum(np.searchsorted(sorted_ids, ids_L), self.size - 1)
        known_L &= sorted_ids[place_L] == ids_L
        return np.where(known_L, order[place_L] + RESERVED_ROWS, UNKNOWN)

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        ids = self.item_ids.to_numpy()
        order = np.argsort(ids, kind="stable")
        return ids[order], order

    def raw(self, rows: np.ndarray) -> pa.Array:
        """The raw id of each table row. Raises IndexError for a row that is no item's."""
        rows = np.asarray(rows, np.int64)
        if rows.size and (rows.min() < RESERVED_ROWS or rows.max() >= self.table_rows):
            raise IndexError(f"rows of items are {RESERVED_ROWS} to {self.table_rows - 1}")
        return self.item_ids.take(pa.array(rows - RESERVED_ROWS))


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
