"""Work on all cores."""

import threading

import pytest

from data.cores import MOST_THREADS, check_threads, cores, on_all_cores
from data.errors import InputError


def test_answers_keep_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr("data.cores.cores", lambda: 3)
    together = threading.Barrier(3, timeout=10)  # broken unless three calls run at once

    def call(item):
        together.wait()
        return 10 * item

    assert on_all_cores(call, range(6)) == [0, 10, 20, 30, 40, 50]
    assert on_all_cores(call, []) == []


def test_the_first_error_in_the_order_of_the_items_is_raised():
    def call(item):
        if item:
            raise ValueError(item)

    with pytest.raises(ValueError, match="1"):
        on_all_cores(call, [0, 1, 2, 3])


@pytest.mark.parametrize("processes", [1, cores(), 1000])
def test_processes_of_a_host_share_its_cores(processes):
    names = set()
    on_all_cores(lambda _: names.add(threading.current_thread().name), range(50), processes)
    assert 1 <= len(names) <= max(1, cores() // processes)


@pytest.mark.parametrize(
    ("threads", "message"),
    [
        (0, "threads=0 must be a whole number, 1 or more"),
        (True, "threads=True must be a whole number"),
        (MOST_THREADS + 1, "threads=1025 is above 1,024; give one a core or so"),
    ],
)
def test_threads_have_a_range(threads, message):
    with pytest.raises(InputError, match=message):
        check_threads(threads)
    check_threads(MOST_THREADS)
