"""The export's gate: what the bundle answers against what the trainer answered.

Legend: T packed tokens, B users, K items of the probe.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.bundle import all_numbers
from data.cutting import cut_packs
from data.errors import InputError
from data.reader import HistoryDataset, concatenated_ranges

QUALITY_USERS = 1000
QUALITY_TOKENS = 8192  # of a batch
CUTOFF = 10


@dataclass(frozen=True)
class Parity:
    """Agreement with a checkpoint's probe, over its users.

    overlap: mean share of the trainer's top items that are among the bundle's. top1: share of
    users with the same best item. score_error: the largest difference of the scores of common
    items, as a share of the user's largest score.
    """

    users: int
    items: int
    overlap: float
    top1: float
    score_error: float

    def __str__(self) -> str:
        return (
            f"{self.users} users: top-{self.items} overlap {self.overlap:.4f}, same best item "
            f"{self.top1:.4f}, largest score error {self.score_error:.2e}"
        )


@torch.no_grad()
def compare(model: Any, probe: dict[str, Tensor]) -> Parity:
    """Run the scorer on the probe's histories (see `trainer.loop.probe`) and compare.

    Raises InputError where the trainer or the scorer answered NaN or infinity.
    """
    users, k = probe["items"].shape
    if users == 0:
        return Parity(0, k, 0.0, 0.0, float("inf"))
    if not all_numbers(probe["scores"]):
        raise InputError(
            "the checkpoint's model answers NaN or infinite scores; export an earlier checkpoint"
        )
    # The trainer's answers are products with the rows, without repeat scores.
    h_BD, nothing = model.hidden(probe["history"], probe["offsets"]), probe["items"].flatten()[:0]
    rows_BK, scores_BK = model.top(h_BD, k, nothing, nothing)
    if not all_numbers(scores_BK):
        raise InputError(
            "the exported model answers NaN or infinite scores where the trainer's are finite; "
            "use rows=fp32 or export an earlier checkpoint"
        )
    real_BK = torch.isfinite(probe["scores"])  # fewer than k items exist in a tiny catalogue
    same_BKK = (probe["items"].unsqueeze(2) == rows_BK.unsqueeze(1)) & real_BK.unsqueeze(2)
    overlap_B = same_BKK.any(2).sum(1) / real_BK.sum(1)
    top1_B = probe["items"][:, 0] == rows_BK[:, 0]
    largest_B11 = probe["scores"].where(real_BK, 0.0).abs().amax(1).clamp(min=1e-12).view(-1, 1, 1)
    error_BKK = (probe["scores"].unsqueeze(2) - scores_BK.unsqueeze(1)).abs() / largest_B11
    return Parity(
        users,
        k,
        float(overlap_B.mean()),
        float(top1_B.float().mean()),
        float(error_BKK.where(same_BKK, 0.0).max()),
    )


@torch.no_grad()
def held_out_ndcg(model: Any, dataset: HistoryDataset, limit: int = QUALITY_USERS) -> float:
    """Unfiltered NDCG@10 of the first test target of the data set's first `limit` users."""
    gains, users = 0.0, 0
    for group in range(len(dataset.groups)):
        histories = dataset.read(group, user_ids=False)
        length_U = histories.n_train_U.astype(np.int64) + histories.n_validation_U
        chosen = np.flatnonzero((length_U > 0) & (length_U < np.diff(histories.offsets_U1)))
        chosen = chosen[: limit - users]
        lengths, starts = length_U[chosen], histories.offsets_U1[chosen]
        targets = histories.items_N[starts + lengths].astype(np.int64)
        budget = max(QUALITY_TOKENS, int(lengths.max(initial=1)))
        cut = cut_packs(lengths, budget, budget)
        for first, stop in pairwise(cut.tolist()):
            part = slice(first, stop)
            items = histories.items_N[concatenated_ranges(starts[part], lengths[part])]
            offsets = torch.from_numpy(np.append(0, np.cumsum(lengths[part])))
            rows, _ = model(torch.from_numpy(items.astype(np.int64)), offsets, CUTOFF, False)
            hit = rows == torch.from_numpy(targets[part]).unsqueeze(1)
            gains += float((hit / torch.log2(torch.arange(CUTOFF) + 2.0)).sum())
        users += len(chosen)
        if users >= limit:
            break
    return gains / max(users, 1)
