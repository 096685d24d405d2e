"""What a data set is like: the figures that a run's report shows of its data.

Legend: U users, V table rows, K octaves. An octave is the values of one bit length: 0, 1, 2–3, 4–7,
8–15, … Bins that do not depend on the data can be compared between data sets and between runs.
"""

import hashlib
from typing import Any

import numpy as np

from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS
from data.vocabulary import Vocabulary

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
ITEM_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def describe(dataset: HistoryDataset, vocabulary: Vocabulary) -> dict[str, Any]:
    """Users, items, events, history lengths and the concentration of popularity, JSON-ready.

    popularity: [share of the items, share of the training events that the most popular such share
    has]. training_counts_sha256: `counts_digest`.
    """
    lengths_U = dataset.n_events_U
    counts_V = vocabulary.counts[RESERVED_ROWS:]
    return {
        "folder": dataset.folder.name,
        "split": dataset.manifest.split,
        "users": len(dataset),
        "items": vocabulary.size,
        "events": int(lengths_U.sum(dtype=np.int64)),
        "train_events": int(dataset.n_train_U.sum(dtype=np.int64)),
        "items_without_training": int((counts_V == 0).sum()),
        "history_length": {
            "mean": float(lengths_U.mean()),
            "quantiles": {str(q): int(np.quantile(lengths_U, q)) for q in QUANTILES},
            "users": [
                {**bounds(octave), "users": int(users)}
                for octave, users in enumerate(np.bincount(octaves(lengths_U)))
            ],
        },
        "popularity": _concentration(counts_V),
        "training_counts_sha256": counts_digest(counts_V),
    }


def octaves(values: np.ndarray) -> np.ndarray:
    """The octave of each whole number ≥ 0: its bit length."""
    return np.frexp(values.astype(np.float64))[1]


def bounds(octave: int) -> dict[str, int]:
    """The first and the last value of an octave."""
    return {"from": 2**octave // 2, "to": 2**octave - 1}


def counts_digest(counts: np.ndarray) -> str:
    """SHA-256 of the items' training counts in descending order, whatever the items are called.

    Training counts are what the held-out events leave over, so it differs between two splits, or
    two orders of events with equal times, of one data set.
    """
    return hashlib.sha256(np.sort(counts)[::-1].astype("<i8").tobytes()).hexdigest()


def _concentration(counts_V: np.ndarray) -> list[list[float]]:
    cumulative = np.cumsum(np.sort(counts_V)[::-1], dtype=np.int64)
    total = max(1, int(cumulative[-1]))
    items = [max(1, round(share * len(counts_V))) for share in ITEM_SHARES]
    return [[n / len(counts_V), int(cumulative[n - 1]) / total] for n in dict.fromkeys(items)]


def standard_error(values: np.ndarray) -> float | None:
    """Of the values' mean; None for fewer than two."""
    if len(values) < 2:
        return None
    return float(values.std(ddof=1)) / len(values) ** 0.5
