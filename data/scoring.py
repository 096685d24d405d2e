"""Histories to scores: the units of work, their batches, and one unit's table.

Legend: U users of a unit, T packed tokens, B users of a batch, K = k.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.cutting import cut_packs
from data.item_filter import ItemFilter
from data.reader import Histories, HistoryDataset, concatenated_ranges
from data.schema import score_schema
from data.score_output import COUNTS
from data.vocabulary import Vocabulary

LEAST_USERS, MOST_USERS, EVEN_UNITS = 512, 8192, 64  # of a unit; units wanted of a small data set
UPTO = ("all", "train", "validation")
Answer = tuple[Tensor, Tensor]  # table rows [B, K] int64 and scores [B, K] fp32, on the CPU
_NO_SCORES = np.zeros(0, np.float32)


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


@dataclass(frozen=True)
class UnitUsers:
    """The users of a unit who have a history. facts: what the unit's file says of them."""

    unit: Unit
    user_ids: pa.Array
    facts: dict[str, int]


@dataclass(frozen=True)
class Batch:
    """Histories of some users of a unit, as the model sees them.

    items_T: int32 or int64, as stored; offsets_B1: int64. excluded: pairs (item, user of the
    batch). last: the unit's last batch, which for a unit without a user has no user either.
    """

    users: UnitUsers
    items_T: Tensor
    offsets_B1: Tensor
    excluded: tuple[Tensor, Tensor] | None
    last: bool

    def __len__(self) -> int:
        """Users."""
        return len(self.offsets_B1) - 1


@dataclass(frozen=True)
class UnitScores:
    """A unit's answers, batch by batch: table rows [B, K] and scores fp32 [B, K]."""

    users: UnitUsers
    answers: list[Answer]

    def table(self, vocabulary: Vocabulary, k: int) -> pa.Table:
        """The unit in `data.schema.score_schema`; its counts stand in the schema's metadata
        (`data.score_output.unit_counts`)."""
        counts, rows, scores = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [_NO_SCORES]
        for rows_BK, scores_BK in self.answers:
            real_BK = rows_BK >= 0  # fewer than k items may remain
            counts.append(real_BK.sum(1).numpy())
            if not real_BK.all():
                rows_BK, scores_BK = rows_BK[real_BK], scores_BK[real_BK]
            rows.append(rows_BK.flatten().numpy())
            scores.append(scores_BK.flatten().numpy())
        counts_U = np.concatenate(counts)
        table = score_table(
            vocabulary, self.users.user_ids, counts_U, np.concatenate(rows), np.concatenate(scores)
        )
        facts = self.users.facts | {"users_short": int((counts_U < k).sum())}
        return table.replace_schema_metadata({COUNTS: json.dumps(facts)})


def batches(
    dataset: HistoryDataset, units: Iterable[Unit], upto: str, items: ItemFilter, batch_tokens: int
) -> Iterator[Batch]:
    """The histories of all units, in their order; a row group is read when its first unit is due.

    A history of more than `batch_tokens` makes its unit's batches as large as it is.
    """
    group, histories = -1, None
    for unit in units:
        if histories is None or group != unit.group:
            histories, group = dataset.read(unit.group), unit.group
        yield from _unit_batches(histories, unit, upto, items, batch_tokens)


def _unit_batches(
    histories: Histories, unit: Unit, upto: str, items: ItemFilter, batch_tokens: int
) -> Iterator[Batch]:
    length_U = seen_lengths(histories, upto)[unit.start : unit.stop]
    with_history = np.flatnonzero(length_U)
    lengths = length_U[with_history]
    starts = histories.offsets_U1[unit.start : unit.stop][with_history]
    assert histories.user_ids is not None
    user_ids = histories.user_ids.take(pa.array(with_history + unit.start))
    facts = {
        "users_scored": len(lengths),
        "users_without_history": unit.users - len(lengths),
        "events": int(lengths.sum()),
    }
    users = UnitUsers(unit, user_ids, facts)
    left_out = None if items.by_user is None else items.by_user.pairs(user_ids)
    budget = max(batch_tokens, int(lengths.max(initial=0)))
    cuts = list(pairwise(cut_packs(lengths, budget, budget).tolist())) or [(0, 0)]
    for first, stop in cuts:
        yield Batch(
            users,
            torch.from_numpy(_events(histories.items_N, starts[first:stop], lengths[first:stop])),
            torch.from_numpy(np.append(0, np.cumsum(lengths[first:stop]))),
            None if left_out is None else _of_users(left_out, first, stop),
            stop == len(lengths),
        )


def _events(items_N: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The histories' events, a copy that may be written to."""
    if len(starts) and starts[-1] + lengths[-1] - starts[0] == lengths.sum():
        return items_N[starts[0] : starts[-1] + lengths[-1]].copy()  # whole histories in a row
    return items_N[concatenated_ranges(starts, lengths)]


def score_batches(
    work: Iterable[Batch], launch: Callable[[Batch], Callable[[], Answer]], in_flight: int
) -> Iterator[UnitScores]:
    """The answers of each unit, in the order of the batches.

    launch: starts a batch that has users; what it returns waits for the answer. in_flight: batches
    that are started before the first one's answer is waited for.
    """
    flying: deque[tuple[Batch, Callable[[], Answer] | None]] = deque()
    answers: list[Answer] = []

    def settle() -> Iterator[UnitScores]:
        batch, wait = flying.popleft()
        if wait is not None:
            answers.append(wait())
        if batch.last:
            yield UnitScores(batch.users, answers.copy())
            answers.clear()

    for batch in work:
        flying.append((batch, launch(batch) if len(batch) else None))
        if len(flying) > in_flight:
            yield from settle()
    while flying:
        yield from settle()


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
