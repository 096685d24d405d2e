"""Samples to token-budget batches: the seeded endless order of packs, and one pack's arrays.

Legend: T tokens of a batch, B its sequences, S read positions, M samples, G row groups, U users.

The order is one endless sequence of packs that depends on lengths, options and seed alone. An
epoch permutes the row groups, takes windows of about `window_tokens` training events of them,
permutes all samples of a window, and cuts packs. At a step of W ranks rank r takes pack
`position + r` and the position grows by W; so the position is one integer, and a run that goes on
at another W neither repeats nor drops a pack.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import numpy as np

from data.cutting import cut_packs
from data.errors import InputError
from data.randomness import Purpose, generator
from data.reader import Histories, HistoryDataset, concatenated_ranges
from data.samples import SampleRule, Samples
from data.schema import MASK_ROW, PADDING_ROW

T = TypeVar("T")
MOST_BATCH_TOKENS = 262_144  # that a long history makes the default batch grow to
REACH = 3.0  # places: an event passes only others that are nearer than this


def default_batch_tokens(epoch_tokens: int, longest: int) -> int:
    """A batch that cuts an epoch into about 64 steps.

    A power of two between 2,048, below which a batch does not fill a device, and 16,384; more
    where the longest sample needs it, up to MOST_BATCH_TOKENS.
    """
    steps, least, most = 64, 2_048, 16_384
    fitting = 2 ** round(math.log2(max(epoch_tokens / steps, 1)))
    needed = 2 ** math.ceil(math.log2(longest))
    batch = min(max(fitting, least), most)
    return max(batch, needed) if needed <= MOST_BATCH_TOKENS else batch


def default_max_sequences(batch_tokens: int, mean_sample_tokens: float) -> int:
    """A fixed number of sequences that packs of samples in random order seldom reach.

    The mean count n plus 6 √n, in steps of 16 and at most one sequence a token: a pack that would
    hold more just ends early, while every spare sequence is a row that the loss reads in vain.
    """
    mean = batch_tokens / max(mean_sample_tokens, 1.0)
    wanted = mean + 6.0 * mean**0.5
    return int(min(max(-(-wanted // 16) * 16, 16), batch_tokens))


@dataclass(frozen=True)
class Window:
    """The planned packs of some row groups in one epoch.

    groups: the row groups, ascending; a sample's user counts in their concatenation.
    boundaries: as `cut_packs`, over `samples`, which stand in training order.
    position: of its first pack in the endless order. tokens_before: of its epoch's sample tokens.
    """

    epoch: int
    epoch_start: int
    position: int
    tokens_before: int
    groups: tuple[int, ...]
    samples: Samples
    boundaries: np.ndarray

    def __len__(self) -> int:
        """Packs."""
        return len(self.boundaries) - 1

    def pack(self, number: int) -> Samples:
        return self.samples.take(slice(self.boundaries[number], self.boundaries[number + 1]))


class PackOrder:
    """The endless order of a data set's packs, planned window by window from lengths alone.

    Raises InputError for a history longer than a batch (unless the rule cuts it), for a data set
    without a single training target, and for options out of range.
    """

    def __init__(
        self,
        dataset: HistoryDataset,
        rule: SampleRule,
        max_sequences: int,
        window_tokens: int,
        seed: int,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("window_tokens", window_tokens)):
            if value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if not 0 <= seed < 2**64:
            raise InputError(f"seed={seed} must be at least 0 and below 2^64")
        self.dataset, self.rule, self.seed = dataset, rule, seed
        self.max_sequences, self.window_tokens = max_sequences, window_tokens
        rule.check_lengths(dataset.n_train_U)
        self.counts = rule.counts(dataset.n_train_U)
        if self.counts.samples == 0:
            raise InputError(
                f"{dataset.folder} has no user with two training events: nothing to train on"
            )
        starts_G1 = dataset.group_starts_G1
        self._events_G = _sums(dataset.n_train_U, starts_G1)
        self._tokens_G = _sums(rule.tokens_a_user(dataset.n_train_U), starts_G1)

    def groups(self, epoch: int) -> list[np.ndarray]:
        """The row groups of each window of an epoch; every row group stands in one window."""
        order = generator(self.seed, Purpose.GROUPS, epoch).permutation(len(self._events_G))
        events = self._events_G[order]
        number = (np.cumsum(events) - events) // self.window_tokens
        cuts = np.flatnonzero(np.diff(number)) + 1
        return [np.sort(groups) for groups in np.split(order, cuts)]

    def windows(self, position: int = 0, hint: tuple[int, int] = (0, 0)) -> Iterator[Window]:
        """Windows without end, from the one that holds pack `position`.

        hint: an epoch and the position of its first pack, at or before `position`, from which the
        search starts; without it every earlier epoch is planned again.
        """
        epoch, epoch_start = hint
        if position < epoch_start or epoch < 0 or epoch_start < 0:
            raise ValueError(
                f"position {position} is before epoch {epoch}, which has {epoch_start}"
            )
        first = epoch_start
        while True:
            tokens_before = 0
            for number, groups in enumerate(self.groups(epoch)):
                samples = self._samples(epoch, number, groups)
                cut = cut_packs(samples.tokens_M, self.rule.batch_tokens, self.max_sequences)
                if first + len(cut) - 1 > position:
                    at = (epoch, epoch_start, first, tokens_before)
                    yield Window(*at, tuple(groups.tolist()), samples, cut)
                first += len(cut) - 1
                tokens_before += int(self._tokens_G[groups].sum())
            epoch, epoch_start = epoch + 1, first

    def packs_of_epoch(self, epoch: int) -> int:
        """Packs of one epoch: planned in full, so a few hundredths of a second a million samples.

        It differs a little from epoch to epoch, because each cuts another permutation.
        """
        total = 0
        for number, groups in enumerate(self.groups(epoch)):
            tokens_M = self._samples(epoch, number, groups).tokens_M
            total += len(cut_packs(tokens_M, self.rule.batch_tokens, self.max_sequences)) - 1
        return total

    def _samples(self, epoch: int, window: int, groups: np.ndarray) -> Samples:
        samples = self.rule.samples(self.dataset.n_train_U[self.dataset.users_of(groups)])
        order = generator(self.seed, Purpose.SAMPLES, epoch, window).permutation(len(samples))
        return samples.take(order)


@dataclass(frozen=True)
class PackArrays:
    """One pack in the fixed shapes of `SequenceBatch`: int64 arrays, padded."""

    items_T: np.ndarray
    history_T: np.ndarray  # the same, or with masked items
    offsets_B1: np.ndarray
    targets_S: np.ndarray
    read_positions_S: np.ndarray | None
    tokens: int  # in use; the rest of items_T is PADDING_ROW


def assemble(
    histories: Histories,
    samples: Samples,
    batch_tokens: int,
    max_sequences: int,
    read_last: bool,
) -> PackArrays:
    """One pack's arrays from the histories of its window, without a loop over users or tokens.

    read_last: read each sequence's last token alone (S = max_sequences), else all (S = T), where
    context tokens before `first_target` carry no target. No samples make an empty batch.
    """
    lengths = samples.tokens_M.astype(np.int64)
    base = histories.offsets_U1[samples.user_M]
    source = concatenated_ranges(base + samples.start_M, lengths)  # of each token, in items_N
    tokens, count = len(source), len(lengths)

    items_T = np.full(batch_tokens, PADDING_ROW, dtype=np.int64)
    items_T[:tokens] = histories.items_N[source]
    offsets_B1 = np.full(max_sequences + 1, tokens, dtype=np.int64)
    offsets_B1[0] = 0
    np.cumsum(lengths, out=offsets_B1[1 : count + 1])

    if read_last:
        targets_S = np.full(max_sequences, PADDING_ROW, dtype=np.int64)
        targets_S[:count] = histories.items_N[base + samples.stop_M]
        read_positions_S = np.zeros(max_sequences, dtype=np.int64)
        read_positions_S[:count] = offsets_B1[1 : count + 1] - 1
        return PackArrays(items_T, items_T, offsets_B1, targets_S, read_positions_S, tokens)

    targets_S = np.full(batch_tokens, PADDING_ROW, dtype=np.int64)
    source += 1
    targets_S[:tokens] = histories.items_N[source]
    context = samples.first_target_M - samples.start_M
    if context.any():
        targets_S[concatenated_ranges(offsets_B1[:count], context)] = PADDING_ROW
    return PackArrays(items_T, items_T, offsets_B1, targets_S, None, tokens)


def in_steps(packs: Iterator[T], world_size: int) -> Iterator[list[T]]:
    """The packs of each step over all ranks, in rank order; only the last step may have fewer."""
    while step := list(islice(packs, world_size)):
        yield step


def reordered(pack: PackArrays, ratio: float, seed: int, position: int) -> PackArrays:
    """The pack with the events of some samples, each chosen with probability `ratio`, a little out
    of order: sorted by place plus a draw from [0, REACH) each.

    Where every token has a target, the last one's moves as well, and each token's is what now
    follows it; a single target of a sequence stays. Keyed by the pack's position. (In the spirit of
    the reordered windows of CL4SRec, Xie et al., ICDE 2022.)
    """
    if ratio == 0:
        return pack
    random = generator(seed, Purpose.REORDERS, position)
    lengths_B = np.diff(pack.offsets_B1)
    follows = pack.read_positions_S is None
    events_B = lengths_B + (follows & (lengths_B > 0))
    sequence_N = np.arange(len(events_B)).repeat(events_B)
    chosen_B = random.random(len(events_B), dtype=np.float32) < ratio
    first_N, last_N = np.zeros((2, len(sequence_N)), dtype=bool)
    ends_B = np.cumsum(events_B)[events_B > 0]
    if follows:
        first_N[ends_B - events_B[events_B > 0]] = True
        last_N[ends_B - 1] = True
    event_N = np.empty(len(sequence_N), dtype=np.int64)
    event_N[~last_N] = pack.items_T[: pack.tokens]
    event_N[last_N] = pack.targets_S[pack.offsets_B1[1:][lengths_B > 0] - 1] if follows else []
    place_N = np.arange(len(sequence_N)) + REACH * sequence_N  # so that no two sequences meet
    place_N += REACH * random.random(len(sequence_N)) * chosen_B[sequence_N]
    event_N = event_N[np.argsort(place_N, kind="stable")]

    items_T, targets_S = pack.items_T.copy(), pack.targets_S
    items_T[: pack.tokens] = event_N[~last_N]
    if follows:
        targets_S = targets_S.copy()
        context_T = targets_S[: pack.tokens] == PADDING_ROW
        targets_S[: pack.tokens] = np.where(context_T, PADDING_ROW, event_N[~first_N])
    return replace(pack, items_T=items_T, history_T=items_T, targets_S=targets_S)


def masked(pack: PackArrays, mask_ratio: float, seed: int, position: int) -> PackArrays:
    """The pack with each input item replaced by MASK_ROW with probability `mask_ratio`.

    Keyed by the pack's position. Items and targets stay as they are.
    """
    if mask_ratio == 0:
        return pack
    draws = generator(seed, Purpose.MASKS, position).random(pack.tokens, dtype=np.float32)
    history_T = pack.history_T.copy()
    history_T[: pack.tokens][draws < mask_ratio] = MASK_ROW
    return replace(pack, history_T=history_T)


def _sums(values_U: np.ndarray, starts_G1: np.ndarray) -> np.ndarray:
    """int64 sum of each group's values; a group may be empty."""
    return np.diff(np.concatenate([[0], np.cumsum(values_U, dtype=np.int64)])[starts_G1])
