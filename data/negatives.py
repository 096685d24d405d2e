"""Candidate ids, the items that a read position's target is ranked against, and their logQ terms.

Legend: V table rows, W ranks, K draws, S read positions, C candidates.

`full_slice` gives every row, each rank its own part. `SampledCandidates` draws K ids with
replacement from q and corrects each by the log of its expected count (Bengio & Senécal 2008; with
in-batch targets the mixture of Yi et al., RecSys 2019).
"""

from typing import Literal, Protocol

import numpy as np

from data.errors import InputError
from data.randomness import Purpose, generator
from data.schema import PADDING_ROW, RESERVED_ROWS


class Candidates(Protocol):
    """What a training batch is scored against, for the pack at a position of the order."""

    def for_pack(
        self, position: int, targets_S: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """candidates_C int64 and log_counts_C float32 (None: each item is a candidate once)."""


def full_slice(table_rows: int, rank: int, world_size: int) -> np.ndarray:
    """Rank's ⌈V/W⌉ rows of the table as int64 ids, PADDING_ROW behind the table's end.

    The same slices as row-wise sharding. Reserved rows are included; the loss masks them.
    """
    rows = -(-table_rows // world_size)
    ids = np.arange(rank * rows, (rank + 1) * rows, dtype=np.int64)
    ids[ids >= table_rows] = PADDING_ROW
    return ids


class FullCandidates:
    """All items: every pack gets this rank's `full_slice`."""

    def __init__(self, table_rows: int, rank: int, world_size: int) -> None:
        self._ids_C = full_slice(table_rows, rank, world_size)

    def for_pack(self, position: int, targets_S: np.ndarray) -> tuple[np.ndarray, None]:
        return self._ids_C, None


class SampledCandidates:
    """K draws shared over the batch, then the batch's targets: C = K + S, as the loss expects.

    kind: `uniform` over the items, or `popularity`, in proportion to the training events in
        `counts` (one integer a table row, reserved rows 0); items never seen are never drawn.
    count: K; 0 with `in_batch` alone, which then are the only negatives.
    in_batch: the other positions' targets are negatives too. The log count is then of the mixture,
        K·q(c) + n·p(c) with n the pack's targets and p the item's share of training events.
        Without it the draws carry log(K·q(c)), and the target part, only looked up, carries 0.

    Draws are keyed by (seed, position) and stand in ascending order, which the search and the
    table lookup like and no loss sees.
    """

    def __init__(
        self,
        kind: Literal["uniform", "popularity"],
        count: int,
        counts: np.ndarray,
        in_batch: bool,
        seed: int,
    ) -> None:
        if kind not in ("uniform", "popularity"):
            raise InputError(f"negatives of kind {kind} are unknown: use uniform or popularity")
        if count < (0 if in_batch else 1):
            raise InputError(f"the number of negatives, {count}, must be at least 1")
        if len(counts) <= RESERVED_ROWS or counts[:RESERVED_ROWS].any():
            raise ValueError("counts must hold one integer a table row, 0 for the reserved rows")
        self.kind, self.count, self.in_batch, self.seed = kind, count, in_batch, seed
        self._counts_V = counts
        self._events = int(counts.sum())
        if self._events == 0 and (kind == "popularity" or in_batch):
            raise InputError("the vocabulary counts no training event; convert the log again")
        if kind == "popularity":
            self._cumulative_V = np.cumsum(counts, dtype=np.int64)

    def for_pack(self, position: int, targets_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates_C = np.concatenate([self._draw(position), targets_S])
        log_counts_C = np.zeros(len(candidates_C), dtype=np.float32)
        if self.in_batch:
            used_C = candidates_C != PADDING_ROW
            targets = np.count_nonzero(used_C) - self.count
            ids = candidates_C[used_C]
            expected = self._expected(ids) + targets * self._share(ids)
            if not expected.all():
                item = int(ids[expected == 0][0])
                raise InputError(
                    f"item {item} is a training target and counts 0 events in the vocabulary; "
                    "convert the log again"
                )
            log_counts_C[used_C] = np.log(expected)
        else:
            log_counts_C[: self.count] = np.log(self._expected(candidates_C[: self.count]))
        return candidates_C, log_counts_C

    def _draw(self, position: int) -> np.ndarray:
        """K item rows, int64, ascending."""
        random = generator(self.seed, Purpose.NEGATIVES, position)
        if self.kind == "uniform":
            return np.sort(random.integers(RESERVED_ROWS, len(self._counts_V), self.count))
        events = np.sort(random.integers(0, self._events, self.count))
        return self._cumulative_V.searchsorted(events, side="right")

    def _expected(self, ids: np.ndarray) -> np.ndarray:
        """K·q(id), the expected count of each id among the draws."""
        if self.kind == "uniform":
            return np.full(len(ids), self.count / (len(self._counts_V) - RESERVED_ROWS))
        return self.count * self._share(ids)

    def _share(self, ids: np.ndarray) -> np.ndarray:
        """Each id's share of the training events."""
        return self._counts_V[ids] / self._events
