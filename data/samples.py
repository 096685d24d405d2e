"""Histories to samples: what one sequence of a batch is, from lengths alone.

Legend: U users, M samples. A sample is a run of one user's tokens, items[start:stop]; token t's
target is items[t + 1]; only tokens t >= first_target are trained (or read), the ones before are
context. Whole histories (causal) train every token of one pass; prefixes (the paper's objective,
arXiv 2409.01192 section 3) train the last token of every proper prefix.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from data.errors import InputError
from data.reader import concatenated_ranges

Objective = Literal["causal", "prefix"]
LongHistory = Literal["refuse", "windows", "truncate"]
Split = Literal["validation", "test"]


@dataclass(frozen=True)
class Samples:
    """Parallel int32 arrays, one entry a sample; `user` counts in whatever the lengths covered."""

    user_M: np.ndarray
    start_M: np.ndarray
    stop_M: np.ndarray
    first_target_M: np.ndarray

    def __len__(self) -> int:
        return len(self.user_M)

    @property
    def tokens_M(self) -> np.ndarray:
        return self.stop_M - self.start_M

    @property
    def targets_M(self) -> np.ndarray:
        return self.stop_M - self.first_target_M

    def take(self, index: np.ndarray | slice) -> "Samples":
        return Samples(
            self.user_M[index], self.start_M[index], self.stop_M[index], self.first_target_M[index]
        )


NO_SAMPLES = Samples(*(np.zeros(0, dtype=np.int32) for _ in range(4)))


@dataclass(frozen=True)
class SampleCounts:
    """What a rule makes of a data set in one epoch, for the log and the run's report."""

    samples: int
    tokens: int
    targets: int
    untrained_users: int  # fewer than two training events: nothing to predict
    windowed_histories: int
    repeated_tokens: int  # context that the windows read a second time
    truncated_histories: int
    dropped_tokens: int  # input tokens left out by truncation, summed over the samples


def whole_histories(
    n_train_U: np.ndarray,
    batch_tokens: int,
    long_history: LongHistory = "refuse",
    overlap: int = 0,
) -> Samples:
    """One sample a user, items[0:n_train − 1], each token trained; none where n_train < 2.

    A history of more than `batch_tokens` tokens is refused (InputError), cut into windows that
    overlap by `overlap` tokens of context and train each target once, or truncated to its newest.
    """
    rule = SampleRule("causal", batch_tokens, long_history, overlap)
    rule.check_lengths(n_train_U)
    tokens_U = _trained_tokens(n_train_U)
    if long_history == "truncate":
        user_M = np.flatnonzero(tokens_U)
        stop_M = tokens_U[user_M]
        start_M = np.maximum(stop_M - batch_tokens, 0)
        return _samples(user_M, start_M, stop_M, start_M)
    windows_U = rule.samples_a_user(n_train_U)
    user_M = np.repeat(np.arange(len(tokens_U)), windows_U)
    number_M = concatenated_ranges(np.zeros(len(tokens_U), dtype=np.int64), windows_U)
    start_M = number_M * (batch_tokens - overlap)
    stop_M = np.minimum(start_M + batch_tokens, tokens_U[user_M])
    return _samples(user_M, start_M, stop_M, np.where(number_M > 0, start_M + overlap, 0))


def prefixes(
    n_train_U: np.ndarray, batch_tokens: int, long_history: LongHistory = "refuse"
) -> Samples:
    """Every (user, l) with 1 <= l < n_train: tokens items[0:l], the target items[l].

    A prefix of more than `batch_tokens` tokens is refused (InputError) or truncated to its newest.
    """
    rule = SampleRule("prefix", batch_tokens, long_history)
    rule.check_lengths(n_train_U)
    count_U = _trained_tokens(n_train_U)
    user_M = np.repeat(np.arange(len(count_U)), count_U)
    stop_M = concatenated_ranges(np.ones(len(count_U), dtype=np.int64), count_U)
    start_M = np.maximum(stop_M - batch_tokens, 0)
    return _samples(user_M, start_M, stop_M, stop_M - 1)


@dataclass(frozen=True)
class SampleRule:
    """How training histories become samples; knows the counts of an epoch without making them.

    max_history: the most tokens of a sample, where that is less than a whole batch; `long_history`
        says what becomes of a longer one.

    Raises InputError for an option that is unknown or has no meaning here.
    """

    objective: Objective
    batch_tokens: int
    long_history: LongHistory = "refuse"
    overlap: int = 0  # tokens, with long_history=windows
    max_history: int | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("causal", "prefix"):
            raise InputError(f"objective={self.objective} is unknown: use causal or prefix")
        if self.long_history not in ("refuse", "windows", "truncate"):
            raise InputError(
                f"long_history={self.long_history} is unknown: use refuse, windows or truncate"
            )
        if self.batch_tokens < 1:
            raise InputError(f"batch_tokens={self.batch_tokens} must be at least 1")
        if self.objective == "prefix" and self.long_history == "windows":
            raise InputError(
                "long_history=windows has no meaning for prefix samples, each trains one target: "
                "use long_history=truncate, or refuse"
            )
        if self.max_history is not None and not 1 <= self.max_history <= self.batch_tokens:
            raise InputError(
                f"max_history={self.max_history} must be at least 1 and at most "
                f"batch_tokens={self.batch_tokens}"
            )
        if self.long_history == "windows" and not 0 <= self.overlap < self.sample_tokens:
            name = "batch_tokens" if self.max_history is None else "max_history"
            raise InputError(
                f"data.overlap_tokens={self.overlap} must be at least 0 and below "
                f"data.{name}={self.sample_tokens}"
            )

    @property
    def sample_tokens(self) -> int:
        """The most tokens of a sample."""
        return self.batch_tokens if self.max_history is None else self.max_history

    def check_lengths(self, n_train_U: np.ndarray) -> None:
        """Raises InputError when a history is longer than a batch and the rule refuses that."""
        longest = int(_trained_tokens(n_train_U).max(initial=0))
        if self.long_history == "refuse" and longest > self.sample_tokens:
            policies = "truncate" if self.objective == "prefix" else "windows or truncate"
            if self.max_history is not None:
                raise InputError(
                    f"the longest training history has {longest} tokens, more than "
                    f"max_history={self.max_history}: set data.long_history to {policies}"
                )
            raise InputError(
                f"the longest training history has {longest} tokens, a batch only "
                f"batch_tokens={self.batch_tokens}: set data.batch_tokens to {longest} or more, "
                f"or data.long_history to {policies}"
            )

    def samples(self, n_train_U: np.ndarray) -> Samples:
        if self.objective == "prefix":
            return prefixes(n_train_U, self.sample_tokens, self.long_history)
        return whole_histories(n_train_U, self.sample_tokens, self.long_history, self.overlap)

    def samples_a_user(self, n_train_U: np.ndarray) -> np.ndarray:
        """int64 number of samples of each user, in closed form."""
        tokens_U = _trained_tokens(n_train_U)
        if self.objective == "prefix":
            return tokens_U
        extra_U = np.zeros_like(tokens_U)
        if self.long_history == "windows":
            beyond_U = np.maximum(tokens_U - self.sample_tokens, 0)
            extra_U = -(-beyond_U // (self.sample_tokens - self.overlap))
        return (tokens_U > 0) + extra_U

    def tokens_a_user(self, n_train_U: np.ndarray) -> np.ndarray:
        """int64 sum of the tokens of each user's samples, in closed form."""
        tokens_U = _trained_tokens(n_train_U)
        kept_U = np.minimum(tokens_U, self.sample_tokens)
        if self.objective == "prefix":
            return kept_U * (kept_U + 1) // 2 + (tokens_U - kept_U) * self.sample_tokens
        if self.long_history == "windows":
            repeats_U = np.maximum(self.samples_a_user(n_train_U) - 1, 0)
            return tokens_U + repeats_U * self.overlap
        return kept_U

    def counts(self, n_train_U: np.ndarray) -> SampleCounts:
        """What one epoch holds, in closed form."""
        tokens_U = _trained_tokens(n_train_U)
        total, long = (
            int(self.tokens_a_user(n_train_U).sum()),
            int((tokens_U > self.sample_tokens).sum()),
        )
        whole_U = tokens_U * (tokens_U + 1) // 2 if self.objective == "prefix" else tokens_U
        whole = int(whole_U.sum())
        windows, truncates = self.long_history == "windows", self.long_history == "truncate"
        targets_U = tokens_U
        if self.objective == "causal" and truncates:
            targets_U = np.minimum(tokens_U, self.sample_tokens)
        return SampleCounts(
            samples=int(self.samples_a_user(n_train_U).sum()),
            tokens=total,
            targets=int(targets_U.sum()),
            untrained_users=int((tokens_U == 0).sum()),
            windowed_histories=long if windows else 0,
            repeated_tokens=total - whole if windows else 0,
            truncated_histories=long if truncates else 0,
            dropped_tokens=whole - total if truncates else 0,
        )


def evaluation_samples(
    n_train_U: np.ndarray,
    n_validation_U: np.ndarray,
    n_events_U: np.ndarray,
    split: Split,
    targets: Literal["all", "first"] = "all",
) -> tuple[Samples, int]:
    """One sample a target of `split`: all events before it, the target items[stop].

    Validation targets are items[n_train:n_train + n_validation], test targets the rest, so a test
    target's history includes the validation events. `first` keeps each user's first target.

    Returns the samples and the number of targets without any event before them, which nothing can
    predict: they are counted, not evaluated.
    """
    if split not in ("validation", "test"):
        raise InputError(f"split={split} is unknown: use validation or test")
    if targets not in ("all", "first"):
        raise InputError(f"targets={targets} is unknown: use all or first")
    n_train_U = n_train_U.astype(np.int64)
    first_test_U = n_train_U + n_validation_U
    begin_U = n_train_U if split == "validation" else first_test_U
    count_U = (first_test_U if split == "validation" else n_events_U) - begin_U
    if targets == "first":
        count_U = np.minimum(count_U, 1)
    user_M = np.repeat(np.arange(len(count_U)), count_U)
    stop_M = concatenated_ranges(begin_U, count_U)
    known_M = stop_M > 0
    user_M, stop_M = user_M[known_M], stop_M[known_M]
    return _samples(user_M, np.zeros_like(stop_M), stop_M, stop_M - 1), int((~known_M).sum())


def _trained_tokens(n_train_U: np.ndarray) -> np.ndarray:
    """int64 tokens of each user that have a training event behind them."""
    return np.maximum(n_train_U.astype(np.int64) - 1, 0)


def _samples(user: np.ndarray, start: np.ndarray, stop: np.ndarray, first: np.ndarray) -> Samples:
    return Samples(*(part.astype(np.int32) for part in (user, start, stop, first)))
