"""Users' states on the disk: what a causal encoder carries forward, one row a user.

    manifest.json             the model that they belong to, counts, sizes and hashes; written last
    states/part-NNNNN.parquet user_id, state, seen, last_items (table rows), last_time, events
    scores/part-NNNNN.parquet `data.schema.score_schema`, of those who moved on, where asked for

`state` is `Bundle.new_states`' F numbers in fp32 or fp16, little-endian, as fixed-size binary:
Parquet reads a list of numbers many times more slowly. `seen` are the distinct items, `last_items`
those of the events at `last_time`, `events` how many moved the state.

Legend: U users of a part, F numbers of a state, N events.
"""

import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from data.bundle import Bundle, all_numbers
from data.conversion import sealed
from data.errors import InputError, reason
from data.reader import concatenated_ranges
from data.schema import MANIFEST, DataFile, damage, is_data_set, write_atomically

STATES_VERSION = 2
STATES, SCORES = "states", "scores"
NUMBERS: dict[str, np.dtype[Any]] = {"fp32": np.dtype("<f4"), "fp16": np.dtype("<f2")}
PART_BYTES = 1 << 27  # of a file's states in fp32
NONE = np.zeros(0, np.int64)
# Of the states moved on at once: near a CPU, and enough to fill a GPU, where it is a whole file.
TOGETHER_BYTES = {"cpu": 1 << 23, "cuda": PART_BYTES}


@dataclass(frozen=True)
class StateManifest:
    """What a folder of states is."""

    fingerprint: str  # of the bundle's files: states of one model mean nothing to another
    numbers: str  # fp32 | fp16
    users: int
    counts: dict[str, int]  # of the run that wrote it
    parts: list[DataFile]
    scores: list[DataFile]
    states_version: int = STATES_VERSION

    def write(self, folder: Path) -> None:
        text = json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"
        write_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path, bundle: Bundle) -> "StateManifest":
        """Raises InputError for a folder that holds no finished states, or another model's."""
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"states={folder} holds no finished states ({MANIFEST} is absent); name a folder "
                "that tools.update_states wrote, or leave states out to start anew"
            )
        try:
            raw = json.loads(path.read_bytes())
            if is_data_set(folder):
                raise InputError(
                    f"states={folder} is a converted data set; name a folder that "
                    "tools.update_states wrote, or leave states out to start anew"
                )
            if raw.get("states_version") != STATES_VERSION:
                raise InputError(
                    f"{path} is not of states version {STATES_VERSION}, which this program reads; "
                    "build the states anew"
                )
            for name in ("parts", "scores"):
                raw[name] = [DataFile(**one) for one in raw[name]]
            manifest = cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}); build the states anew") from error
        for one in manifest.parts:
            if Path(one.path).is_absolute() or ".." in Path(one.path).parts:
                raise InputError(
                    f"{path} names {one.path}, outside its own folder; build the states anew"
                )
        if manifest.fingerprint != bundle.manifest.fingerprint:
            raise InputError(
                f"states={folder} are of another model than bundle {bundle.folder}; name that "
                "model's bundle, or build the states anew from the whole log"
            )
        return manifest


@dataclass
class StatePart:
    """Some users' states in memory. last_time: an Arrow array in the log's own type."""

    user_ids: pa.Array
    state_UF: Tensor
    seen: list[np.ndarray]
    last_items: list[np.ndarray]
    last_time: pa.Array
    events_U: np.ndarray

    @classmethod
    def new(cls, bundle: Bundle, user_ids: pa.Array, time_type: pa.DataType) -> "StatePart":
        """Users without an event."""
        users = len(user_ids)
        return cls(
            user_ids,
            bundle.new_states(users),
            [NONE] * users,
            [NONE] * users,
            pa.nulls(users, time_type),
            np.zeros(users, np.int64),
        )

    @classmethod
    def read(cls, folder: Path, file: DataFile, kind: str) -> "StatePart":
        """kind: of the numbers, as the manifest says.

        Raises InputError, naming the file, where it is not what the manifest says.
        """
        path = folder / file.path
        what = damage(folder, file)
        if what is not None:
            raise InputError(f"{path} {what}; copy the states again")
        try:
            table = pq.read_table(path).combine_chunks()
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be read ({reason(error)}); copy it again") from error
        return cls(
            table["user_id"].combine_chunks(),
            torch.from_numpy(numbers_of(table["state"], kind).astype(np.float32)),
            _arrays(table["seen"].combine_chunks()),
            _arrays(table["last_items"].combine_chunks()),
            table["last_time"].combine_chunks(),
            table["events"].to_numpy().copy(),
        )

    def write(self, folder: Path, number: int, kind: str) -> DataFile:
        """Raises InputError for states beyond the range of fp16."""
        with np.errstate(over="ignore"):
            numbers = np.ascontiguousarray(self.state_UF.numpy(), NUMBERS[kind])
        if not np.isfinite(numbers).all():
            raise InputError(f"a state is beyond the range of {kind}; use numbers=fp32")
        type_of_one = pa.binary(numbers.shape[1] * numbers.itemsize)
        buffers = [None, pa.py_buffer(numbers)]
        columns = {
            "user_id": self.user_ids,
            "state": pa.Array.from_buffers(type_of_one, len(numbers), buffers),
            "seen": _lists(self.seen),
            "last_items": _lists(self.last_items),
            "last_time": self.last_time,
            "events": pa.array(self.events_U),
        }
        path = folder / STATES / f"part-{number:05d}.parquet"
        kinds = {name: "none" if name == "state" else "lz4" for name in columns}
        pq.write_table(
            pa.table(columns), path, compression=kinds, use_dictionary=False, write_statistics=False
        )
        return sealed(folder, path)


def numbers_of(states: pa.ChunkedArray, kind: str) -> np.ndarray:
    """A column `state` as numbers [U, F] of a kind of NUMBERS."""
    state = states.combine_chunks()
    numbers = np.frombuffer(state.buffers()[1], NUMBERS[kind])
    per_user = state.type.byte_width // NUMBERS[kind].itemsize
    return numbers.reshape(-1, per_user)[state.offset : state.offset + len(state)]


def _arrays(lists: pa.ListArray) -> list[np.ndarray]:
    values = lists.flatten().to_numpy().astype(np.int64)
    bounds = np.append(0, np.cumsum(lists.value_lengths().to_numpy()))
    return [values[a:b] for a, b in pairwise(bounds.tolist())]


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    bounds = pa.array(np.cumsum([0, *map(len, arrays)]), pa.int32())
    flat = np.concatenate([NONE, *arrays])
    return pa.ListArray.from_arrays(bounds, pa.array(flat, pa.int32()))


@dataclass(frozen=True)
class NewEvents:
    """Events of a log by user, in time order: user u's are offsets_U1[u] to offsets_U1[u + 1].

    times_N: numbers that order as the log's times. All in memory.
    """

    user_ids: pa.Array
    offsets_U1: np.ndarray
    items_N: np.ndarray
    times: pa.Array
    times_N: np.ndarray

    @classmethod
    def read(cls, folder: Path, files: list[DataFile]) -> "NewEvents":
        """The histories of a grouped log (`data.score_input.group_log`)."""
        columns = ["user_id", "items", "timestamps"]
        tables = [pq.read_table(folder / one.path, columns=columns) for one in files]
        table = pa.concat_tables(tables).combine_chunks()
        items, times = table["items"].combine_chunks(), table["timestamps"].combine_chunks()
        offsets_U1 = np.append(0, np.cumsum(items.value_lengths().to_numpy())).astype(np.int64)
        flat = times.flatten()
        return cls(
            table["user_id"].combine_chunks(),
            offsets_U1,
            items.flatten().to_numpy().astype(np.int64),
            flat,
            _ordered(flat),
        )

    def __len__(self) -> int:
        """Users."""
        return len(self.user_ids)


def _ordered(times: pa.Array) -> np.ndarray:
    if pa.types.is_temporal(times.type):
        times = times.cast(pa.int64())
    return pc.fill_null(times, 0).to_numpy()


def apply(
    bundle: Bundle, part: StatePart, new: NewEvents, theirs: np.ndarray, repeats: str
) -> dict[str, int]:
    """Move the part's users on by their new events, in place; the counts of what happened.

    theirs: int64 [U], each user's place in `new`, -1 for none. repeats: the bundle's rule
    `deduplicate`. Late events (before the user's last) and duplicates (those of the last time that
    are in the state already, and repeats by the rule) are passed over.
    """
    last_U = _ordered(part.last_time)
    known_U = pc.is_valid(part.last_time).to_numpy(zero_copy_only=False)
    taken: list[np.ndarray] = []
    late = duplicate = 0
    for user, place in enumerate(theirs.tolist()):
        events = np.arange(new.offsets_U1[place], new.offsets_U1[place + 1]) if place >= 0 else NONE
        if place >= 0 and known_U[user]:
            in_time = events[new.times_N[events] >= last_U[user]]
            kept = in_time[_is_new(part, user, new, in_time, last_U[user], repeats)]
            late += len(events) - len(in_time)
            duplicate += len(in_time) - len(kept)
            events = kept
        taken.append(events)
    lengths_U = np.array([len(events) for events in taken], np.int64)
    _advance(bundle, part.state_UF, new.items_N, taken, lengths_U)
    _remember(part, new, taken, last_U, known_U)
    part.events_U += lengths_U
    return {
        "users_updated": int((lengths_U > 0).sum()),
        "events_applied": int(lengths_U.sum()),
        "events_late": late,
        "events_duplicate": duplicate,
    }


def _is_new(
    part: StatePart, user: int, new: NewEvents, events: np.ndarray, last: Any, repeats: str
) -> np.ndarray:
    """Which of a user's events, none of them late, are no duplicates: bool."""
    items = new.items_N[events]
    fresh = ~((new.times_N[events] == last) & np.isin(items, part.last_items[user]))
    if repeats == "user_item":
        fresh &= ~np.isin(items, part.seen[user])
    elif repeats == "consecutive" and fresh.any():
        first = int(fresh.argmax())
        fresh[first] = items[first] != part.last_items[user][-1]
    return fresh


def _advance(
    bundle: Bundle,
    state_UF: Tensor,
    items_N: np.ndarray,
    taken: list[np.ndarray],
    lengths_U: np.ndarray,
) -> None:
    """Users of like numbers of events together, event by event."""
    order = np.argsort(-lengths_U, kind="stable")
    order = order[: int((lengths_U > 0).sum())]
    together = max(1, TOGETHER_BYTES[bundle.device.type] // (4 * state_UF.shape[1]))
    for start in range(0, len(order), together):
        users = order[start : start + together]
        places_N, users_E = _event_by_event(lengths_U[users])
        items = items_N[np.concatenate([taken[user] for user in users])[places_N]]
        state_UF[users] = bundle.advance(state_UF[users], torch.from_numpy(items), users_E.tolist())
    if not all_numbers(state_UF.abs()):
        raise InputError(f"bundle {bundle.folder} answers NaN or infinity; export another one")


def _event_by_event(lengths_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Events that lie user after user, in the order first events, second events, …: their places
    [N], and how many users have an e-th event [E]. lengths_U: falling, none 0."""
    event_N = concatenated_ranges(np.zeros_like(lengths_U), lengths_U)
    return np.argsort(event_N, kind="stable"), np.bincount(event_N)


def _remember(
    part: StatePart,
    new: NewEvents,
    taken: list[np.ndarray],
    last_U: np.ndarray,
    known_U: np.ndarray,
) -> None:
    """Seen items, the last time and the items at it."""
    newest_U = np.full(len(taken), -1)
    for user, events in enumerate(taken):
        if not len(events):
            continue
        items, times = new.items_N[events], new.times_N[events]
        part.seen[user] = np.union1d(part.seen[user], items)
        if known_U[user] and last_U[user] == times[-1]:
            part.last_items[user] = np.concatenate([part.last_items[user], items])
        else:
            part.last_items[user] = items[times == times[-1]]
        newest_U[user] = events[-1]
    times = new.times.take(pa.array(np.maximum(newest_U, 0)))
    part.last_time = pc.if_else(pa.array(newest_U >= 0), times, part.last_time)
