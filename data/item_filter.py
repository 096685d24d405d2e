"""Which items scoring may recommend: an allow-list, a block-list, and a block-list a user.

Legend: V table rows, U users, N pairs of a user and an item.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.errors import InputError, reason
from data.vocabulary import UNKNOWN, Vocabulary


@dataclass(frozen=True)
class UserItems:
    """Items of some users, flat: user u's are rows_N[offsets_U1[u]:offsets_U1[u + 1]]."""

    user_ids: pa.Array
    offsets_U1: np.ndarray
    rows_N: np.ndarray

    def pairs(self, user_ids: pa.Array) -> tuple[Tensor, Tensor]:
        """(table rows, places in `user_ids`), int64 [N] each, ordered by place.

        Raises InputError for user ids of another kind than these.
        """
        try:
            place_U = pc.index_in(self.user_ids.cast(user_ids.type), value_set=user_ids)
        except pa.ArrowException as error:
            raise InputError(
                f"block_by_user has user ids of type {self.user_ids.type}, the histories "
                f"{user_ids.type}; cast them"
            ) from error
        known_M = pc.is_valid(place_U).to_numpy(zero_copy_only=False).nonzero()[0]
        places_M = place_U.drop_null().to_numpy(zero_copy_only=False).astype(np.int64)
        order_M = places_M.argsort(kind="stable")
        known_M, places_M = known_M[order_M], places_M[order_M]
        starts_M, stops_M = self.offsets_U1[known_M], self.offsets_U1[known_M + 1]
        parts = [self.rows_N[a:b] for a, b in zip(starts_M, stops_M, strict=True)]
        rows_N = np.concatenate([np.zeros(0, np.int64), *parts])
        return torch.from_numpy(rows_N), torch.from_numpy(places_M.repeat(stops_M - starts_M))


@dataclass(frozen=True)
class ItemFilter:
    """allowed_V: bool, the table rows that may be recommended, None for all. by_user: items left
    out for single users, held in memory; None for none."""

    allowed_V: Tensor | None = None
    by_user: UserItems | None = None


def read_filter(
    vocabulary: Vocabulary,
    allow: str | list[Any] | None,
    block: str | list[Any] | None,
    by_user: str | None,
    by_user_column: str,
) -> ItemFilter:
    """The filter of scoring's options. Items that the vocabulary lacks are passed over.

    allow, block: a Parquet file with the column item_id, or a list of raw ids. by_user: a Parquet
    file with user_id and the list column `by_user_column` of raw item ids, one row a user or more.
    Raises InputError for a file that cannot be read so, ids of another kind than the vocabulary's,
    and lists that leave nothing to recommend.
    """
    allowed_V = None
    if allow is not None or block is not None:
        allowed_V = torch.full([vocabulary.table_rows], allow is None)
        if allow is not None:
            allowed_V[_listed(vocabulary, "allow_items", allow)] = True
        if block is not None:
            allowed_V[_listed(vocabulary, "block_items", block)] = False
        if not allowed_V.any():
            raise InputError(
                f"allow_items={allow} and block_items={block} leave none of the bundle's "
                f"{vocabulary.size} items to recommend; check the ids"
            )
    users = None if by_user is None else _user_items(vocabulary, by_user, by_user_column)
    return ItemFilter(allowed_V, users)


def _listed(vocabulary: Vocabulary, name: str, source: str | list[Any]) -> Tensor:
    if isinstance(source, str):
        ids = _read(name, source, ["item_id"])["item_id"]
    elif pa.types.is_integer(vocabulary.item_ids.type):
        ids = _integers(name, source)
    else:
        ids = pa.array([str(one) for one in source], vocabulary.item_ids.type)
    rows = _rows(vocabulary, name, ids)
    return torch.from_numpy(rows[rows != UNKNOWN])


def _integers(name: str, source: list[Any]) -> pa.Array:
    try:
        return pa.array(source, pa.int64())
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputError(
            f"{name}={source} holds other ids than the bundle's items have; give whole numbers in "
            "[-2^63, 2^63)"
        ) from error


def _user_items(vocabulary: Vocabulary, path: str, column: str) -> UserItems:
    name = "block_by_user"
    table = _read(name, path, ["user_id", column]).combine_chunks()
    lists = table[column]
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise InputError(
            f"{name}={path}: column {column} is {lists.type}, not a list of item ids; make it one"
        )
    lengths_U = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    rows_N = _rows(vocabulary, name, pc.list_flatten(lists))
    user_N = np.arange(len(lengths_U)).repeat(lengths_U)[rows_N != UNKNOWN]
    counts_U = np.bincount(user_N, minlength=len(lengths_U))
    offsets_U1 = np.append(0, counts_U.cumsum()).astype(np.int64)
    return UserItems(table["user_id"].combine_chunks(), offsets_U1, rows_N[rows_N != UNKNOWN])


def _rows(vocabulary: Vocabulary, name: str, ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    try:
        return vocabulary.rows(ids)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _read(name: str, path: str, columns: list[str]) -> pa.Table:
    if not Path(path).is_file():
        raise InputError(f"{name}={path} does not exist; give a Parquet file or leave it out")
    try:
        names = pq.read_schema(path).names
        missing = [column for column in columns if column not in names]
        if missing:
            raise InputError(f"{name}={path} has no column {missing[0]}, only {', '.join(names)}")
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{name}={path} cannot be read ({reason(error)}); give a Parquet file"
        ) from error
