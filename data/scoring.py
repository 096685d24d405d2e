"""Histories to scores: the units of work, and one unit's table.

Legend: U users of a unit, T packed tokens, B users of a batch, K = k.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.bundle import Bundle
from data.cutting import cut_packs
from data.item_filter import ItemFilter
from data.reader import Histories, HistoryDataset, concatenated_ranges
from data.schema import score_schema
from data.score_output import COUNTS
from data.vocabulary import Vocabulary

LEAST_USERS, MOST_USERS, EVEN_UNITS = 512, 8192, 64  # of a unit; units wanted of a small data set
UPTO = ("all", "train", "validation")


@dataclass(frozen=True)
class Unit:
    """Users start to stop of row group `group`, and the file that holds their scores."""

    group: int
    start: int
    stop: int
    name: str

    @property
    def users(self) -> int:
        return self.stop - self.start


def units_of(dataset: HistoryDataset, part_users: int | None) -> list[Unit]:
    """All units of a data set, from its metadata alone: the same for any number of processes.

    part_users: users of a unit at most; None for enough units to divide among many processes.
    """
    if part_users is None:
        part_users = min(max(-(-len(dataset) // EVEN_UNITS), LEAST_USERS), MOST_USERS)
    units = []
    for group, users in enumerate(np.diff(dataset.group_starts_G1).tolist()):
        for number, start in enumerate(range(0, users, part_users)):
            name = f"part-{group:05d}-{number:05d}.parquet"
            units.append(Unit(group, start, min(start + part_users, users), name))
    return units


def seen_lengths(histories: Histories, upto: str) -> np.ndarray:
    """int64 events of each user that the model sees."""
    match upto:
        case "all":
            return np.diff(histories.offsets_U1)
        case "train":
            return histories.n_train_U.astype(np.int64)
        case "validation":
            return histories.n_train_U.astype(np.int64) + histories.n_validation_U
    raise ValueError(f"upto is one of {', '.join(UPTO)}, not {upto}")


def score_unit(
    bundle: Bundle,
    histories: Histories,
    unit: Unit,
    upto: str,
    k: int,
    exclude_seen: bool,
    items: ItemFilter,
    batch_tokens: int,
    done: Callable[[int], object],
) -> pa.Table:
    """The unit's scores in `data.schema.score_schema`; users without a history are left out.

    histories: those of the unit's row group. items: which may be recommended. done: called with
    the number of users of each batch. The counts of the unit stand in the schema's metadata
    (`data.score_output.unit_counts`).
    """
    length_U = seen_lengths(histories, upto)[unit.start : unit.stop]
    start_U = histories.offsets_U1[unit.start : unit.stop]
    with_history = np.flatnonzero(length_U)
    done(unit.users - len(with_history))
    lengths, starts = length_U[with_history], start_U[with_history]
    budget = max(batch_tokens, int(lengths.max(initial=0)))
    assert histories.user_ids is not None
    user_ids = histories.user_ids.take(pa.array(with_history + unit.start))
    left_out = None if items.by_user is None else items.by_user.pairs(user_ids)
    rows_parts, scores_parts, counts_parts = [], [], []
    for first, stop in pairwise(cut_packs(lengths, budget, budget).tolist()):
        tokens = concatenated_ranges(starts[first:stop], lengths[first:stop])
        items_T = torch.from_numpy(histories.items_N[tokens].astype(np.int64))
        offsets_B1 = torch.from_numpy(np.append(0, np.cumsum(lengths[first:stop])))
        rows_BK, scores_BK = bundle.score(
            items_T,
            offsets_B1,
            k,
            exclude_seen,
            None if left_out is None else _of_users(left_out, first, stop),
            items.allowed_V,
        )
        real_BK = rows_BK >= 0  # fewer than k items may remain
        rows_parts.append(rows_BK[real_BK].numpy())
        scores_parts.append(scores_BK[real_BK].numpy())
        counts_parts.append(real_BK.sum(1).numpy())
        done(stop - first)
    counts = np.concatenate([np.zeros(0, np.int64), *counts_parts])
    rows = np.concatenate([np.zeros(0, np.int64), *rows_parts])
    scores = np.concatenate([np.zeros(0, np.float32), *scores_parts])
    facts = {
        "users_scored": len(lengths),
        "users_without_history": unit.users - len(lengths),
        "users_short": int((counts < k).sum()),
        "events": int(lengths.sum()),
    }
    table = score_table(bundle.vocabulary, user_ids, counts, rows, scores)
    return table.replace_schema_metadata({COUNTS: json.dumps(facts)})


def score_table(
    vocabulary: Vocabulary,
    user_ids: pa.Array,
    counts_U: np.ndarray,
    rows_N: np.ndarray,
    scores_N: np.ndarray,
) -> pa.Table:
    """`data.schema.score_schema` for users of counts_U items each, best first, end to end."""
    bounds = pa.array(np.append(0, np.cumsum(counts_U)), pa.int32())
    lists = [pa.ListArray.from_arrays(bounds, vocabulary.raw(rows_N))]
    lists.append(pa.ListArray.from_arrays(bounds, pa.array(scores_N)))
    schema = score_schema(user_ids.type, vocabulary.item_ids.type)
    return pa.Table.from_arrays([user_ids, *lists], schema=schema)


def _of_users(pairs: tuple[Tensor, Tensor], first: int, stop: int) -> tuple[Tensor, Tensor]:
    """The pairs (item, user) of users first to stop, who are counted from 0."""
    items_N, users_N = pairs
    low, high = torch.searchsorted(users_N, torch.tensor([first, stop])).tolist()
    return items_N[low:high], users_N[low:high] - first
