"""The figures of a data set, by hand."""

import numpy as np
import pytest

from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS
from data.statistics import bounds, counts_digest, describe, octaves, standard_error
from data.vocabulary import Vocabulary
from tests.data.datasets import write_dataset


def test_octaves_are_bit_lengths():
    values = np.array([0, 1, 2, 3, 4, 7, 8, 1023, 1024, 2**40])
    assert octaves(values).tolist() == [int(one).bit_length() for one in values]
    for value in values.tolist():
        edges = bounds(value.bit_length())
        assert edges["from"] <= value <= edges["to"]


def test_a_small_data_set_by_hand(tmp_path):
    histories = [[8, 8, 8, 9, 10], [8, 9, 11], [8]]  # training: 8 8 8, 8
    folder = write_dataset(tmp_path / "shop", histories)
    found = describe(HistoryDataset(folder), Vocabulary.read(folder))
    assert (found["folder"], found["split"]) == ("shop", "leave_one_out")
    assert (found["users"], found["items"], found["events"]) == (3, 4, 9)
    assert (found["train_events"], found["items_without_training"]) == (4, 3)
    lengths = found["history_length"]
    assert lengths["mean"] == 3.0
    assert [lengths["quantiles"][one] for one in ("0.0", "0.5", "1.0")] == [1, 3, 5]
    by_octave = {(one["from"], one["to"]): one["users"] for one in lengths["users"]}
    assert by_octave == {(0, 0): 0, (1, 1): 1, (2, 3): 1, (4, 7): 1}
    assert found["popularity"] == [[0.25, 1.0], [0.5, 1.0], [1.0, 1.0]]


def test_the_digest_knows_the_split_and_not_the_names():
    counts = np.array([5, 3, 3, 1])
    assert counts_digest(counts) == counts_digest(counts[[2, 0, 3, 1]].astype(np.int32))
    assert counts_digest(counts) != counts_digest(np.array([5, 3, 2, 2]))


def test_standard_error_of_the_mean():
    assert standard_error(np.array([1.0, 3.0])) == pytest.approx(1.0)
    assert standard_error(np.array([1.0])) is None


def test_counts_of_the_whole_vocabulary(tmp_path):
    folder = write_dataset(tmp_path, [[8, 9, 10, 9, 8]] * 2)
    vocabulary = Vocabulary.read(folder)
    found = describe(HistoryDataset(folder), vocabulary)
    assert found["training_counts_sha256"] == counts_digest(vocabulary.counts[RESERVED_ROWS:])
