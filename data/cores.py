"""How many cores this process may use, and work for all of them."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Those of its affinity, where the system knows one; a container's quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_all_cores(call: Callable[[T], R], items: Iterable[T], processes: int = 1) -> list[R]:
    """The answers in order, from a thread for each core: for calls that let go of the interpreter.

    processes: of this host that do so at the same time. What a call raises is raised, of several
    the first one in the order of the items.
    """
    with ThreadPoolExecutor(max(1, cores() // processes)) as executor:
        return list(executor.map(call, items))
