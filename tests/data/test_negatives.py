"""Candidates: slices that cover the table, draws that follow q, log counts that are exact."""

import numpy as np
import pytest

from data.errors import InputError
from data.negatives import FullCandidates, SampledCandidates, full_slice
from data.schema import PADDING_ROW, RESERVED_ROWS

COUNTS = np.array([0] * RESERVED_ROWS + [500, 0, 300, 150, 49, 1])
TARGETS = np.array([8, 8, 10, PADDING_ROW])
ITEMS = np.arange(RESERVED_ROWS, len(COUNTS))


def draws(kind, count=200_000):
    candidates, log_counts = SampledCandidates(kind, count, COUNTS, False, 3).for_pack(0, TARGETS)
    return candidates[:count], log_counts[:count]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_slices_of_all_ranks_are_the_table_in_order(world_size):
    slices = [full_slice(11, rank, world_size) for rank in range(world_size)]
    assert {len(one) for one in slices} == {-(-11 // world_size)}
    together = np.concatenate(slices)
    assert np.array_equal(together[:11], np.arange(11))
    assert (together[11:] == PADDING_ROW).all()
    ids, log_counts = FullCandidates(11, 0, world_size).for_pack(5, TARGETS)
    assert np.array_equal(ids, slices[0])
    assert log_counts is None


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_log_counts_are_those_of_the_draws(kind):
    ids, log_counts = draws(kind)
    found = np.bincount(ids, minlength=len(COUNTS))
    assert found[:RESERVED_ROWS].sum() == 0
    for item in ITEMS:
        mine = ids == item
        if not mine.any():
            assert kind == "popularity"
            assert COUNTS[item] == 0
            continue
        expected = np.exp(log_counts[mine][0])
        assert np.ptp(log_counts[mine]) == 0
        assert abs(found[item] - expected) < 5 * expected**0.5


def test_log_counts_are_exact():
    q = {"uniform": np.full(len(COUNTS), 1 / 6), "popularity": COUNTS / COUNTS.sum()}
    for kind, share in q.items():
        ids, log_counts = draws(kind, 64)
        np.testing.assert_allclose(log_counts, np.log(64 * share[ids]), rtol=1e-6)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_in_batch_counts_are_those_of_the_mixture(kind):
    ids, log_counts = SampledCandidates(kind, 64, COUNTS, True, 3).for_pack(9, TARGETS)
    share = COUNTS / COUNTS.sum()
    q = share if kind == "popularity" else np.full(len(COUNTS), 1 / 6)
    used = ids != PADDING_ROW
    np.testing.assert_allclose(
        log_counts[used], np.log(64 * q[ids[used]] + 3 * share[ids[used]]), rtol=1e-5
    )
    assert log_counts[~used].tolist() == [0.0]


def test_in_batch_alone_counts_the_targets():
    ids, log_counts = SampledCandidates("uniform", 0, COUNTS, True, 3).for_pack(9, TARGETS)
    assert np.array_equal(ids, TARGETS)
    np.testing.assert_allclose(log_counts[:3], np.log(3 * COUNTS[TARGETS[:3]] / 1000), rtol=1e-6)
    assert log_counts[3] == 0.0


@pytest.mark.parametrize("in_batch", [False, True])
def test_shapes_are_fixed_and_targets_stand_behind_the_draws(in_batch):
    sampled = SampledCandidates("uniform", 16, COUNTS, in_batch, 3)
    for targets in (TARGETS, np.zeros(4, np.int64)):
        ids, log_counts = sampled.for_pack(1, targets)
        assert ids.dtype == np.int64
        assert log_counts.dtype == np.float32
        assert len(ids) == len(log_counts) == 16 + 4
        assert np.array_equal(ids[16:], targets)
        assert (in_batch and targets.any()) or not log_counts[16:].any()


def test_draws_are_a_function_of_seed_and_position():
    def ids(seed, position):
        sampled = SampledCandidates("popularity", 64, COUNTS, False, seed)
        return sampled.for_pack(position, TARGETS)[0].tolist()

    assert ids(1, 5) == ids(1, 5)
    assert len({tuple(ids(seed, position)) for seed in (1, 2) for position in (5, 6)}) == 4


def test_options_without_meaning_are_refused():
    with pytest.raises(InputError, match="kind zipf"):
        SampledCandidates("zipf", 4, COUNTS, False, 0)
    with pytest.raises(InputError, match="negatives, 0,"):
        SampledCandidates("uniform", 0, COUNTS, False, 0)
    with pytest.raises(InputError, match="no training event"):
        SampledCandidates("popularity", 4, COUNTS * 0, False, 0)
    with pytest.raises(ValueError, match="reserved rows"):
        SampledCandidates("uniform", 4, COUNTS + 1, False, 0)
    with pytest.raises(InputError, match="item 9 is a training target and counts 0"):
        SampledCandidates("popularity", 4, COUNTS, True, 0).for_pack(0, np.array([9]))
