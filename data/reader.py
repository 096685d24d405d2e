"""Row groups of a converted data set's history Parquet as numpy arrays.

Legend: G row groups, U users, N events. Everything that planning needs (how long each history is)
is read once and kept, 12 bytes a user; the events themselves are read a row group at a time.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.cores import on_all_cores
from data.errors import InputError, reason
from data.schema import RESERVED_ROWS, Manifest, damage


class RowGroup(NamedTuple):
    """Row group `number` of the data set's file number `file`."""

    file: int
    number: int


@dataclass(frozen=True)
class Histories:
    """The histories of some users, flat: user u's are items_N[offsets_U1[u]:offsets_U1[u + 1]].

    items_N: int32 or int64 table rows, as stored. offsets_U1: int64. n_train_U, n_validation_U:
    int32. user_ids: raw ids, or None where they were not asked for.
    """

    items_N: np.ndarray
    offsets_U1: np.ndarray
    n_train_U: np.ndarray
    n_validation_U: np.ndarray
    user_ids: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.n_train_U)

    @classmethod
    def concatenate(cls, parts: Sequence["Histories"]) -> "Histories":
        """The users of all parts in order, without their raw ids."""
        if len(parts) == 1:
            return parts[0]
        lengths_U = np.concatenate([np.diff(part.offsets_U1) for part in parts])
        return cls(
            np.concatenate([part.items_N for part in parts]),
            _offsets(lengths_U),
            np.concatenate([part.n_train_U for part in parts]),
            np.concatenate([part.n_validation_U for part in parts]),
        )


def damaged_files(folder: Path, part: int = 0, parts: int = 1) -> dict[str, str]:
    """The history files of a data set that are not what the manifest says, and why: by their hash.

    Every byte of the files number `part`, `part` + `parts`, … is read, so that the processes of a
    host can share the work, each with its share of the cores.
    """
    files = Manifest.read(folder).histories[part::parts]
    found = on_all_cores(lambda one: damage(folder, one), files, processes=parts)
    return {one.path: what for one, what in zip(files, found, strict=True) if what}


class HistoryDataset:
    """A finished data set, opened: its row groups in manifest order and its users' lengths.

    groups: the G row groups; group `g` holds users group_starts_G1[g] to group_starts_G1[g+1], so
        a user is known by one number in the whole data set.
    n_train_U, n_validation_U: int32 for every user.

    without: files, as the manifest names them, to leave out: what `damaged_files` found. Every
        process must leave out the same ones, or their users would be other ones.
    Raises InputError, naming the file, when one is absent, of another size or row count than the
    manifest says, damaged, or not of `history_schema`.
    """

    def __init__(self, folder: Path, without: Collection[str] = ()) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.files = [one for one in self.manifest.histories if one.path not in without]
        self.table_rows = self.manifest.table_rows
        self.groups: list[RowGroup] = []
        users_G: list[int] = []
        n_train, n_validation = [_NO_USERS], [_NO_USERS]
        for number in range(len(self.files)):
            with self._open(number) as file:
                for index in range(file.num_row_groups):
                    self.groups.append(RowGroup(number, index))
                    users_G.append(file.metadata.row_group(index).num_rows)
                columns = file.read(columns=["n_train", "n_validation"], use_threads=False)
            n_train.append(_counts(columns, "n_train", self._path(number)))
            n_validation.append(_counts(columns, "n_validation", self._path(number)))
        self.group_starts_G1 = _offsets(np.array(users_G, dtype=np.int64))
        self.n_train_U = np.concatenate(n_train)
        self.n_validation_U = np.concatenate(n_validation)

    def __len__(self) -> int:
        """Users."""
        return len(self.n_train_U)

    @property
    def left_out(self) -> list[str]:
        """The history files that this data set was opened without."""
        return [one.path for one in self.manifest.histories if one not in self.files]

    @cached_property
    def n_events_U(self) -> np.ndarray:
        """int32 events of every user. Only evaluation needs it, and Parquet keeps no list lengths:
        the first use reads the items of the whole data set once, a row group at a time."""
        lengths = [
            np.diff(self.read(g, user_ids=False).offsets_U1) for g in range(len(self.groups))
        ]
        return np.concatenate([_NO_USERS, *lengths]).astype(np.int32)

    def read(self, group: int, user_ids: bool = True) -> Histories:
        """The histories of row group `group` (its place in `groups`).

        Raises InputError, naming the file, for damaged Parquet, nulls, an item outside
        [RESERVED_ROWS, table_rows) or more training and validation events than events: the
        embedding kernels accept an id out of range and read whatever lies there.
        """
        number, index = self.groups[group]
        wanted = ["items", "n_train", "n_validation"] + ["user_id"] * user_ids
        with self._open(number) as file:
            table = file.read_row_group(index, columns=wanted, use_threads=False)
        path = self._path(number)
        lists = table.column("items").combine_chunks()
        items_N = lists.flatten()
        if lists.null_count or items_N.null_count:
            raise InputError(f"{path} row group {index} has a null item; convert the log again")
        lengths_U = lists.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
        histories = Histories(
            items_N.to_numpy(),
            _offsets(lengths_U),
            _counts(table, "n_train", path),
            _counts(table, "n_validation", path),
            table.column("user_id").combine_chunks() if user_ids else None,
        )
        self._check(histories, path)
        return histories

    def read_many(self, groups: Sequence[int]) -> Histories:
        """The histories of several row groups as one, without the raw user ids."""
        return Histories.concatenate([self.read(group, user_ids=False) for group in groups])

    def users_of(self, groups: np.ndarray) -> np.ndarray:
        """The numbers of the users of these row groups, in the order of `read_many`: int64."""
        starts, stops = self.group_starts_G1[groups], self.group_starts_G1[groups + 1]
        return concatenated_ranges(starts, stops - starts)

    def _path(self, number: int) -> Path:
        return self.folder / self.files[number].path

    @contextmanager
    def _open(self, number: int) -> Iterator[pq.ParquetFile]:
        """A file of the data set, checked; what Arrow raises while it is open names the file."""
        path, expected = self._path(number), self.files[number]
        if not path.is_file():
            raise InputError(f"{path} is named in the manifest and absent; convert the log again")
        size = path.stat().st_size
        if size != expected.bytes:
            raise InputError(
                f"{path} has {size:,} bytes, the manifest says {expected.bytes:,}; "
                "copy the data set again or convert the log again"
            )
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                if file.metadata.num_rows != expected.rows:
                    raise InputError(
                        f"{path} has {file.metadata.num_rows:,} users, the manifest says "
                        f"{expected.rows:,}; convert the log again"
                    )
                _check_schema(file.schema_arrow, path)
                yield file
        except (pa.ArrowException, OSError, ValueError) as error:
            raise InputError(
                f"{path} is damaged ({reason(error)}); convert the log again"
            ) from error

    def _check(self, histories: Histories, path: Path) -> None:
        items_N = histories.items_N
        if len(items_N):
            low, high = int(items_N.min()), int(items_N.max())
            if low < RESERVED_ROWS or high >= self.table_rows:
                raise InputError(
                    f"{path} holds item {low if low < RESERVED_ROWS else high}, outside the item "
                    f"table's rows {RESERVED_ROWS} to {self.table_rows - 1}; convert the log again"
                )
        known_U = histories.n_train_U.astype(np.int64) + histories.n_validation_U
        excess_U = known_U > np.diff(histories.offsets_U1)
        if excess_U.any():
            row = int(excess_U.argmax())
            raise InputError(
                f"{path}: a user has n_train + n_validation = {known_U[row]} of "
                f"{np.diff(histories.offsets_U1)[row]} events; convert the log again"
            )


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 [start, start + 1, …, start + length − 1] for each pair, one behind the other."""
    stops = np.cumsum(lengths, dtype=np.int64)
    total = int(stops[-1]) if len(stops) else 0
    numbers = np.repeat(starts - stops + lengths, lengths)
    numbers += np.arange(total)
    return numbers


_NO_USERS = np.zeros(0, dtype=np.int32)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _counts(table: pa.Table, name: str, path: Path) -> np.ndarray:
    column = table.column(name)
    if column.null_count:
        raise InputError(f"{path} has a null {name}; convert the log again")
    counts = column.to_numpy().astype(np.int32, copy=False)
    if len(counts) and counts.min() < 0:
        raise InputError(f"{path} has {name} = {counts.min()} below 0; convert the log again")
    return counts


def _check_schema(schema: pa.Schema, path: Path) -> None:
    kinds = {field.name: field.type for field in schema}
    for name in ("user_id", "items", "n_train", "n_validation"):
        if name not in kinds:
            raise InputError(f"{path} has no column {name}; convert the log again")
    items = kinds["items"]
    is_list = pa.types.is_list(items) or pa.types.is_large_list(items)
    if not is_list or items.value_type not in (pa.int32(), pa.int64()):
        raise InputError(
            f"{path} has items of type {items}, expected list<int32> or list<int64>; "
            "convert the log again"
        )
    for name in ("n_train", "n_validation"):
        if kinds[name] != pa.int32():
            raise InputError(
                f"{path} has {name} of type {kinds[name]}, expected int32; convert again"
            )
