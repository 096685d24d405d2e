"""Schemas of what is written and read: logs, histories, vocabulary, scores, and the manifest.

A converted data set is a folder:

    manifest.json                what it is, how it was made, counts, sizes and hashes
    vocabulary.parquet           item_id (raw), item (table row), count (training events)
    histories/part-NNNNN.parquet one row a user, see `history_schema`
    residual/part-00000.parquet  events that a filter dropped, see `residual_schema`; for appending
    bad_rows.parquet             rows of the log that could not be used; for people alone

The manifest is written last, so a folder without one is unfinished and is never read.
"""

import hashlib
import json
import os
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from data.errors import InputError, reason

SCHEMA_VERSION = 1

# The first rows of the item table are ours and stay at the front, so that growth moves nothing.
PADDING_ROW = 0  # tokens behind the last history of a batch
MASK_ROW = 1  # a history item hidden in training
RESERVED_ROWS = 8  # the first item's row; rows below it are never candidates

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.parquet"
HISTORIES = "histories"
RESIDUAL = "residual"
BAD_ROWS = "bad_rows.parquet"
COMPRESSION = "zstd"  # of what conversion writes


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


def residual_schema(
    user_id: pa.DataType,
    item_id: pa.DataType,
    timestamp: pa.DataType,
    features: dict[str, pa.DataType],
) -> pa.Schema:
    """One row an event that k-core or de-duplication dropped, ordered by user, then time.

    Among the user's events of the same time, `kept_before` in the histories and `dropped_before`
    in the residual come first in the order of the log.
    """
    return pa.schema(
        [
            pa.field("user_id", user_id, nullable=False),
            pa.field("item_id", item_id, nullable=False),
            pa.field("timestamp", timestamp, nullable=False),
            pa.field("kept_before", pa.int32(), nullable=False),
            pa.field("dropped_before", pa.int32(), nullable=False),
            *(pa.field(name, kind) for name, kind in features.items()),
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

    @classmethod
    def of(cls, raw: Any) -> "DataFile":
        """From a manifest's JSON. Raises TypeError for anything else."""
        one = cls(**raw)
        if [type(value) for value in astuple(one)] != [str, int, int, str]:
            raise TypeError(f"{raw} describes no file")
        return one


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
    residual: DataFile | None = None  # where the filters dropped anything
    bad_rows: DataFile | None = None  # where there was any
    schema_version: int = SCHEMA_VERSION

    @property
    def files(self) -> list[DataFile]:
        """All files of the data set beside the manifest."""
        asides = [one for one in (self.residual, self.bad_rows) if one is not None]
        return [self.vocabulary, *self.histories, *asides]

    def _check_kinds(self) -> None:
        """Raises TypeError for a value of another JSON type than it has to be."""
        numbers = [self.table_rows, self.longest_history, *self.counts.values()]
        if not all(type(value) is int for value in numbers):
            raise TypeError("a count is no whole number")
        if not isinstance(self.options, dict) or not isinstance(self.features, list):
            raise TypeError("options or features are of another kind")

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
            version = raw.get("schema_version")
            if version is None:
                raise InputError(
                    f"{path} is of another kind than a data set's; name a folder that "
                    "tools.convert_logs wrote"
                )
            if version != SCHEMA_VERSION:
                raise InputError(
                    f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
                    "convert the log again with this version's tools.convert_logs"
                )
            raw["vocabulary"] = DataFile.of(raw["vocabulary"])
            raw["histories"] = [DataFile.of(one) for one in raw["histories"]]
            for name in ("residual", "bad_rows"):
                raw[name] = DataFile.of(raw[name]) if raw.get(name) else None
            manifest = cls(**raw)
            manifest._check_kinds()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is damaged ({reason(error)}); convert the log again"
            ) from error
        for one in manifest.files:
            if Path(one.path).is_absolute() or ".." in Path(one.path).parts:
                raise InputError(f"{path} names {one.path}, outside its own folder; convert again")
        return manifest


def is_data_set(folder: Path) -> bool:
    """Whether the folder has a data set's manifest, of whatever schema version."""
    try:
        raw = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and "schema_version" in raw


def damage(folder: Path, expected: DataFile) -> str | None:
    """What is wrong with a file of a data set, by its size and hash; None where all is right."""
    path = folder / expected.path
    try:
        size = path.stat().st_size
        if size != expected.bytes:
            return f"has {size:,} bytes, the manifest says {expected.bytes:,}"
        digest = sha256_of(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if digest == expected.sha256 else "is damaged, its hash is not the manifest's"


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
