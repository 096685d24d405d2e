"""Schemas of what is written and read: logs, histories, vocabulary, scores, and the manifest.

A converted data set is a folder:

    manifest.json                what it is, how it was made, counts, sizes and hashes
    vocabulary.parquet           item_id (raw), item (table row), count (training events)
    histories/part-NNNNN.parquet one row a user, see `history_schema`

The manifest is written last, so a folder without one is unfinished and is never read.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.errors import InputError

SCHEMA_VERSION = 1

# The first rows of the item table are ours and stay at the front, so that growth moves nothing.
PADDING_ROW = 0  # tokens behind the last history of a batch
MASK_ROW = 1  # a history item hidden in training
RESERVED_ROWS = 8  # the first item's row; rows below it are never candidates

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.parquet"
HISTORIES = "histories"


def history_schema(
    user_id: pa.DataType,
    item: pa.DataType,
    timestamp: pa.DataType,
    features: dict[str, pa.DataType],
) -> pa.Schema:
    """One row a user, every list in time order and of one length L.

    The first `n_train` events are for training, the next `n_validation` for validation, the rest
    for test. `item` (int32 or int64) counts table rows, RESERVED_ROWS and above. `features` are
    further event columns carried along, each a list of L values.
    """
    return pa.schema(
        [
            pa.field("user_id", user_id, nullable=False),
            pa.field("items", pa.list_(item), nullable=False),
            pa.field("timestamps", pa.list_(timestamp), nullable=False),
            pa.field("n_train", pa.int32(), nullable=False),
            pa.field("n_validation", pa.int32(), nullable=False),
            *(pa.field(name, pa.list_(kind)) for name, kind in features.items()),
        ]
    )


def vocabulary_schema(item_id: pa.DataType) -> pa.Schema:
    """One row an item, ordered by `item`, which counts RESERVED_ROWS, RESERVED_ROWS + 1, …"""
    return pa.schema(
        [
            pa.field("item_id", item_id, nullable=False),
            pa.field("item", pa.int64(), nullable=False),
            pa.field("count", pa.int64(), nullable=False),
        ]
    )


def score_schema(user_id: pa.DataType, item_id: pa.DataType) -> pa.Schema:
    """One row a user: raw item ids and scores, best first."""
    return pa.schema(
        [
            pa.field("user_id", user_id, nullable=False),
            pa.field("item_ids", pa.list_(item_id), nullable=False),
            pa.field("scores", pa.list_(pa.float32()), nullable=False),
        ]
    )


@dataclass(frozen=True)
class DataFile:
    """One file of a data set; `path` is relative to the data set's folder, with `/`."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a converted data set is. Holds nothing that differs between two equal conversions."""

    options: dict[str, Any]  # the converter's options that shaped the data, as given
    counts: dict[str, int]  # users, items, events, train_events, validation_events, test_events, …
    split: str  # leave_one_out | temporal
    table_rows: int  # RESERVED_ROWS + items: the rows that the item table needs
    longest_history: int  # events
    vocabulary: DataFile
    histories: list[DataFile]
    features: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> None:
        """Commit the data set: written under a temporary name, synced, then renamed."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a data set's manifest.

        Raises InputError for a folder that is absent, unfinished, or of another schema version.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise InputError(f"data set {folder} does not exist; make one with tools.convert_logs")
        if not path.exists():
            raise InputError(
                f"{folder} has no {MANIFEST}: it is not a finished data set; "
                "convert again with tools.convert_logs"
            )
        try:
            raw = json.loads(path.read_bytes())
            version = raw["schema_version"]
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                    "convert the log again with this version's tools.convert_logs"
                )
            raw["vocabulary"] = DataFile(**raw["vocabulary"])
            raw["histories"] = [DataFile(**one) for one in raw["histories"]]
            manifest = cls(**raw)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}); convert the log again") from error
        for one in [manifest.vocabulary, *manifest.histories]:
            if Path(one.path).is_absolute() or ".." in Path(one.path).parts:
                raise InputError(f"{path} names {one.path}, outside its own folder; convert again")
        return manifest


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
