"""Training steps: ranks share one order, one integer resumes it, shapes are fixed, threads end."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.batch import CANDIDATES, HISTORY
from data.errors import InputError
from data.loader import TrainingSteps
from data.negatives import FullCandidates, SampledCandidates
from data.prefetch import WindowReader
from data.reader import HistoryDataset
from data.schema import MASK_ROW, PADDING_ROW, RESERVED_ROWS, Manifest
from tests.data.datasets import write_dataset

BATCH_TOKENS, MAX_SEQUENCES, NEGATIVES = 24, 5, 7


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """No two events share an item, so a target names its user and place."""
    lengths = np.random.default_rng(2).integers(1, 27, 40)
    rows = iter(range(RESERVED_ROWS, RESERVED_ROWS + lengths.sum()))
    histories = [[next(rows) for _ in range(length)] for length in lengths]
    folder = tmp_path_factory.mktemp("loader")
    return HistoryDataset(write_dataset(folder, histories, files=3, row_group_users=3))


def expected_targets(dataset):
    histories = dataset.read_many(range(len(dataset.groups)))
    starts = histories.offsets_U1[:-1]
    return Counter(
        item
        for start, n in zip(starts, dataset.n_train_U, strict=True)
        for item in histories.items_N[start + 1 : start + n].tolist()
    )


def training(dataset, **changes):
    counts = np.ones(dataset.table_rows, dtype=np.int64)
    counts[:RESERVED_ROWS] = 0
    options = {
        "objective": "causal",
        "batch_tokens": BATCH_TOKENS,
        "max_sequences": MAX_SEQUENCES,
        "mask_ratio": 0.3,
        "long_history": "refuse",
        "overlap": 0,
        "window_tokens": 90,
        "seed": 11,
        "candidates": SampledCandidates("popularity", NEGATIVES, counts, True, 11),
        "rank": 0,
        "world_size": 1,
        "max_epochs": 2,
    }
    return TrainingSteps(dataset, **(options | changes))


def steps_of(dataset, **changes):
    with training(dataset, **changes) as steps:
        return list(steps)


def tensors(batch):
    parts = (batch.offsets_B1, batch.targets_S, batch.read_positions_S, batch.log_counts_C)
    return [batch.features.values(), *(part for part in parts if part is not None)]


def same(one, other):
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


OBJECTIVES = [
    {"objective": "causal"},
    {"objective": "causal", "long_history": "windows", "overlap": 3, "batch_tokens": 10},
    {"objective": "prefix"},
    {"objective": "prefix", "long_history": "truncate", "batch_tokens": 10},
]


@pytest.mark.parametrize("options", OBJECTIVES)
def test_every_target_is_trained_once_an_epoch(dataset, options):
    steps = steps_of(dataset, **options)
    expected, epoch_targets, ends = expected_targets(dataset), Counter(), 0
    for step in steps:
        targets = step.batch.targets_S
        epoch_targets.update(targets[targets != PADDING_ROW].tolist())
        if step.ends_epoch:
            assert epoch_targets == expected
            epoch_targets, ends = Counter(), ends + 1
    assert ends == 2
    assert not epoch_targets
    assert steps[-1].progress == 1.0
    assert all(a.progress < b.progress for a, b in pairwise(steps))


@pytest.mark.parametrize("options", OBJECTIVES)
def test_shapes_are_fixed_and_padding_carries_no_target(dataset, options):
    budget = options.get("batch_tokens", BATCH_TOKENS)
    causal = options["objective"] == "causal"
    reads = budget if causal else MAX_SEQUENCES
    for step in steps_of(dataset, world_size=3, rank=2, **options):
        batch = step.batch
        history, candidates = (batch.features[key].values() for key in (HISTORY, CANDIDATES))
        assert history.shape == (budget,)
        assert candidates.shape == batch.log_counts_C.shape == (NEGATIVES + reads,)
        assert batch.targets_S.shape == (reads,)
        assert batch.offsets_B1.shape == (MAX_SEQUENCES + 1,)
        offsets, lengths = batch.offsets_B1, batch.offsets_B1.diff()
        used = int(offsets[-1])
        assert offsets[0] == 0
        assert (lengths >= 0).all()
        in_use = int((lengths > 0).sum())
        assert (lengths[in_use:] == 0).all()  # unused sequences stand last
        assert (history[used:] == PADDING_ROW).all()
        assert (history[:used] != PADDING_ROW).all()
        if causal:
            assert batch.read_positions_S is None
            assert (batch.targets_S[used:] == PADDING_ROW).all()
        else:
            assert torch.equal(batch.read_positions_S[:in_use], offsets[1 : in_use + 1] - 1)
            assert (batch.read_positions_S[in_use:] == 0).all()
            assert (batch.targets_S[in_use:] == PADDING_ROW).all()
            assert (batch.targets_S[:in_use] != PADDING_ROW).all()


def by_position(dataset, world_size, **options):
    """The batch of each pack of the order, from all ranks' steps."""
    found, ranks = {}, []
    for rank in range(world_size):
        before, steps = options.get("position", 0), []
        for step in steps_of(dataset, rank=rank, world_size=world_size, **options):
            if before + rank < step.position:
                found[before + rank] = step.batch
            else:
                assert not step.batch.targets_S.any()  # a missing pack at the very end
            before = step.position
            steps.append((step.position, step.epoch, step.epoch_start, step.ends_epoch))
            steps.append((step.progress, step.tokens, step.targets))
        ranks.append(steps)
    assert all(steps == ranks[0] for steps in ranks)  # what ranks know without talking
    return found


@pytest.mark.parametrize("objective", ["causal", "prefix"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_packs_do_not_depend_on_the_number_of_ranks(dataset, objective, world_size):
    alone = by_position(dataset, 1, objective=objective)
    spread = by_position(dataset, world_size, objective=objective)
    assert sorted(alone) == sorted(spread) == list(range(len(alone)))
    assert all(same(alone[position], spread[position]) for position in alone)


@pytest.mark.parametrize("objective", ["causal", "prefix"])
def test_one_integer_resumes_bitwise_at_any_number_of_ranks(dataset, objective):
    alone = by_position(dataset, 1, objective=objective)
    steps = steps_of(dataset, objective=objective, world_size=2)
    for step in steps[:: max(len(steps) // 5, 1)]:
        hint = (step.epoch, step.epoch_start)
        rest = by_position(dataset, 3, objective=objective, position=step.position, hint=hint)
        assert sorted(rest) == list(range(step.position, len(alone)))
        assert all(same(alone[position], rest[position]) for position in rest)
    assert steps_of(dataset, objective=objective, position=steps[-1].position) == []


def test_counts_of_a_step_are_those_of_all_ranks(dataset):
    alone = by_position(dataset, 1)
    before = 0
    for step in steps_of(dataset, world_size=3, rank=1):
        packs = [alone[position] for position in range(before, step.position)]
        assert step.targets == sum(int((pack.targets_S != PADDING_ROW).sum()) for pack in packs)
        assert step.tokens == sum(int(pack.offsets_B1[-1]) for pack in packs)
        assert step.batch.step_targets == step.targets
        before = step.position


def test_masks_and_full_candidates(dataset):
    full = FullCandidates(dataset.table_rows, 1, 2)
    steps = steps_of(dataset, candidates=full, rank=1, world_size=2, mask_ratio=0.5)
    masked = np.concatenate([step.batch.features[HISTORY].values().numpy() for step in steps])
    used = masked[masked != PADDING_ROW]
    assert abs((used == MASK_ROW).mean() - 0.5) < 0.1
    for step in steps:
        assert step.batch.log_counts_C is None
        assert (step.batch.targets_S != MASK_ROW).all()
        assert np.array_equal(step.batch.features[CANDIDATES].values(), full.for_pack(0, None)[0])


def test_reordered_samples_reach_the_batch_and_keep_their_items(dataset):
    plain, moved = (steps_of(dataset, mask_ratio=0.0, reorder_ratio=ratio) for ratio in (0.0, 0.9))
    changed = 0
    for one, other in zip(plain, moved, strict=True):
        a, b = (step.batch.features[HISTORY].values().numpy() for step in (one, other))
        assert np.array_equal(step_events(one), step_events(other))
        changed += int((a != b).sum())
    assert changed


def step_events(step):
    """The items and targets of a step; those inside a sequence are both, so each counts once."""
    return np.unique(np.concatenate([step.batch.items_T.numpy(), step.batch.targets_S.numpy()]))


@pytest.mark.parametrize(("window_tokens", "epochs_read"), [(10**9, 1), (90, 2)])
def test_a_small_data_set_is_read_once_and_a_large_one_once_an_epoch(
    dataset, monkeypatch, window_tokens, epochs_read
):
    reads = Counter()
    read = HistoryDataset.read

    def counted(self, group, user_ids=True):
        reads[group] += 1
        return read(self, group, user_ids)

    monkeypatch.setattr(HistoryDataset, "read", counted)
    steps_of(dataset, window_tokens=window_tokens)
    assert set(reads) == set(range(len(dataset.groups)))
    # The window after the last one is read ahead only as far as training goes.
    assert max(reads.values()) <= epochs_read


def test_the_next_window_is_read_while_the_current_one_is_used(dataset, monkeypatch):
    reads = []
    read = HistoryDataset.read
    monkeypatch.setattr(
        HistoryDataset,
        "read",
        lambda self, group, **k: reads.append(group) or read(self, group, **k),
    )
    reader = WindowReader(dataset)
    reader.load((0, 1))
    reader.read_ahead((0, 1), 1.0)  # the current window again: nothing to do
    for share in (0.25, 0.5, 0.75):
        reader.read_ahead((2, 4, 5, 7), share)
    assert reads == [0, 1, 2, 4, 5]
    window = reader.load((2, 4, 5, 7))
    assert reads == [0, 1, 2, 4, 5, 7]
    assert np.array_equal(window.items_N, dataset.read_many([2, 4, 5, 7]).items_N)


def test_estimated_steps_are_near_the_real_ones(dataset):
    with training(dataset, world_size=2) as steps:
        assert abs(steps.estimated_steps() - len(list(steps))) <= 3


def test_a_failure_in_the_thread_reaches_the_consumer(tmp_path):
    histories = [[8, 9, 10, 11, 12]] * 8
    dataset = HistoryDataset(write_dataset(tmp_path, histories, files=2))
    path = tmp_path / Manifest.read(tmp_path).histories[1].path
    path.write_bytes(b"\0" * path.stat().st_size)
    with training(dataset) as steps, pytest.raises(InputError, match=r"part-00001.*is damaged"):
        list(steps)
    assert not steps._thread.is_alive()


def test_closing_early_ends_the_thread(dataset):
    steps = training(dataset, max_epochs=100)
    next(steps)
    assert steps._thread.is_alive()
    steps.close()
    steps.close()
    assert not steps._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        next(steps)
    training(dataset).close()  # never started


def test_a_long_history_is_refused_before_any_step(dataset):
    with pytest.raises(InputError, match=r"\d+ tokens.*batch_tokens=10"):
        training(dataset, batch_tokens=10)
