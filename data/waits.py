"""What a loop waits for: seconds by name, by the clock of the thread that waits."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Waits:
    """`seconds` of each name so far; not for several threads at once."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def of(self, name: str, call: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Call, and count its time."""
        begun = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            self.seconds[name] += time.perf_counter() - begun

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, the time until each is there counted."""
        end = object()
        source = iter(items)
        while (item := self.of(name, next, source, end)) is not end:
            yield item  # type: ignore[misc]
