"""A data set as the training steps of one rank.

Legend: T tokens, B sequences, S read positions, C candidates, P packs, W ranks. Nothing here
communicates: every rank plans the whole order from lengths alone, so all ranks agree on the number
of steps and on each step's targets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch

from data.batch import SequenceBatch, to_batch
from data.negatives import Candidates
from data.packing import PackOrder, Window, assemble, in_steps, masked, reordered
from data.prefetch import NOBODY, Prefetcher, WindowReader
from data.reader import HistoryDataset
from data.samples import NO_SAMPLES, LongHistory, Objective, SampleRule

STEPS_AHEAD = 4  # steps that wait in memory: covers the planning of a window, costs a few batches


@dataclass(frozen=True)
class Step:
    """One training step of this rank and what all ranks know of it.

    position: packs consumed once the step is done; with (epoch, epoch_start) as the hint it is all
        that a resume needs. epoch, epoch_start: the epoch of the step's first pack over all ranks
        and the position of that epoch's first pack.
    ends_epoch: an epoch's last pack is in this step. progress: share of max_epochs done, 1 at last.
    tokens, targets: real ones, over all ranks.
    """

    batch: SequenceBatch
    position: int
    epoch: int
    epoch_start: int
    ends_epoch: bool
    progress: float
    tokens: int
    targets: int


@dataclass(frozen=True)
class _Pack:
    """Pack `number` of a window, by what planning knows."""

    window: Window
    number: int
    tokens: int
    targets: int
    epoch_tokens: int  # of its epoch, up to and with this pack
    following: tuple[int, ...]  # the row groups of the next window


class TrainingSteps(Prefetcher[Step]):
    """The steps of training from `position` to the end of `max_epochs`, built ahead in a thread.

    Use as a context manager, or call `close`. The last step may have fewer packs than ranks: the
    missing ones are empty batches, so every rank has the same number of steps.

    counts: what an epoch holds (`SampleCounts`).
    Raises InputError as `PackOrder` does, here; damaged files raise it from the iteration.
    """

    def __init__(
        self,
        dataset: HistoryDataset,
        *,
        objective: Objective,
        batch_tokens: int,
        max_sequences: int,
        mask_ratio: float,
        reorder_ratio: float = 0.0,
        long_history: LongHistory,
        overlap: int,
        max_history: int | None = None,
        window_tokens: int,
        seed: int,
        candidates: Candidates,
        rank: int,
        world_size: int,
        max_epochs: int,
        position: int = 0,
        hint: tuple[int, int] = (0, 0),
        pin_memory: bool = False,
    ) -> None:
        rule = SampleRule(objective, batch_tokens, long_history, overlap, max_history)
        self.order = PackOrder(dataset, rule, max_sequences, window_tokens, seed)
        self.counts = self.order.counts
        self.rule, self.candidates = rule, candidates
        self.mask_ratio, self.reorder_ratio = mask_ratio, reorder_ratio
        self.rank, self.world_size, self.max_epochs = rank, world_size, max_epochs
        # A new thread's current device is 0: pinning there would open a context on another card.
        self._device = torch.cuda.current_device() if pin_memory else None
        self._reader = WindowReader(dataset)
        super().__init__(self._steps(position, hint), STEPS_AHEAD)

    def estimated_steps(self) -> int:
        """Steps of the whole training if every epoch had as many packs as the first.

        Epochs differ by a few packs; `Step.progress` is what a schedule should follow.
        """
        return -(-self.order.packs_of_epoch(0) * self.max_epochs // self.world_size)

    def _steps(self, position: int, hint: tuple[int, int]) -> Iterator[Step]:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        for packs in in_steps(self._packs(position, hint), self.world_size):
            step = self._step(packs, position)
            position = step.position
            yield step

    def _packs(self, position: int, hint: tuple[int, int]) -> Iterator[_Pack]:
        windows = takewhile(
            lambda window: window.epoch < self.max_epochs, self.order.windows(position, hint)
        )
        window = next(windows, None)
        while window is not None:
            following = next(windows, None)
            groups = following.groups if following else window.groups
            starts = window.boundaries[:-1]
            tokens_P = np.add.reduceat(window.samples.tokens_M, starts, dtype=np.int64)
            targets_P = np.add.reduceat(window.samples.targets_M, starts, dtype=np.int64)
            done_P = window.tokens_before + np.cumsum(tokens_P)
            for number in range(max(position - window.position, 0), len(window)):
                sums = (int(tokens_P[number]), int(targets_P[number]), int(done_P[number]))
                yield _Pack(window, number, *sums, groups)
            window = following

    def _step(self, packs: list[_Pack], position: int) -> Step:
        targets = sum(pack.targets for pack in packs)
        mine = packs[self.rank] if self.rank < len(packs) else None
        first, last = packs[0].window, packs[-1]
        total = self.counts.tokens
        return Step(
            batch=self._batch(mine, position + self.rank, targets),
            position=position + len(packs),
            epoch=first.epoch,
            epoch_start=first.epoch_start,
            ends_epoch=any(pack.epoch_tokens == total for pack in packs),
            progress=(last.window.epoch + last.epoch_tokens / total) / self.max_epochs,
            tokens=sum(pack.tokens for pack in packs),
            targets=targets,
        )

    def _batch(self, pack: _Pack | None, position: int, step_targets: int) -> SequenceBatch:
        histories, samples = NOBODY, NO_SAMPLES
        if pack is not None:
            histories = self._reader.load(pack.window.groups)
            samples = pack.window.pack(pack.number)
        limits = (self.rule.batch_tokens, self.order.max_sequences)
        arrays = assemble(histories, samples, *limits, self.rule.objective == "prefix")
        arrays = reordered(arrays, self.reorder_ratio, self.order.seed, position)
        arrays = masked(arrays, self.mask_ratio, self.order.seed, position)
        candidates_C, log_counts_C = self.candidates.for_pack(position, arrays.targets_S)
        batch = to_batch(arrays, candidates_C, log_counts_C, step_targets)
        if pack is not None:
            share = (pack.number + 1) / len(pack.window)
            self._reader.read_ahead(pack.following, share)
        return batch if self._device is None else batch.pin_memory()
