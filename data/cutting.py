"""Lengths in order to packs of bounded size: for training, evaluation and scoring alike.

Legend: M samples. Without TorchRec, which scoring does not import.
"""

import numpy as np


def cut_packs(tokens_M: np.ndarray, batch_tokens: int, max_sequences: int) -> np.ndarray:
    """Next-fit in the given order: pack p holds samples boundaries[p] to boundaries[p + 1].

    tokens_M: tokens of each sample, each at least 1 and at most `batch_tokens`.
    Returns int64 boundaries, [0] where there are no samples.
    """
    if len(tokens_M) and (tokens_M.min() < 1 or tokens_M.max() > batch_tokens):
        raise ValueError(
            f"samples of {tokens_M.min()} to {tokens_M.max()} tokens do not fit packs of "
            f"1 to {batch_tokens}"
        )
    ends_M = np.cumsum(tokens_M, dtype=np.int64)
    boundaries, first, used = [0], 0, 0
    while first < len(ends_M):
        reach = ends_M[first : first + max_sequences]
        first += int(reach.searchsorted(used + batch_tokens, side="right"))
        used = int(ends_M[first - 1])
        boundaries.append(first)
    return np.array(boundaries, dtype=np.int64)
