"""Batches of histories for scoring, the order of their answers, and writing behind."""

import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from data.item_filter import ItemFilter
from data.reader import HistoryDataset
from data.score_output import WriteBehind
from data.scoring import batches, score_batches, units_of
from tests.data.datasets import random_histories, write_dataset


@pytest.fixture
def dataset(tmp_path):
    histories = random_histories(40, 30, 50, seed=3)
    return HistoryDataset(write_dataset(tmp_path, histories, row_group_users=15)), histories


@pytest.mark.parametrize("upto", ["all", "train"])
def test_batches_hold_the_histories_in_order(dataset, upto):
    dataset, histories = dataset
    units = units_of(dataset, 7)
    found = []
    for batch in batches(dataset, units, upto, ItemFilter(), batch_tokens=48):
        bounds = batch.offsets_B1.tolist()
        assert len(batch.items_T) <= max(48, max(map(len, histories)))
        for start, stop in pairwise(bounds):
            found.append(batch.items_T[start:stop].tolist())
    left = 2 if upto == "train" else 0
    shown = [one[: max(len(one) - left, 0)] for one in histories]
    assert found == [one for one in shown if one]


def test_answers_come_a_unit_at_a_time_with_some_batches_in_flight(dataset):
    dataset, _ = dataset
    units = units_of(dataset, 7)
    work = list(batches(dataset, units, "all", ItemFilter(), batch_tokens=48))
    log = []

    def launch(batch):
        number = len([one for one in log if one[0] == "launch"])
        log.append(("launch", number))

        def wait():
            log.append(("wait", number))
            return torch.full([len(batch), 2], number), torch.zeros(len(batch), 2)

        return wait

    scores = list(score_batches(work, launch, in_flight=2))
    assert [one.users.unit for one in scores] == units
    numbers = [int(rows[0, 0]) for one in scores for rows, _ in one.answers]
    assert numbers == list(range(len(work)))
    flying = np.cumsum([1 if what == "launch" else -1 for what, _ in log])
    assert flying.max() == 3
    assert flying[-1] == 0


def test_writing_behind_is_bounded_and_says_what_failed():
    gate, done = threading.Event(), []

    def job():
        gate.wait()
        done.append(1)

    with WriteBehind(1) as writers:
        writers.submit(job)
        writers.submit(job)
        third = threading.Thread(target=writers.submit, args=(job,))
        third.start()
        third.join(0.2)
        assert third.is_alive()  # the one before has to end first
        gate.set()
        third.join(10)
        assert not third.is_alive()
    assert len(done) == 3

    def fails():
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"), WriteBehind(2) as writers:
        writers.submit(fails)
