"""How many cores this process may use, work for all of them, and how many threads may be asked."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from data.errors import InputError, check_whole

MOST_THREADS = 1024  # some ten thousand of an engine take all of a machine's memory or processes

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Those of its affinity, where the system knows one; a container's quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_threads(threads: Any) -> None:
    """Raise InputError unless option `threads` is a whole number from 1 to MOST_THREADS."""
    check_whole("threads", threads, 1)
    if threads > MOST_THREADS:
        raise InputError(f"threads={threads} is above {MOST_THREADS:,}; give one a core or so")


def on_all_cores(call: Callable[[T], R], items: Iterable[T], processes: int = 1) -> list[R]:
    """The answers in order, from a thread for each core: for calls that let go of the interpreter.

    processes: of this host that do so at the same time. What a call raises is raised, of several
    the first one in the order of the items.
    """
    with ThreadPoolExecutor(max(1, cores() // processes)) as executor:
        return list(executor.map(call, items))
