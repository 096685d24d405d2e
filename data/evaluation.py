"""A data set's evaluation targets as the batches of one rank.

Legend: T tokens, S sequences (one read position each), C candidates, N seen items, W ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import SequenceBatch
from data.cutting import cut_packs
from data.packing import PackArrays, assemble, in_steps, to_batch
from data.prefetch import NOBODY, WindowReader
from data.randomness import Purpose, generator
from data.reader import HistoryDataset
from data.samples import NO_SAMPLES, Samples, Split, evaluation_samples
from data.schema import PADDING_ROW


@dataclass(frozen=True)
class EvaluationBatch:
    """Evaluated targets with their histories.

    batch: reads each sequence's last token; targets_S are the evaluated items.
    seen_items_N, seen_sequence_N: int64 pairs of a distinct item of the whole history, other than
        the target, and its sequence: what the seen-filtered protocol excludes. N varies.
    user_index_S: int64 number of the user in the data set, −1 where unused.
    history_length_S: int64 events before the target.
    """

    batch: SequenceBatch
    seen_items_N: Tensor
    seen_sequence_N: Tensor
    user_index_S: Tensor
    history_length_S: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "EvaluationBatch":
        values = (getattr(self, one.name) for one in fields(self))
        return EvaluationBatch(*(value.to(device, non_blocking=non_blocking) for value in values))


class _Pack(NamedTuple):
    groups: tuple[int, ...]
    samples: Samples
    user_index: np.ndarray  # in the data set, of each sample


_MISSING = _Pack((), NO_SAMPLES, np.zeros(0, dtype=np.int64))


class EvaluationBatches:
    """This rank's batches of a split, iterated as often as needed; every rank has `len` of them.

    Samples stand in one fixed shuffled order: sorted by length, the batches of long histories
    would leave sequences empty and those of short ones tokens.

    targets: each user's `all` or `first`, see `evaluation_samples`.
    candidates_C: int64 ids to look up with every batch; by default one PADDING_ROW.

    Attributes: batch_tokens, the budget, grown to the longest history where that is more, so that
    none is cut; samples, the evaluated targets over all ranks; without_history, the targets that
    have no event before them and are evaluated nowhere.
    """

    def __init__(
        self,
        dataset: HistoryDataset,
        split: Split,
        targets: Literal["all", "first"],
        batch_tokens: int,
        max_sequences: int,
        rank: int,
        world_size: int,
        candidates_C: np.ndarray | None = None,
        window_tokens: int = 2**25,
    ) -> None:
        self._dataset, self._split, self._targets = dataset, split, targets
        self._max_sequences, self._rank, self._world_size = max_sequences, rank, world_size
        padding = np.full(1, PADDING_ROW, dtype=np.int64)
        self._candidates_C = padding if candidates_C is None else candidates_C
        self._reader = WindowReader(dataset)

        events_G = np.diff(
            np.append(0, np.cumsum(dataset.n_events_U, dtype=np.int64))[dataset.group_starts_G1]
        )
        number = (np.cumsum(events_G) - events_G) // window_tokens
        self._windows = np.split(np.arange(len(events_G)), np.flatnonzero(np.diff(number)) + 1)

        self.samples = self.without_history = 0
        self.batch_tokens = batch_tokens
        for groups in self._windows:
            samples, without_history = self._samples(groups)
            self.samples += len(samples)
            self.without_history += without_history
            self.batch_tokens = max(self.batch_tokens, int(samples.tokens_M.max(initial=0)))
        self._length = -(-sum(1 for _ in self._packs()) // world_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[EvaluationBatch]:
        for packs in in_steps(self._packs(), self._world_size):
            mine = packs[self._rank] if self._rank < len(packs) else _MISSING
            yield self._batch(mine, sum(len(pack.samples) for pack in packs))

    def _samples(self, groups: np.ndarray) -> tuple[Samples, int]:
        users = self._dataset.users_of(groups)
        return evaluation_samples(
            self._dataset.n_train_U[users],
            self._dataset.n_validation_U[users],
            self._dataset.n_events_U[users],
            self._split,
            self._targets,
        )

    def _packs(self) -> Iterator[_Pack]:
        for number, groups in enumerate(self._windows):
            samples, _ = self._samples(groups)
            order = generator(0, Purpose.EVALUATION, 0, number).permutation(len(samples))
            samples = samples.take(order)
            users = self._dataset.users_of(groups)
            cut = cut_packs(samples.tokens_M, self.batch_tokens, self._max_sequences)
            for start, stop in pairwise(cut.tolist()):
                part = samples.take(slice(start, stop))
                yield _Pack(tuple(groups.tolist()), part, users[part.user_M])

    def _batch(self, pack: _Pack, step_targets: int) -> EvaluationBatch:
        histories = self._reader.load(pack.groups) if pack.groups else NOBODY
        limits = (self.batch_tokens, self._max_sequences)
        arrays = assemble(histories, pack.samples, *limits, read_last=True)
        user_index_S = np.full(self._max_sequences, -1, dtype=np.int64)
        user_index_S[: len(pack.samples)] = pack.user_index
        seen_items_N, seen_sequence_N = _seen(arrays)
        return EvaluationBatch(
            to_batch(arrays, self._candidates_C, None, step_targets),
            torch.from_numpy(seen_items_N),
            torch.from_numpy(seen_sequence_N),
            torch.from_numpy(user_index_S),
            torch.from_numpy(np.diff(arrays.offsets_B1)),
        )


def _seen(pack: PackArrays) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items of each sequence other than its target, and their sequences: int64."""
    items_T = pack.history_T[: pack.tokens]
    sequence_T = np.repeat(np.arange(len(pack.targets_S)), np.diff(pack.offsets_B1))
    kept_T = items_T != pack.targets_S[sequence_T]
    rows = int(items_T.max(initial=0)) + 1
    pairs = np.unique(sequence_T[kept_T] * rows + items_T[kept_T])
    return pairs % rows, pairs // rows
