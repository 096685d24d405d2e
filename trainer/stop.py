"""Stopping on request: SIGTERM (a scheduler that wants the machine back) and Ctrl-C.

The first signal asks; the ranks agree at the next log line, save, and exit. One that comes later
ends the process at once, as it would have without us.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO_SECONDS = 3.0  # torchrun passes on a signal that the terminal or scheduler sent to all


class StopRequest:
    """Whether this process was asked to stop: the signal's number, 0 without."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0

    def _ask(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def signal_name(number: int) -> str:
    return signal.Signals(number).name


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Until the block ends, signals set the request instead of ending the process."""
    request = StopRequest()
    before = {one: signal.signal(one, request._ask) for one in SIGNALS}
    try:
        yield request
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
