"""Histories to samples: which target is trained how often, and the closed-form counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.samples import SampleRule, evaluation_samples, prefixes, whole_histories

lengths_of_users = st.lists(st.integers(0, 40), max_size=12).map(lambda n: np.array(n, np.int32))


def rows(samples):
    parts = (samples.user_M, samples.start_M, samples.stop_M, samples.first_target_M)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def trained(samples):
    """(user, index of the target event) of every trained token."""
    return [(u, t + 1) for u, _, stop, first in rows(samples) for t in range(first, stop)]


def every_target(n_train):
    return [(user, event) for user, n in enumerate(n_train) for event in range(1, n)]


def test_whole_histories_by_hand():
    samples = whole_histories(np.array([3, 0, 1, 2]), batch_tokens=8)
    assert rows(samples) == [(0, 0, 2, 0), (3, 0, 1, 0)]


def test_windows_by_hand():
    samples = whole_histories(np.array([11]), 4, "windows", overlap=1)
    assert rows(samples) == [(0, 0, 4, 0), (0, 3, 7, 4), (0, 6, 10, 7)]


def test_prefixes_by_hand():
    assert rows(prefixes(np.array([3, 1, 2]), 8)) == [(0, 0, 1, 0), (0, 0, 2, 1), (2, 0, 1, 0)]


@pytest.mark.parametrize("overlap", [0, 1, 3])
@given(n_train=lengths_of_users, batch_tokens=st.integers(4, 50))
def test_windows_train_each_target_once(overlap, n_train, batch_tokens):
    samples = whole_histories(n_train, batch_tokens, "windows", overlap)
    assert sorted(trained(samples)) == every_target(n_train)
    assert (samples.tokens_M <= batch_tokens).all()
    assert (samples.start_M <= samples.first_target_M).all()
    # A window after the first sees `overlap` tokens of context before its first target.
    later = samples.start_M > 0
    assert (samples.first_target_M - samples.start_M == np.where(later, overlap, 0)).all()


@given(n_train=lengths_of_users, batch_tokens=st.integers(1, 50))
def test_truncation_keeps_the_newest(n_train, batch_tokens):
    whole = whole_histories(n_train, batch_tokens, "truncate")
    assert trained(whole) == [
        (u, e) for u, e in every_target(n_train) if e >= n_train[u] - batch_tokens
    ]
    prefix = prefixes(n_train, batch_tokens, "truncate")
    assert trained(prefix) == every_target(n_train)
    expected = [(u, max(0, e - batch_tokens), e, e - 1) for u, e in every_target(n_train)]
    assert rows(prefix) == expected


@pytest.mark.parametrize(
    ("objective", "long_history", "overlap"),
    [
        ("causal", "refuse", 0),
        ("causal", "windows", 0),
        ("causal", "windows", 3),
        ("causal", "truncate", 0),
        ("prefix", "refuse", 0),
        ("prefix", "truncate", 0),
    ],
)
@given(n_train=lengths_of_users, batch_tokens=st.integers(4, 50))
def test_counts_in_closed_form_are_those_of_the_samples(
    objective, long_history, overlap, n_train, batch_tokens
):
    batch_tokens = 50 if long_history == "refuse" else batch_tokens
    rule = SampleRule(objective, batch_tokens, long_history, overlap)
    samples, counts = rule.samples(n_train), rule.counts(n_train)
    assert counts.samples == len(samples) == rule.samples_a_user(n_train).sum()
    assert counts.tokens == samples.tokens_M.sum()
    assert counts.targets == samples.targets_M.sum()
    per_user = np.bincount(samples.user_M, samples.tokens_M, minlength=len(n_train))
    assert np.array_equal(rule.tokens_a_user(n_train), per_user)
    assert counts.untrained_users == (n_train < 2).sum()
    whole = SampleRule(objective, 50).counts(n_train)
    assert counts.tokens == whole.tokens + counts.repeated_tokens - counts.dropped_tokens
    long = int((n_train - 1 > batch_tokens).sum())
    assert counts.windowed_histories == (long if long_history == "windows" else 0)
    assert counts.truncated_histories == (long if long_history == "truncate" else 0)


@pytest.mark.parametrize(
    ("objective", "long_history", "overlap"),
    [("causal", "windows", 2), ("causal", "truncate", 0), ("prefix", "truncate", 0)],
)
@given(n_train=lengths_of_users, max_history=st.integers(3, 20))
def test_max_history_cuts_as_a_smaller_batch_would(
    objective, long_history, overlap, n_train, max_history
):
    rule = SampleRule(objective, 50, long_history, overlap, max_history)
    smaller = SampleRule(objective, max_history, long_history, overlap)
    assert rows(rule.samples(n_train)) == rows(smaller.samples(n_train))
    assert rule.counts(n_train) == smaller.counts(n_train)
    assert (rule.samples(n_train).tokens_M <= max_history).all()


def test_long_histories_are_refused_with_both_numbers():
    with pytest.raises(InputError, match=r"100 tokens.*batch_tokens=64.*windows or truncate"):
        SampleRule("causal", 64).check_lengths(np.array([5, 101]))
    with pytest.raises(
        InputError, match=r"100 tokens.*batch_tokens=64.*data.long_history to truncate"
    ):
        prefixes(np.array([101]), 64)
    SampleRule("causal", 64).check_lengths(np.array([65]))
    with pytest.raises(InputError, match=r"100 tokens.*max_history=10.*windows or truncate"):
        SampleRule("causal", 200, max_history=10).check_lengths(np.array([101]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("prefix", 8, "windows"), "no meaning for prefix"),
        (
            ("causal", 8, "windows", 8),
            "data.overlap_tokens=8 must be at least 0 and below data.batch_tokens=8",
        ),
        (("causal", 8, "windows", 4, 4), "overlap_tokens=4 must be .* below data.max_history=4"),
        (("causal", 8, "windows", 0, 9), "max_history=9 must be at least 1 and at most"),
        (("causal", 8, "cut"), "long_history=cut is unknown"),
        (("both", 8), "objective=both is unknown"),
        (("causal", 0), "batch_tokens=0"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SampleRule(*options)


def test_leave_one_out_evaluation():
    n_train, n_validation, n_events = np.array([[3, 1, 5], [1, 1, 3], [0, 0, 1]]).T
    validation, unseen = evaluation_samples(n_train, n_validation, n_events, "validation")
    assert rows(validation) == [(0, 0, 3, 2), (1, 0, 1, 0)]
    assert unseen == 0
    test, unseen = evaluation_samples(n_train, n_validation, n_events, "test")
    assert rows(test) == [(0, 0, 4, 3), (1, 0, 2, 1)]
    assert unseen == 1  # the user of a single event has nothing before it


def test_temporal_evaluation():
    # User 0 has three validation and two test events, user 1 no training event at all.
    lengths = (np.array([2, 0]), np.array([3, 2]), np.array([7, 3]))
    validation, unseen = evaluation_samples(*lengths, "validation", "all")
    assert [(u, stop) for u, _, stop, _ in rows(validation)] == [(0, 2), (0, 3), (0, 4), (1, 1)]
    assert unseen == 1
    test, unseen = evaluation_samples(*lengths, "test", "all")
    assert [(u, stop) for u, _, stop, _ in rows(test)] == [(0, 5), (0, 6), (1, 2)]
    first, unseen = evaluation_samples(*lengths, "validation", "first")
    assert [(u, stop) for u, _, stop, _ in rows(first)] == [(0, 2)]
    assert unseen == 1


def test_unknown_evaluation_options_are_refused():
    nobody = (np.zeros(0, np.int32),) * 3
    with pytest.raises(InputError, match="split=train"):
        evaluation_samples(*nobody, "train")
    with pytest.raises(InputError, match="targets=last"):
        evaluation_samples(*nobody, "test", "last")
