"""A data set's evaluation targets as the batches of one rank.

Legend: T tokens, S sequences (one read position each), C candidates, N seen items, W ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.batch import SequenceBatch, to_batch
from data.cutting import cut_packs
from data.packing import assemble, in_steps
from data.prefetch import NOBODY, WindowReader
from data.randomness import Purpose, generator
from data.reader import Histories, HistoryDataset, concatenated_ranges
from data.samples import NO_SAMPLES, Samples, Split, evaluation_samples
from data.schema import PADDING_ROW


@dataclass(frozen=True)
class EvaluationBatch:
    """Evaluated targets with their histories.

    batch: reads each sequence's last token; targets_S are the evaluated items.
    seen_items_N, seen_sequence_N: int64 pairs of a distinct item of the whole history and its
        sequence: all but the target are what the seen-filtered protocol excludes. N varies.
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
    max_history: the newest events that the model sees of each history; None shows all. What
        counts as seen is the whole history all the same.
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
        max_history: int | None = None,
        candidates_C: np.ndarray | None = None,
        window_tokens: int = 2**25,
    ) -> None:
        self._dataset, self._split, self._targets = dataset, split, targets
        self._max_sequences, self._rank, self._world_size = max_sequences, rank, world_size
        self.max_history = max_history
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
        samples, without_history = evaluation_samples(
            self._dataset.n_train_U[users],
            self._dataset.n_validation_U[users],
            self._dataset.n_events_U[users],
            self._split,
            self._targets,
        )
        if self.max_history is not None:
            samples = replace(samples, start_M=np.maximum(samples.stop_M - self.max_history, 0))
        return samples, without_history

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
        history_length_S = np.zeros(self._max_sequences, dtype=np.int64)
        history_length_S[: len(pack.samples)] = pack.samples.stop_M
        seen_items_N, seen_sequence_N = _seen(histories, pack.samples)
        return EvaluationBatch(
            to_batch(arrays, self._candidates_C, None, step_targets),
            torch.from_numpy(seen_items_N),
            torch.from_numpy(seen_sequence_N),
            torch.from_numpy(user_index_S),
            torch.from_numpy(history_length_S),
        )


def _seen(histories: Histories, samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The distinct items before each target, and their sequences: int64."""
    base_M, events_M = histories.offsets_U1[samples.user_M], samples.stop_M.astype(np.int64)
    items_N = histories.items_N[concatenated_ranges(base_M, events_M)].astype(np.int64)
    sequence_N = np.repeat(np.arange(len(samples)), events_M)
    rows = int(items_N.max(initial=0)) + 1
    pairs = np.unique(sequence_N * rows + items_N)
    return pairs % rows, pairs // rows
