"""Evaluation batches: every target once over the ranks, whole histories, right seen lists."""

import numpy as np
import pytest
import torch

from data.batch import CANDIDATES, HISTORY
from data.evaluation import EvaluationBatches
from data.reader import HistoryDataset
from data.schema import PADDING_ROW
from tests.data.datasets import random_histories, write_dataset

HISTORIES = random_histories(users=31, longest=20, items=9, seed=4)  # many repeats


@pytest.fixture
def dataset(tmp_path):
    return HistoryDataset(write_dataset(tmp_path, HISTORIES, files=2, row_group_users=4))


def found(dataset, split="test", targets="all", world_size=1, **options):
    """(user, history, target, seen) of every evaluated sequence of all ranks."""
    options = {"batch_tokens": 32, "max_sequences": 4, "window_tokens": 60} | options
    results, counts = [], set()
    for rank in range(world_size):
        batches = EvaluationBatches(
            dataset, split, targets, rank=rank, world_size=world_size, **options
        )
        one = list(batches)
        counts.add((len(one), len(batches)))
        results += [sequence for batch in one for sequence in sequences(batch, batches)]
    assert len({length for pair in counts for length in pair}) == 1  # all ranks, and as announced
    return sorted(results)


def sequences(evaluation, batches):
    batch = evaluation.batch
    items, offsets = batch.features[HISTORY].values(), batch.offsets_B1
    assert items.shape == (batches.batch_tokens,)
    assert batch.targets_S.shape == evaluation.user_index_S.shape == (offsets.numel() - 1,)
    for s in range(offsets.numel() - 1):
        history = items[offsets[s] : offsets[s + 1]].tolist()
        target = int(batch.targets_S[s])
        seen = evaluation.seen_items_N[evaluation.seen_sequence_N == s].tolist()
        events = int(evaluation.history_length_S[s])
        shown = batches.max_history
        assert len(history) == (events if shown is None else min(events, shown))
        if not history:
            assert (target, int(evaluation.user_index_S[s]), seen) == (PADDING_ROW, -1, [])
            continue
        assert batch.read_positions_S[s] == offsets[s + 1] - 1
        assert len(seen) == len(set(seen))
        yield int(evaluation.user_index_S[s]), history, target, sorted(seen)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_leave_one_out_covers_every_user_once(dataset, split, world_size):
    cut = -2 if split == "validation" else -1
    expected = [
        (user, items[:cut], items[cut], sorted(set(items[:cut])))
        for user, items in enumerate(HISTORIES)
        if len(items) > -cut
    ]
    assert found(dataset, split, world_size=world_size) == expected


def test_seen_items_are_distinct_and_may_hold_the_target(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, [[8, 9, 8, 9, 10, 8], [11, 11]]))
    expected = [(0, [8, 9, 8, 9, 10], 8, [8, 9, 10]), (1, [11], 11, [11])]
    assert found(dataset) == expected


@pytest.mark.parametrize("shown", [1, 5])
def test_a_shown_part_changes_neither_targets_nor_what_counts_as_seen(dataset, shown):
    whole = found(dataset)
    cut = [(user, history[-shown:], target, seen) for user, history, target, seen in whole]
    assert found(dataset, max_history=shown) == sorted(cut)
    assert any(len(history) > shown for _, history, _, _ in whole)


def test_temporal_targets_have_their_full_earlier_history(tmp_path):
    folder = write_dataset(
        tmp_path, [[8, 9, 10, 11, 12], [9, 8, 10]], n_train=[1, 0], n_validation=[2, 2]
    )
    dataset = HistoryDataset(folder)
    both = found(dataset, "validation") + found(dataset, "test")
    assert [one[:3] for one in both] == [
        (0, [8], 9),
        (0, [8, 9], 10),
        (1, [9], 8),
        (0, [8, 9, 10], 11),
        (0, [8, 9, 10, 11], 12),
        (1, [9, 8], 10),
    ]
    assert [one[:3] for one in found(dataset, "test", "first")] == [
        (0, [8, 9, 10], 11),
        (1, [9, 8], 10),
    ]
    batches = EvaluationBatches(dataset, "validation", "all", 8, 2, 0, 1)
    assert (batches.samples, batches.without_history) == (3, 1)


def test_the_budget_grows_to_the_longest_history(dataset):
    longest = max(map(len, HISTORIES)) - 1
    for world_size in (1, 2):
        batches = EvaluationBatches(dataset, "test", "all", 5, 4, 0, world_size)
        assert batches.batch_tokens == longest
    assert found(dataset, batch_tokens=5) == found(dataset)


def test_batches_repeat_and_carry_the_given_candidates(dataset):
    ids = np.arange(8, 14)
    batches = EvaluationBatches(dataset, "test", "all", 32, 4, 0, 1, candidates_C=ids)
    first, again = list(batches), list(batches)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.batch.features.values(), other.batch.features.values())
        assert np.array_equal(one.batch.features[CANDIDATES].values(), ids)
        assert one.to(torch.device("cpu")).batch.log_counts_C is None
    plain = next(iter(EvaluationBatches(dataset, "test", "all", 32, 4, 0, 1)))
    assert plain.batch.features[CANDIDATES].values().tolist() == [PADDING_ROW]


def test_a_split_without_targets_has_no_batches(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, [[8, 9], [9]], n_train=[2, 1]))
    assert list(EvaluationBatches(dataset, "test", "all", 8, 2, 0, 2)) == []
    empty = HistoryDataset(write_dataset(tmp_path / "none", []))
    assert list(EvaluationBatches(empty, "test", "all", 8, 2, 0, 1)) == []
