"""Packs: budgets, the order's coverage and independence, and a pack's arrays against a loop."""

from collections import Counter
from itertools import pairwise, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cutting import cut_packs
from data.errors import InputError
from data.packing import (
    REACH,
    PackOrder,
    assemble,
    default_max_sequences,
    in_steps,
    masked,
    reordered,
)
from data.reader import HistoryDataset
from data.samples import NO_SAMPLES, SampleRule
from data.schema import MASK_ROW, PADDING_ROW, RESERVED_ROWS
from tests.data.datasets import random_histories, write_dataset


@given(
    tokens=st.lists(st.integers(1, 30), max_size=60),
    batch_tokens=st.integers(30, 80),
    max_sequences=st.integers(1, 9),
)
def test_packs_keep_their_budgets_and_end_only_when_they_must(tokens, batch_tokens, max_sequences):
    cut = cut_packs(np.array(tokens, np.int32), batch_tokens, max_sequences).tolist()
    assert cut[0] == 0
    assert cut[-1] == len(tokens)
    for start, stop in pairwise(cut):
        assert 0 < stop - start <= max_sequences
        assert sum(tokens[start:stop]) <= batch_tokens
        if stop < len(tokens) and stop - start < max_sequences:
            assert sum(tokens[start : stop + 1]) > batch_tokens


def test_packs_of_samples_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        cut_packs(np.array([3, 9]), 8, 4)


def test_default_max_sequences_leaves_room_and_stays_in_bounds():
    assert default_max_sequences(200_502, 195.8) == 1_232  # the paper's 1,024 prefixes
    assert default_max_sequences(16, 1.0) == 16
    assert default_max_sequences(64, 1000.0) == 16
    assert default_max_sequences(8, 2.0) == 8


@pytest.fixture
def dataset(tmp_path):
    histories = random_histories(users=60, longest=30, items=50, seed=5)
    return HistoryDataset(write_dataset(tmp_path, histories, files=3, row_group_users=4))


def order(dataset, objective="causal", window_tokens=150, seed=7):
    rule = SampleRule(objective, batch_tokens=32)
    return PackOrder(dataset, rule, max_sequences=6, window_tokens=window_tokens, seed=seed)


def epochs(pack_order, count, position=0, hint=(0, 0)):
    windows = pack_order.windows(position, hint)
    return list(takewhile(lambda window: window.epoch < count, windows))


def packs(windows):
    """(position, groups, users, stops) of every pack."""
    return [
        (w.position + n, w.groups, w.pack(n).user_M.tolist(), w.pack(n).stop_M.tolist())
        for w in windows
        for n in range(len(w))
    ]


@pytest.mark.parametrize("objective", ["causal", "prefix"])
@pytest.mark.parametrize("window_tokens", [1, 150, 10**9])
def test_an_epoch_holds_every_sample_once(dataset, objective, window_tokens):
    pack_order = order(dataset, objective, window_tokens)
    all_windows = epochs(pack_order, 3)
    starts = {window.epoch: window.epoch_start for window in all_windows}
    for epoch in range(3):
        windows = [window for window in all_windows if window.epoch == epoch]
        seen = Counter()
        tokens = 0
        for window in windows:
            assert window.tokens_before == tokens
            users = dataset.users_of(np.array(window.groups))[window.samples.user_M]
            seen.update(zip(users.tolist(), window.samples.stop_M.tolist(), strict=True))
            tokens += int(window.samples.tokens_M.sum())
        whole = pack_order.rule.samples(dataset.n_train_U)
        assert seen == Counter(zip(whole.user_M.tolist(), whole.stop_M.tolist(), strict=True))
        assert tokens == pack_order.counts.tokens
        assert sum(map(len, windows)) == pack_order.packs_of_epoch(epoch)
        assert starts[epoch] == sum(pack_order.packs_of_epoch(e) for e in range(epoch))
    assert [p[0] for p in packs(all_windows)] == list(range(len(packs(all_windows))))


def test_windows_hold_about_window_tokens_and_a_small_data_set_is_one(dataset):
    largest = max(order(dataset)._events_G)
    for groups in order(dataset, window_tokens=150).groups(0):
        assert order(dataset)._events_G[groups].sum() <= 150 + largest
    (whole,) = order(dataset, window_tokens=10**9).groups(4)
    assert np.array_equal(whole, np.arange(len(dataset.groups)))


def test_the_order_depends_on_seed_epoch_and_nothing_else(dataset):
    first = packs(epochs(order(dataset), 2))
    np.random.seed(1)  # the global state must not matter
    assert first == packs(epochs(order(dataset), 2))
    assert first != packs(epochs(order(dataset, seed=8), 2))
    one, two = epochs(order(dataset, window_tokens=10**9), 2)
    assert one.groups == two.groups
    assert not np.array_equal(one.samples.user_M, two.samples.user_M)


def test_seeking_gives_the_same_windows_with_and_without_a_hint(dataset):
    windows = epochs(order(dataset), 3)
    everything = packs(windows)
    for position in range(0, len(everything), 3):
        found = epochs(order(dataset), 3, position)
        assert packs(found)[position - found[0].position :] == everything[position:]
        hints = {(w.epoch, w.epoch_start) for w in windows if w.epoch_start <= position}
        for hint in hints:
            assert packs(epochs(order(dataset), 3, position, hint)) == packs(found)
    with pytest.raises(ValueError, match="position 0 is before epoch 1"):
        next(order(dataset).windows(0, (1, 40)))


def test_samples_of_one_user_seldom_share_a_batch(tmp_path):
    histories = [[8] * 42 for _ in range(100)]
    dataset = HistoryDataset(write_dataset(tmp_path, histories, row_group_users=10))
    pack_order = PackOrder(dataset, SampleRule("prefix", 64 * 20), 64, 10**9, seed=0)
    shares = [max(Counter(users).values()) for _, _, users, _ in packs(epochs(pack_order, 1))]
    assert max(shares) <= 6  # of 64; user by user it would be 39


def test_nothing_to_train_on_is_an_error_and_not_an_endless_search(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, [[8], [9, 10]], n_train=[1, 1]))
    with pytest.raises(InputError, match="nothing to train on"):
        order(dataset)


@pytest.mark.parametrize(("option", "value"), [("window_tokens", 0), ("seed", -1)])
def test_options_out_of_range_are_named(dataset, option, value):
    with pytest.raises(InputError, match=f"{option}={value}"):
        order(dataset, **{option: value})


def loop_assemble(histories, samples, batch_tokens, max_sequences, read_last):
    """The readable reference: one user and one token at a time."""
    history, targets, reads, offsets = [], [], [], [0]
    for m in range(len(samples)):
        begin = histories.offsets_U1[samples.user_M[m]]
        for t in range(samples.start_M[m], samples.stop_M[m]):
            history.append(int(histories.items_N[begin + t]))
            if t >= samples.first_target_M[m]:
                reads.append(len(history) - 1)
                targets.append(int(histories.items_N[begin + t + 1]))
            elif not read_last:
                targets.append(PADDING_ROW)
        offsets.append(len(history))
    pad = lambda values, size, by: values + [by] * (size - len(values))  # noqa: E731
    return (
        pad(history, batch_tokens, PADDING_ROW),
        pad(offsets, max_sequences + 1, len(history)),
        pad(targets, max_sequences if read_last else batch_tokens, PADDING_ROW),
        pad(reads, max_sequences, 0) if read_last else None,
    )


@pytest.mark.parametrize(
    "rule",
    [
        SampleRule("causal", 32),
        SampleRule("causal", 9, "windows", 4),
        SampleRule("causal", 9, "truncate"),
        SampleRule("prefix", 32),
        SampleRule("prefix", 9, "truncate"),
    ],
)
def test_assembled_arrays_equal_a_loop_over_tokens(dataset, rule):
    histories, read_last = dataset.read_many(range(len(dataset.groups))), rule.objective == "prefix"
    samples = rule.samples(dataset.n_train_U)
    for start, stop in pairwise(cut_packs(samples.tokens_M, rule.batch_tokens, 6)):
        args = (histories, samples.take(slice(start, stop)), rule.batch_tokens, 6, read_last)
        pack, expected = assemble(*args), loop_assemble(*args)
        assert pack.history_T.tolist() == expected[0]
        assert pack.offsets_B1.tolist() == expected[1]
        assert pack.targets_S.tolist() == expected[2]
        reads = pack.read_positions_S
        assert (None if reads is None else reads.tolist()) == expected[3]


@pytest.mark.parametrize("read_last", [False, True])
def test_no_samples_make_an_empty_batch(dataset, read_last):
    pack = assemble(dataset.read(0), NO_SAMPLES, 32, 6, read_last)
    assert pack.tokens == 0
    assert not pack.history_T.any()
    assert not pack.targets_S.any()
    assert pack.offsets_B1.tolist() == [0] * 7


def test_masks_hide_the_given_share_of_items_and_no_target(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, [[8, 9] * 10_002]))
    samples = SampleRule("causal", 32_768).samples(dataset.n_train_U)
    pack = assemble(dataset.read(0), samples, 32_768, 4, False)
    items, targets = pack.items_T.copy(), pack.targets_S.copy()
    plain = masked(pack, 0.0, seed=1, position=5)
    some = masked(pack, 0.2, seed=1, position=5)
    other = masked(pack, 0.2, seed=1, position=6)
    assert np.array_equal(plain.history_T, items)
    hidden = some.history_T == MASK_ROW
    assert abs(hidden[: some.tokens].mean() - 0.2) < 0.012  # 4 standard deviations
    assert not hidden[some.tokens :].any()
    assert np.array_equal(some.history_T[~hidden], items[~hidden])
    assert np.array_equal(some.items_T, items)
    assert np.array_equal(some.targets_S, targets)
    assert not np.array_equal(some.history_T, other.history_T)


def reordering_case(tmp_path, read_last, users=400):
    """A pack of histories of 2 to 30 events, whose items are all different."""
    lengths = np.random.default_rng(1).integers(2, 31, users)
    ends = RESERVED_ROWS + np.cumsum(lengths)
    histories = [[*range(end - n, end)] for n, end in zip(lengths.tolist(), ends, strict=True)]
    dataset = HistoryDataset(write_dataset(tmp_path, histories))
    samples = SampleRule("prefix" if read_last else "causal", 16_384).samples(dataset.n_train_U)
    few = samples.take(np.arange(min(len(samples), 600)))
    return assemble(dataset.read(0), few, 16_384, 640, read_last)


def sequences_of(pack):
    """Items and last target of each sequence."""
    bounds = pack.offsets_B1.tolist()
    return [
        [*pack.items_T[a:b].tolist(), int(pack.targets_S[b - 1])]
        for a, b in pairwise(bounds)
        if b > a
    ]


def test_events_change_places_with_near_ones_and_targets_follow(tmp_path):
    pack = reordering_case(tmp_path, False)
    kept = pack.items_T.copy(), pack.targets_S.copy()
    changed = reordered(pack, 0.5, seed=1, position=5)
    before, after = sequences_of(pack), sequences_of(changed)
    long = [len(one) > 5 for one in before]
    moved = [a != b for a, b in zip(before, after, strict=True)]
    assert abs(np.mean(np.array(moved)[long]) - 0.5) < 0.12  # some of the chosen stay by chance
    for a, b in zip(before, after, strict=True):
        places = [a.index(item) for item in b]
        assert sorted(places) == [*range(len(a))]
        assert max(abs(place - i) for i, place in enumerate(places)) < REACH
    used = changed.tokens
    inside = np.diff(np.repeat(np.arange(640), np.diff(changed.offsets_B1))) == 0
    assert np.array_equal(changed.targets_S[: used - 1][inside], changed.items_T[1:used][inside])
    assert changed.history_T is changed.items_T
    assert not changed.items_T[used:].any()
    assert not changed.targets_S[used:].any()
    assert np.array_equal(pack.items_T, kept[0])
    assert np.array_equal(pack.targets_S, kept[1])
    again, other = (reordered(pack, 0.5, seed=1, position=p) for p in (5, 6))
    assert np.array_equal(again.items_T, changed.items_T)
    assert not np.array_equal(other.items_T, changed.items_T)
    assert reordered(pack, 0.0, seed=1, position=5) is pack


def test_the_target_of_a_prefix_stays(tmp_path):
    pack = reordering_case(tmp_path, True)
    changed = reordered(pack, 0.9, seed=1, position=5)
    assert np.array_equal(changed.targets_S, pack.targets_S)
    assert not np.array_equal(changed.items_T, pack.items_T)
    for a, b in pairwise(pack.offsets_B1.tolist()):
        assert sorted(changed.items_T[a:b].tolist()) == pack.items_T[a:b].tolist()


def test_tokens_without_a_target_have_none_after_reordering(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, [[*range(8, 200)]]))
    samples = SampleRule("causal", 64, "windows", 32).samples(dataset.n_train_U)
    pack = assemble(dataset.read(0), samples, 512, 16, False)
    changed = reordered(pack, 0.9, seed=1, position=5)
    context = pack.targets_S == PADDING_ROW
    assert context[: pack.tokens].any()
    assert np.array_equal(changed.targets_S == PADDING_ROW, context)


def test_packs_are_dealt_to_ranks_in_order():
    assert list(in_steps(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
