"""What a long command shows while it works: a line a stage, on a terminal with the time left."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

POLL_SECONDS = 0.5


@contextmanager
def stage(name: str, percent: Callable[[], float] | None = None) -> Iterator[None]:
    """Print `name` and its seconds when the block ends; while it runs, `percent` on a terminal."""
    start, done = time.monotonic(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(name, percent, done, start), daemon=True)
    if sys.stdout.isatty():
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watcher.ident is not None:
            watcher.join()
            print("\r\033[K", end="")
    print(f"{name:<24}{time.monotonic() - start:10.1f} s", flush=True)


def _watch(
    name: str, percent: Callable[[], float] | None, done: threading.Event, start: float
) -> None:
    while not done.wait(POLL_SECONDS):
        share = percent() if percent else -1.0
        seconds = time.monotonic() - start
        part = progress(share, seconds)
        print(f"\r\033[K{name:<24}{seconds:10.0f} s {part}", end="", flush=True)


def progress(percent: float, seconds: float) -> str:
    """The percentage after these seconds and the time left; empty where it is not known."""
    if percent < 0:
        return ""
    left = f", {seconds * (100 / percent - 1):,.0f} s left" if percent >= 1 else ""
    return f"{percent:4.0f} %{left}"


def print_table(rows: list[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
