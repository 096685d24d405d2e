"""Numbers by `data.spread`: each once, and the large ones in every part."""

import numpy as np
import pytest

from data.spread import stride


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6, 8, 12, 97, 1_000, 30_030, 65_536, 1_000_003])
def test_each_number_is_taken_once(count):
    numbers = np.arange(count) * stride(count) % count
    assert np.array_equal(np.sort(numbers), np.arange(count))


@pytest.mark.parametrize("shards", [2, 8, 64])
@pytest.mark.parametrize("count", [99_991, 100_000, 2**17])
def test_every_shard_has_its_share_of_a_zipf_law(count, shards):
    """By rank alone the first shard would have 0.87, 0.66 and 0.43 of it."""
    weight = (np.arange(count) + 1.0) ** -0.8
    share = np.zeros(count)
    share[np.arange(count) * stride(count) % count] = weight / weight.sum()
    parts = np.array([part.sum() for part in np.array_split(share, shards)])
    largest = share.max()  # of one item, which no numbering divides
    assert parts.max() < 1.1 / shards + largest


def test_the_first_places_fall_everywhere():
    for places in (8, 50, 1_000):
        numbers = np.arange(places) * stride(1_000_000) % 1_000_000
        gaps = np.diff(np.sort(numbers), prepend=0, append=1_000_000)
        assert gaps.max() <= 3 * 1_000_000 / places
