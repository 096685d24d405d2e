"""Work ahead of the consumer in one background thread, and reading ahead of the packs.

One thread is enough: it fills packs an order of magnitude faster than a step consumes them, and
worker processes were five times slower on two cores (they copy every batch between processes).
"""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Generic, Self, TypeVar

import numpy as np

from data.reader import Histories, HistoryDataset

T = TypeVar("T")

_POLL_SECONDS = 0.1  # how soon a blocked producer notices that it is to stop


class _End:
    """Put behind the last item: the producer finished, or failed with `error`."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Iterates `items` in a background thread, at most `depth` items ahead.

    What `items` raises is raised where the item would have come. The thread starts with the first
    item asked for and ends with `close` (also called by `with`, and when the process exits).
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        stop = threading.Event()
        self._thread = threading.Thread(
            target=_produce, args=(items, self._queue, stop), name="prefetch", daemon=True
        )
        # A thread inside numpy or torch while the interpreter goes down can crash it.
        self._close = weakref.finalize(self, _stop, self._queue, stop, self._thread)
        self._end: _End | None = None

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if not self._close.alive:
            raise RuntimeError("this iterator was closed")
        if self._end is None:
            if self._thread.ident is None:
                self._thread.start()
            item = self._queue.get()
            if not isinstance(item, _End):
                return item
            self._end = item
        if self._end.error is not None:
            raise self._end.error
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; more than once does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


NOBODY = Histories(*(np.zeros(size, dtype=np.int64) for size in (0, 1, 0, 0)))


class WindowReader:
    """Reads windows of row groups; holds the current window and what is read of the next.

    A data set of one window is read once for all epochs.
    """

    def __init__(self, dataset: HistoryDataset) -> None:
        self._dataset = dataset
        self._groups: tuple[int, ...] | None = None
        self._histories = NOBODY
        self._ahead: dict[int, Histories] = {}

    def load(self, groups: tuple[int, ...]) -> Histories:
        """The histories of a window, from what was read ahead as far as that goes."""
        if groups != self._groups:
            self._histories = NOBODY  # the old window goes before the new one comes
            self.read_ahead(groups, 1.0)
            self._histories = Histories.concatenate([self._ahead[group] for group in groups])
            self._groups = groups
            self._ahead = {}
        return self._histories

    def read_ahead(self, groups: tuple[int, ...], fraction: float) -> None:
        """Have this share of the next window's row groups in memory.

        Called with a growing share while the current window is used up, so that no step waits for
        a whole window.
        """
        if groups == self._groups:
            return
        wanted, belongs = groups[: round(fraction * len(groups))], set(groups)
        self._ahead = {group: one for group, one in self._ahead.items() if group in belongs}
        for group in wanted:
            if group not in self._ahead:
                self._ahead[group] = self._dataset.read(group, user_ids=False)


def _produce(items: Iterator[Any], into: queue.Queue[Any], stop: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if not _put(item, into, stop):
                return
    except BaseException as error:  # the consumer raises it
        end = _End(error)
    _put(end, into, stop)


def _put(item: Any, into: queue.Queue[Any], stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            into.put(item, timeout=_POLL_SECONDS)
            return True
        except queue.Full:
            continue
    return False


def _stop(into: queue.Queue[Any], stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread.ident is not None and thread is not threading.current_thread():
        thread.join()
    while not into.empty():
        into.get_nowait()
