"""The conversion written a second time, slowly, from the documentation alone."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

Event = dict[str, Any]  # user, item, time, seq
RESERVED = 8


def reference(
    events: list[Event],
    min_user: int,
    min_item: int,
    deduplicate: str = "none",
    bounds: tuple[Any, Any] | None = None,
    known: Sequence[Any] = (),
) -> dict[str, Any]:
    """`users` {user: (items, times, n_train, n_validation)} and `vocabulary` [(item, count)].

    The `known` items come first, in their order.
    """
    events = _distinct(sorted(events, key=lambda e: (e["time"], e["seq"])), deduplicate)
    events = _core(events, min_user, min_item, bounds)
    frequency: Counter[Any] = Counter()
    for event in events:
        frequency[event["item"]] += _trains(event, bounds)
    new = [item for item in frequency if item not in known]
    order = [*known, *_spread(sorted(new, key=lambda item: (-frequency[item], item)))]
    row = {item: RESERVED + place for place, item in enumerate(order)}
    users, counts = {}, Counter()
    for user in {event["user"] for event in events}:
        own = [event for event in events if event["user"] == user]
        if bounds is None:
            n_train, n_validation = (len(own), 0) if len(own) < 3 else (len(own) - 2, 1)
        else:
            n_train = sum(event["time"] < bounds[0] for event in own)
            n_validation = sum(bounds[0] <= event["time"] < bounds[1] for event in own)
        counts.update(event["item"] for event in own[:n_train])
        items, times = [row[event["item"]] for event in own], [event["time"] for event in own]
        users[user] = (items, times, n_train, n_validation)
    return {"users": users, "vocabulary": [(item, counts[item]) for item in order]}


def _spread(items: list[Any]) -> list[Any]:
    """Place i of n goes to i s mod n, s without common factor with n and the nearest such to n over
    the golden ratio, the larger of two equally near."""
    n = len(items)
    nearest = max(1, round(n * (5**0.5 - 1) / 2))
    by_distance = sorted(range(1, n + 1), key=lambda s: (abs(s - nearest), -s))
    step = next((s for s in by_distance if math.gcd(s, n) == 1), 1)
    placed: list[Any] = [None] * n
    for i, item in enumerate(items):
        placed[i * step % n] = item
    return placed


def _trains(event: Event, bounds: tuple[Any, Any] | None) -> bool:
    return bounds is None or event["time"] < bounds[0]


def _distinct(events: list[Event], deduplicate: str) -> list[Event]:
    kept, last, seen = [], {}, set()
    for event in events:
        user, item = event["user"], event["item"]
        repeat = {
            "none": False,
            "consecutive": last.get(user) == item,
            "user_item": (user, item) in seen,
        }[deduplicate]
        if not repeat:
            kept.append(event)
        last[user] = item
        seen.add((user, item))
    return kept


def _core(
    events: list[Event], min_user: int, min_item: int, bounds: tuple[Any, Any] | None
) -> list[Event]:
    train = [event for event in events if _trains(event, bounds)]
    judged = {(key, event[key]) for event in train for key in ("user", "item")}
    while True:
        count = Counter((key, event[key]) for event in train for key in ("user", "item"))
        kept = [
            event
            for event in train
            if count["user", event["user"]] >= min_user and count["item", event["item"]] >= min_item
        ]
        if len(kept) == len(train):
            break
        train = kept
    core = {(key, event[key]) for event in train for key in ("user", "item")}
    gone = judged - core  # what never trained was never judged, and stays
    return [
        event
        for event in events
        if ("user", event["user"]) not in gone and ("item", event["item"]) not in gone
    ]
