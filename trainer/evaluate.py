"""Exact ranks over the sharded item table, and HR, NDCG and MRR from them.

Legend: N evaluated targets of all ranks, M targets scored at once, R rows of one block of
candidates, D width.

Candidate-parallel like the loss: each rank scores the hidden states of all ranks against its own
slice of the rows, block by block, and the counts are summed. No rank holds all rows, and no
candidate is sampled. Logits are fp32, and a target's score comes from the same product as its
rivals'. Ties are pessimistic: a rival with the target's score stands before it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import SequenceBatch
from data.errors import InputError
from data.evaluation import EvaluationBatch
from data.schema import PADDING_ROW, RESERVED_ROWS
from data.statistics import bounds, octaves, standard_error
from modules.recommender import Recommender
from trainer.world import World

CUTOFFS = (10, 20)
DIVERGED = (
    "training has diverged: the model holds NaN or infinite numbers; lower trainer.learning_rate "
    "or embedding.learning_rate, or set trainer.clip_norm, and start a new run_dir"
)
HIDDEN_BYTES = 1 << 30  # hidden states of all ranks held before a pass over the rows
SCORE_BYTES = 1 << 28  # scores held at once
BLOCK_BYTES = 1 << 28  # rows looked up at once

RepeatScore = Callable[[Tensor], Tensor]  # of hidden states [N, D], [N]
Blocks = Callable[[], Iterator[tuple[int, Tensor]]]  # (first table row, rows [R, D]) of the slice


@dataclass(frozen=True)
class Ranking:
    """1-based ranks of the N targets, in both protocols; equal on every rank.

    `filtered_N` leaves out the items of the target's own history other than the target,
    `unfiltered_N` ranks against every item.
    """

    filtered_N: np.ndarray
    unfiltered_N: np.ndarray
    targets_N: np.ndarray
    history_length_N: np.ndarray

    def metrics(self, chosen_N: np.ndarray | None = None) -> dict[str, dict[str, float]]:
        """HR, NDCG and MRR at each cutoff, over all targets or the chosen ones."""
        ranks = {"filtered": self.filtered_N, "unfiltered": self.unfiltered_N}
        if chosen_N is not None:
            ranks = {name: one[chosen_N] for name, one in ranks.items()}
        return {name: rank_metrics(one) for name, one in ranks.items()}

    def by_octave(self, values_N: np.ndarray) -> list[dict[str, Any]]:
        """The metrics within each octave (`data.statistics`) of a value ≥ 0 of the targets.

        Each record: from, to, targets, and for both protocols the metrics with the standard error
        of NDCG@10, `ndcg@10_error` (None for a single target).
        """
        octave_N = octaves(values_N)
        records = []
        for octave in np.unique(octave_N):
            chosen_N = octave_N == octave
            metrics: dict[str, Any] = {**self.metrics(chosen_N)}
            for name, ranks_N in (("filtered", self.filtered_N), ("unfiltered", self.unfiltered_N)):
                metrics[name]["ndcg@10_error"] = standard_error(gains(ranks_N[chosen_N], 10))
            records.append({**bounds(int(octave)), "targets": int(chosen_N.sum()), **metrics})
        return records


def gains(ranks_N: np.ndarray, k: int) -> np.ndarray:
    """NDCG@k of each target at a 1-based rank: with one relevant item the ideal DCG is 1, so it is
    1 / log2(1 + rank) inside the cutoff."""
    return np.where(ranks_N <= k, 1.0 / np.log2(1.0 + ranks_N), 0.0)


def rank_metrics(ranks_N: np.ndarray) -> dict[str, float]:
    """HR@k, NDCG@k and MRR@k of single targets at 1-based ranks."""
    out: dict[str, float] = {}
    count = max(1, len(ranks_N))
    for k in CUTOFFS:
        inside = ranks_N[ranks_N <= k].astype(np.float64)
        out[f"hr@{k}"] = len(inside) / count
        out[f"ndcg@{k}"] = float(gains(inside, k).sum()) / count
        out[f"mrr@{k}"] = float((1.0 / inside).sum()) / count
    return out


@torch.no_grad()
def evaluate(
    recommender: Recommender,
    batches: Iterable[EvaluationBatch],
    world: World,
    table_rows: int,
) -> Ranking:
    """Rank every target of `batches` with the model.

    Collective: `batches` has the same number of batches on every rank (`data.loader`).
    """
    recommender.eval()
    encoder = recommender.encoder

    def hidden(batch: SequenceBatch) -> Tensor:
        return recommender.hidden(batch.to(world.device))[0].float()

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first, ids in _slice_ids(world, table_rows, max(1, BLOCK_BYTES // (4 * encoder.width))):
            yield first, look_up(recommender, ids.to(world.device))

    try:
        repeat_score = encoder.repeat_score if encoder.repeats else None
        return _rank(batches, hidden, blocks, world, table_rows, repeat_score)
    finally:
        recommender.train()


@torch.no_grad()
def evaluate_popularity(
    counts_V: np.ndarray, batches: Iterable[EvaluationBatch], world: World
) -> Ranking:
    """Rank every target by how often each item occurs in training, with the same code."""
    counts = torch.as_tensor(counts_V, dtype=torch.float64, device=world.device)

    def hidden(batch: SequenceBatch) -> Tensor:
        return torch.ones(batch.targets_S.numel(), 1, dtype=torch.float64, device=world.device)

    def blocks() -> Iterator[tuple[int, Tensor]]:
        for first, ids in _slice_ids(world, len(counts_V), BLOCK_BYTES // 8):
            yield first, counts[ids.to(world.device)].unsqueeze(1)

    return _rank(batches, hidden, blocks, world, len(counts_V))


@torch.no_grad()
def top_items(
    recommender: Recommender, h_MD: Tensor, k: int, world: World, table_rows: int
) -> tuple[Tensor, Tensor]:
    """The k best items of the whole catalogue for rank 0's hidden states: (rows, scores) [M, k].

    By products with the rows alone, without repeat scores. Collective; every rank passes hidden
    states of one shape, and gets the answer for rank 0's.
    """
    h_MD = h_MD.float().contiguous()
    dist.broadcast(h_MD, src=0)
    width = h_MD.shape[1]
    best_score = h_MD.new_full((h_MD.shape[0], k), -torch.inf)
    best_row = torch.zeros_like(best_score, dtype=torch.int64)
    for first, ids in _slice_ids(world, table_rows, max(1, BLOCK_BYTES // (4 * width))):
        scores = _scores(h_MD, look_up(recommender, ids.to(world.device)), first, table_rows)
        rows = torch.arange(first, first + scores.shape[1], device=h_MD.device).expand_as(scores)
        best_score, best_row = _merge(
            torch.cat([best_score, scores], 1), torch.cat([best_row, rows], 1), k
        )
    gathered_score = torch.cat(_gather(best_score), 1)
    gathered_row = torch.cat(_gather(best_row), 1)
    best_score, best_row = _merge(gathered_score, gathered_row, k)
    return best_row, best_score


def look_up(recommender: Recommender, ids_R: Tensor) -> Tensor:
    """Rows of the sharded table, fp32 [R, D]. Collective: every rank asks for as many."""
    none = torch.zeros(1, dtype=torch.int64, device=ids_R.device)
    batch = SequenceBatch.build(none, ids_R, none, none).to(ids_R.device)
    return recommender.table(batch.features)[1].float()


def _merge(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, place = scores.topk(k, dim=1)
    return best, rows.gather(1, place)


def _slice_ids(world: World, table_rows: int, block: int) -> Iterator[tuple[int, Tensor]]:
    """This rank's slice of the rows in blocks: (first row, ids [R]), as many on every rank.

    Ids behind the table's end are PADDING_ROW.
    """
    share = -(-table_rows // world.size)
    for start in range(world.rank * share, (world.rank + 1) * share, block):
        ids = torch.arange(start, min(start + block, (world.rank + 1) * share))
        yield start, ids.where(ids < table_rows, PADDING_ROW)


def _rank(
    batches: Iterable[EvaluationBatch],
    hidden: Callable[[SequenceBatch], Tensor],
    blocks: Blocks,
    world: World,
    table_rows: int,
    repeat_score: RepeatScore | None = None,
) -> Ranking:
    """Hidden states of a run of batches from all ranks, then one pass over the rows; repeated.

    All ranks have as many batches, of one shape, so they agree on where each run ends.
    """
    parts: list[list[np.ndarray]] = []
    iterator = iter(batches)
    for first in iterator:
        h_SD = hidden(first.batch)
        bytes_a_batch = h_SD.numel() * h_SD.element_size() * world.size
        more = max(1, HIDDEN_BYTES // max(1, bytes_a_batch)) - 1
        run, states = [first], [h_SD]
        for one in islice(iterator, more):
            run.append(one)
            states.append(hidden(one.batch))
        parts.append(_rank_run(run, states, blocks, world, table_rows, repeat_score))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Ranking(*columns)


def _rank_run(
    run: list[EvaluationBatch],
    states: list[Tensor],
    blocks: Blocks,
    world: World,
    table_rows: int,
    repeat_score: RepeatScore | None,
) -> list[np.ndarray]:
    h, targets, lengths, seen, owner = [], [], [], [], []
    count = 0
    for one, h_SD in zip(run, states, strict=True):
        keep_S = one.batch.targets_S != PADDING_ROW  # the real ones stand first
        h.append(h_SD[keep_S.to(h_SD.device)])
        targets.append(one.batch.targets_S[keep_S])
        lengths.append(one.history_length_S[keep_S])
        seen.append(one.seen_items_N)
        owner.append(one.seen_sequence_N + count)
        count += int(keep_S.sum())
    before = sum(_counts(count, world.device)[: world.rank])
    h_ND = _gather_rows(torch.cat(h))
    score_N = None if repeat_score is None else repeat_score(h_ND)
    finite = torch.isfinite(h_ND).all()
    if score_N is not None:
        finite &= torch.isfinite(score_N).all()
    targets_N, lengths_N, seen_P, owner_P = (
        _gather_rows(torch.cat(values).to(world.device))
        for values in (targets, lengths, seen, [torch.cat(owner) + before])
    )

    target_score_N = h_ND.new_full((h_ND.shape[0],), -torch.inf)
    for first, c_RD in blocks():
        finite &= torch.isfinite(c_RD).all()
        pairs = _Seen.of_block(seen_P, owner_P, first, c_RD.shape[0], score_N)
        for rows, scores, _, _ in _score_chunks(h_ND, c_RD, first, table_rows, pairs):
            place = targets_N[rows] - first
            here = (place >= 0) & (place < c_RD.shape[0])
            value = scores.gather(1, place.where(here, 0)[:, None])[:, 0]
            target_score_N[rows] = value.where(here, target_score_N[rows])
    dist.all_reduce(target_score_N, dist.ReduceOp.MAX)
    _require_finite(finite)

    before_N = torch.zeros_like(targets_N)  # items ranked before the target
    seen_before_N = torch.zeros_like(targets_N)
    for first, c_RD in blocks():
        pairs = _Seen.of_block(seen_P, owner_P, first, c_RD.shape[0], score_N)
        for rows, scores, who, item in _score_chunks(h_ND, c_RD, first, table_rows, pairs):
            beats = scores >= target_score_N[rows, None]
            before_N[rows] += beats.sum(1)
            hit = beats[who - rows.start, item] & (item + first != targets_N[who])
            seen_before_N.index_add_(0, who, hit.to(seen_before_N.dtype))
    dist.all_reduce(before_N)
    dist.all_reduce(seen_before_N)
    # The target itself is among the items that reach its score: a count is a 1-based rank.
    answer = [before_N - seen_before_N, before_N, targets_N, lengths_N]
    return [one.cpu().numpy() for one in answer]


def _require_finite(finite: Tensor) -> None:
    """Raise on every rank when hidden states or rows are not finite on one: a NaN beats no rival,
    and would rank first."""
    every = finite.to(torch.int32)
    dist.all_reduce(every, dist.ReduceOp.MIN)
    if not int(every):
        raise InputError(DIVERGED)


@dataclass(frozen=True)
class _Seen:
    """Pairs of a target and an item of its history within a block of rows, in the targets' order.

    score_N: what such an item scores more, or None.
    """

    who_P: Tensor
    item_P: Tensor  # counted from the block's first row
    score_N: Tensor | None

    @classmethod
    def of_block(
        cls, seen_P: Tensor, owner_P: Tensor, first: int, rows: int, score_N: Tensor | None
    ) -> "_Seen":
        inside = (seen_P >= first) & (seen_P < first + rows)
        return cls(owner_P[inside], seen_P[inside] - first, score_N)


def _score_chunks(
    h_ND: Tensor, c_RD: Tensor, first: int, table_rows: int, seen: _Seen
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """(targets, their scores [M, R], the seen pairs among them: target and item)."""
    step = max(1, SCORE_BYTES // (c_RD.shape[0] * c_RD.element_size()))
    for start in range(0, h_ND.shape[0], step):
        rows = slice(start, min(start + step, h_ND.shape[0]))
        scores = _scores(h_ND[rows], c_RD, first, table_rows)
        bounds = torch.tensor([rows.start, rows.stop], device=seen.who_P.device)
        pairs = slice(*torch.searchsorted(seen.who_P, bounds).tolist())
        who, item = seen.who_P[pairs], seen.item_P[pairs]
        if seen.score_N is not None:
            scores[who - start, item] += seen.score_N[who]
        yield rows, scores, who, item


def _scores(h_MD: Tensor, c_RD: Tensor, first: int, table_rows: int) -> Tensor:
    """Products with one block of rows; -inf for the rows that are no items."""
    row_R = torch.arange(first, first + c_RD.shape[0], device=c_RD.device)
    item_R = (row_R >= RESERVED_ROWS) & (row_R < table_rows)
    return (h_MD @ c_RD.T).masked_fill_(~item_R, -torch.inf)


def _gather(x: Tensor) -> list[Tensor]:
    """Every rank's x, of one shape."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return parts


def _counts(count: int, device: torch.device) -> list[int]:
    """Every rank's count."""
    return torch.cat(_gather(torch.tensor([count], device=device))).tolist()


def _gather_rows(x: Tensor) -> Tensor:
    """Every rank's x [n, …] stacked, where n may differ between ranks."""
    counts = _counts(x.shape[0], x.device)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = _gather(padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
