"""Recommendations from Python, in raw ids: for a service, a notebook, a test.

    bundle = Bundle.open(Path("runs/demo/bundle"), torch.device("cpu"))
    recommend(bundle, [["181", "258"], ["50"]], k=10)
    state = new_state(bundle, ["181"]).advance("258")
    state.recommend(k=10)

A bundle is opened once and changed by nothing, and a state is a value: threads may share both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.bundle import Bundle
from data.errors import InputError, check_whole
from data.vocabulary import UNKNOWN

Recommended = list[tuple[Any, float]]  # raw item id and score, best first


def recommend(
    bundle: Bundle,
    histories: Sequence[Sequence[Any]],
    k: int = 10,
    exclude_seen: bool = True,
    allowed_V: Tensor | None = None,
) -> list[Recommended]:
    """The k best items for each history of raw item ids, oldest first.

    Items that the bundle does not know are passed over; a history of none other gets no items.
    allowed_V: bool, see `data.item_filter.ItemFilter`. Raises InputError for ids of another kind.
    """
    if not histories:
        return []
    check_whole("k", k, 1)
    parts = [_known_rows(bundle, history) for history in histories]
    offsets_B1 = torch.from_numpy(np.cumsum([0, *map(len, parts)]))
    items_T = torch.from_numpy(np.concatenate(parts))
    rows_BK, scores_BK = bundle.score(items_T, offsets_B1, k, exclude_seen, None, allowed_V)
    return [_raw(bundle, *one) for one in zip(rows_BK, scores_BK, strict=True)]


@dataclass(frozen=True)
class UserState:
    """One user behind some events: what the causal encoder carries, and the items seen.

    numbers_1F: see `Bundle.new_states`. seen: table rows of known items.
    """

    bundle: Bundle
    numbers_1F: Tensor
    seen: frozenset[int] = frozenset()

    def advance(self, item_id: Any) -> "UserState":
        """The state one event later, at a cost that does not depend on the events before.

        An item that the bundle does not know is passed over, as in scoring.
        """
        rows = _known_rows(self.bundle, [item_id])
        if not len(rows):
            return self
        numbers_1F = self.bundle.advance(self.numbers_1F, torch.from_numpy(rows))
        return replace(self, numbers_1F=numbers_1F, seen=self.seen | {int(rows[0])})

    def recommend(
        self, k: int = 10, exclude_seen: bool = True, allowed_V: Tensor | None = None
    ) -> Recommended:
        """As `recommend` for the whole history; nothing for a user without a known event."""
        check_whole("k", k, 1)
        if not self.seen:
            return []
        rows_N = torch.tensor(sorted(self.seen), dtype=torch.int64)
        pairs = (rows_N, torch.zeros_like(rows_N))
        excluded, seen = (pairs, None) if exclude_seen else (None, pairs)
        rows_1K, scores_1K = self.bundle.score_states(self.numbers_1F, k, excluded, allowed_V, seen)
        return _raw(self.bundle, rows_1K[0], scores_1K[0])


def new_state(bundle: Bundle, history: Sequence[Any] = ()) -> UserState:
    """The state behind a history of raw item ids. Raises InputError for a bidirectional model."""
    return reduce(UserState.advance, history, UserState(bundle, bundle.new_states(1)))


def _known_rows(bundle: Bundle, history: Sequence[Any]) -> np.ndarray:
    if isinstance(history, str | bytes) or not isinstance(history, Sequence | np.ndarray):
        raise InputError(
            f"{history!r} is no history; give a list of item ids for each user: [[ID, ID], [ID]]"
        )
    if not len(history):
        return np.zeros(0, np.int64)
    try:
        ids = pa.array(history)
    except (pa.ArrowException, TypeError) as error:
        raise InputError(f"the item ids {list(history)[:3]}… are of several kinds") from error
    except OverflowError as error:
        raise InputError(
            f"the item ids {list(history)[:3]}… are not all in [-2^63, 2^63); give ids of the "
            "bundle's items"
        ) from error
    rows = bundle.vocabulary.rows(ids)
    return rows[rows != UNKNOWN]


def _raw(bundle: Bundle, rows_K: Tensor, scores_K: Tensor) -> Recommended:
    real_K = rows_K >= 0  # fewer than k may remain
    ids = bundle.vocabulary.raw(rows_K[real_K].numpy()).to_pylist()
    return list(zip(ids, scores_K[real_K].tolist(), strict=True))
