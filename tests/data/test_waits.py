"""Seconds of waiting: of calls, of items, and of what raises."""

import time

import pytest

from data.waits import Waits


def test_calls_and_items_are_timed_by_name():
    waits = Waits()
    assert waits.of("sleep", lambda seconds, more: seconds + more, 1, more=2) == 3
    waits.of("sleep", time.sleep, 0.05)

    def slow():
        for item in (1, 2):
            time.sleep(0.03)
            yield item

    found = []
    for item in waits.each("items", slow()):
        time.sleep(0.05)  # which is the consumer's own
        found.append(item)
    assert found == [1, 2]
    assert 0.05 <= waits.seconds["sleep"] < 0.3
    assert 0.06 <= waits.seconds["items"] < 0.3
    assert list(waits.seconds) == ["sleep", "items"]


def test_what_is_raised_is_timed_and_raised():
    waits = Waits()

    def fails():
        time.sleep(0.02)
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        waits.of("failing", fails)
    assert waits.seconds["failing"] >= 0.02
