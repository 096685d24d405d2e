"""Ends a rank that makes no progress: a job that hangs costs as much as one that runs.

Collectives tie the ranks together, so when one hangs all report, each with its own stack: the one
that waits for no other is the culprit. torchrun then ends or restarts the job.
"""

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

T = TypeVar("T")

STALLED = 75  # the exit status, sysexits' "temporary failure"
_POLL_SHARE = 0.05  # of the bound, between two looks


class Watchdog:
    """Watches from `with` to its end that `beat` is called at least every `seconds`; 0 is never.

    Looks from a thread. Should that be shut out, because a call neither returns nor releases
    Python's lock, the interpreter's own timer does the same without the sentence.
    """

    def __init__(self, seconds: float, rank: int) -> None:
        self._seconds, self._rank = seconds, rank
        self._last, self._doing = time.monotonic(), "starting"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str) -> None:
        """Progress was made; `doing` says in a report what came next."""
        self._last, self._doing = time.monotonic(), doing

    def over(self, items: Iterable[T], doing: str) -> Iterator[T]:
        """The items, each a beat."""
        for item in items:
            self.beat(doing)
            yield item

    def __enter__(self) -> Self:
        if self._seconds:
            self.beat(self._doing)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        poll = self._seconds * _POLL_SHARE
        while not self._over.wait(poll):
            faulthandler.dump_traceback_later(self._seconds + 2 * poll, exit=True)
            if time.monotonic() - self._last > self._seconds:
                print(
                    f"error: rank {self._rank} on {socket.gethostname()} has made no progress for "
                    f"{self._seconds:g} s (trainer.stall_seconds) while {self._doing}; the job "
                    "ends here and goes on from its newest checkpoint when started again. Stacks:",
                    file=sys.stderr,
                    flush=True,
                )
                _dump_stacks()
                os._exit(STALLED)


def _dump_stacks() -> None:
    """All threads' stacks to stderr in one piece: ranks that hang together write there at once."""
    try:
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            os.write(sys.stderr.fileno(), file.read())
    except OSError:  # no room for the file
        faulthandler.dump_traceback(all_threads=True)
