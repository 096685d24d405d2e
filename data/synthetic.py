"""A synthetic event log whose best possible score is known.

The process, for each user: the first item is a Zipf draw. Every next item is, with probability p,
one of the M successors of the current item (successor j with probability ∝ 1/(j + 1)), else a
Zipf draw. The successors are a fixed pseudo-random function of the item, themselves Zipf draws,
so the whole log is Zipf-like and no table is kept. Items are numbered by Zipf rank here.

Every number is a hash of (seed, purpose, user, event), so the log does not depend on how it is
cut into blocks or files. Memory: about 50 bytes a user and 8 an item, and one block.

Legend: U users, V items, E events of a block, N some of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

BLOCK_EVENTS = 1 << 20
CUTOFFS = (10, 20)
START_SECONDS = 1_700_000_000  # the log's first second (Unix time), and how long it lasts
SPAN_SECONDS = 180 * 86_400
_LENGTH, _LENGTH_2, _DURATION, _ARRIVAL, _JITTER, _FOLLOW, _WHICH, _SUCCESSOR, _DRAW = range(9)


@dataclass(frozen=True)
class Process:
    """The parameters; see the module for what they mean."""

    events: int
    users: int
    items: int
    seed: int
    follow_probability: float = 0.8
    successors: int = 4
    zipf_exponent: float = 0.8
    length_sigma: float = 1.0  # of the lognormal part of the lengths
    shortest_history: int = 5

    @cached_property
    def lengths_U(self) -> np.ndarray:
        """Events of each user: lognormal above the shortest, summing to `events` exactly."""
        user_U = np.arange(self.users, dtype=np.uint64)
        radius_U = np.sqrt(-2 * np.log1p(-self.uniform(_LENGTH, user_U)))
        normal_U = radius_U * np.cos(2 * np.pi * self.uniform(_LENGTH_2, user_U))
        total_U = np.cumsum(np.exp(self.length_sigma * normal_U))
        spare = self.events - self.shortest_history * self.users
        edges_U = np.floor(total_U * (spare / total_U[-1])).astype(np.int64)
        edges_U[-1] = spare
        return np.diff(edges_U, prepend=0) + self.shortest_history

    @cached_property
    def successor_weights_M(self) -> np.ndarray:
        weights_M = 1 / np.arange(1, self.successors + 1)
        return weights_M / weights_M.sum()

    def uniform(self, purpose: int, first: np.ndarray, second: np.ndarray | int = 0) -> np.ndarray:
        """Numbers in [0, 1), a hash of the seed, the purpose and the two arguments."""
        key = np.uint64((self.seed * 1_000_003 + purpose + 1) * 0x9E3779B97F4A7C15 % 2**64)
        hashed = _mix(first.astype(np.uint64) + key)
        hashed = _mix(hashed + np.asarray(second).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))
        return (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def zipf(self, uniform_N: np.ndarray) -> np.ndarray:
        """Item ranks 0 … V - 1, by inverting the cumulative distribution."""
        power = 1 - self.zipf_exponent
        if abs(power) < 1e-9:
            edge_N = np.exp(uniform_N * np.log(self.items + 1))
        else:
            edge_N = (1 + uniform_N * ((self.items + 1) ** power - 1)) ** (1 / power)
        return np.clip(edge_N.astype(np.int64) - 1, 0, self.items - 1)

    def zipf_probability(self, rank_N: np.ndarray) -> np.ndarray:
        """The probability of each rank under `zipf`."""
        return self._cumulative(rank_N + 2.0) - self._cumulative(rank_N + 1.0)

    def successor(self, item_N: np.ndarray, which_N: np.ndarray) -> np.ndarray:
        """Successor number `which_N` of each item."""
        return self.zipf(self.uniform(_SUCCESSOR, item_N, which_N))

    def step(self, previous_N: np.ndarray, user_N: np.ndarray, event_N: np.ndarray) -> np.ndarray:
        """Event number `event_N` of each user, after the item `previous_N` (-1: none)."""
        cumulative_M = np.cumsum(self.successor_weights_M)[:-1]
        which_N = np.searchsorted(cumulative_M, self.uniform(_WHICH, user_N, event_N), "right")
        follows_N = self.uniform(_FOLLOW, user_N, event_N) < self.follow_probability
        return np.where(
            follows_N & (previous_N >= 0),
            self.successor(np.maximum(previous_N, 0), which_N),
            self.zipf(self.uniform(_DRAW, user_N, event_N)),
        )

    def best(self, item_N: np.ndarray) -> dict[str, float]:
        """Expected scores of the best ranking after each of `item_N`, averaged; unfiltered.

        The next item's distribution is known, and the best ranking sorts by it. Beyond the
        successors, only the most popular ranks can be among the first.
        """
        which_M = np.arange(self.successors)
        successor_NM = self.successor(item_N[:, None], which_M[None, :])
        popular_NK = np.broadcast_to(np.arange(max(CUTOFFS)), (len(item_N), max(CUTOFFS)))
        candidate_NC = np.concatenate([successor_NM, popular_NK], axis=1)
        hits_NCM = candidate_NC[:, :, None] == successor_NM[:, None, :]
        follow_NC = self.follow_probability * (hits_NCM @ self.successor_weights_M)
        draw_NC = (1 - self.follow_probability) * self.zipf_probability(candidate_NC)
        probability_NC = follow_NC + draw_NC
        for place in range(1, candidate_NC.shape[1]):
            same_N = (candidate_NC[:, :place] == candidate_NC[:, place, None]).any(axis=1)
            probability_NC[same_N, place] = 0  # counted where it stands first
        return scores(-np.sort(-probability_NC, axis=1).mean(axis=0))

    def _cumulative(self, edge_N: np.ndarray) -> np.ndarray:
        power = 1 - self.zipf_exponent
        if abs(power) < 1e-9:
            return np.log(edge_N) / np.log(self.items + 1)
        return (edge_N**power - 1) / ((self.items + 1) ** power - 1)


def scores(share_by_rank: np.ndarray) -> dict[str, float]:
    """HR, NDCG and MRR from the share of targets found at rank 0, 1, …"""
    found = {}
    for cutoff in CUTOFFS:
        share = share_by_rank[:cutoff]
        rank = np.arange(len(share))
        found[f"hr@{cutoff}"] = float(share.sum())
        found[f"ndcg@{cutoff}"] = float((share / np.log2(rank + 2)).sum())
        found[f"mrr@{cutoff}"] = float((share / (rank + 1)).sum())
    return found


@dataclass(frozen=True)
class Block:
    """Events in time order. `event_E` counts within the user; `previous_E` is -1 for the first."""

    user_E: np.ndarray
    event_E: np.ndarray
    item_E: np.ndarray
    previous_E: np.ndarray
    seconds_E: np.ndarray


def stream_log(process: Process) -> Iterator[Block]:
    """All events in time order, in blocks of about BLOCK_EVENTS.

    A user is active for a part of the span: event k of n happens somewhere in the k-th of n equal
    parts of it. So the events of any window of time are known without what came before.
    """
    length_U = process.lengths_U
    user_U = np.arange(process.users, dtype=np.int64)
    duration_U = 0.05 + 0.95 * process.uniform(_DURATION, user_U) ** 2
    arrival_U = process.uniform(_ARRIVAL, user_U) * (1 - duration_U)
    last_item_U = np.full(process.users, -1, np.int64)
    done_U = np.zeros(process.users, np.int64)
    windows = -(-process.events // BLOCK_EVENTS)
    for window in range(1, windows + 1):
        if window == windows:
            until_U = length_U
        else:
            place_U = (window / windows - arrival_U) * length_U / duration_U
            whole_U = np.clip(np.floor(place_U), 0, length_U).astype(np.int64)
            passed_U = process.uniform(_JITTER, user_U, whole_U) < place_U - whole_U
            until_U = np.maximum(np.minimum(whole_U + passed_U, length_U), done_U)
        active_A = np.flatnonzero(until_U > done_U)
        if not len(active_A):
            continue
        count_A = (until_U - done_U)[active_A]
        user_E = np.repeat(active_A, count_A)
        start_A = np.cumsum(count_A) - count_A
        event_E = np.arange(len(user_E)) - np.repeat(start_A - done_U[active_A], count_A)
        item_E, previous_E = _walk(process, active_A, count_A, start_A, event_E, last_item_U)
        part_E = (event_E + process.uniform(_JITTER, user_E, event_E)) / length_U[user_E]
        time_E = arrival_U[user_E] + duration_U[user_E] * part_E
        order_E = np.argsort(time_E, kind="stable")
        seconds_E = START_SECONDS + (time_E * SPAN_SECONDS).astype(np.int64)
        columns = (user_E, event_E, item_E, previous_E, seconds_E)
        yield Block(*(column[order_E] for column in columns))
        done_U = until_U


def _walk(
    process: Process,
    active_A: np.ndarray,
    count_A: np.ndarray,
    start_A: np.ndarray,
    event_E: np.ndarray,
    last_item_U: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Items of a window's events and the items before them; advances `last_item_U`.

    Round r takes the r-th event of every user who has one: most events first, so that the users
    of a round are a prefix.
    """
    item_E, previous_E = np.empty_like(event_E), np.empty_like(event_E)
    order_A = np.argsort(-count_A, kind="stable")
    user_A, first_A, ascending_A = active_A[order_A], start_A[order_A], -count_A[order_A]
    for turn in range(-ascending_A[0]):
        users = int(np.searchsorted(ascending_A, -turn, side="left"))
        user_N, place_N = user_A[:users], first_A[:users] + turn
        previous_E[place_N] = last_item_U[user_N]
        item_E[place_N] = process.step(last_item_U[user_N], user_N, event_E[place_N])
        last_item_U[user_N] = item_E[place_N]
    return item_E, previous_E


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
