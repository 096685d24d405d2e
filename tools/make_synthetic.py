"""A synthetic event log with learnable structure, and the best score that it allows.

    python -m tools.make_synthetic output=DIR events=N users=N items=N [seed=S files=16 ids=int]

Writes `part-NNNNN.parquet` (user_id, item_id, timestamp in seconds), in time order over all files
and interleaved over users, and `best_scores.json`: the parameters, and HR, NDCG and MRR of the
best possible ranking and of popularity for each user's last event. The process: data/synthetic.py.
"""

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from configs.command import command
from data.errors import InputError
from data.output_folder import new_folder
from data.synthetic import CUTOFFS, Block, Process, scores, stream_log
from tools.stages import print_table

BEST_SCORES = "best_scores.json"
SCORED_USERS = 1_000_000  # at most so many users' last events are scored, evenly spread
PROTOCOL = "each user's last event after all others, exact ranking over all items, seen items kept"


@dataclass(frozen=True)
class SyntheticConfig:
    """The options of configs/make_synthetic.yaml, checked."""

    output: Path
    process: Process
    files: int = 16
    ids: str = "int"

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> "SyntheticConfig":
        """From the composed Hydra config."""
        rest = dict(options)
        own = {name: rest.pop(name) for name in ("files", "ids")}
        output = Path(str(rest.pop("output")))
        return cls(output=output, process=Process(**rest), **own)

    def __post_init__(self) -> None:
        process = self.process
        least = {"users": 1, "items": max(CUTOFFS), "successors": 1, "shortest_history": 3}
        for name, minimum in least.items():
            _check_whole(name, getattr(process, name), minimum)
        _check_whole("seed", process.seed, 0)
        _check_whole("files", self.files, 1)
        _check_whole("events", process.events, process.users * process.shortest_history)
        if process.events < self.files:
            raise InputError(f"files={self.files} is more than events={process.events}; lower it")
        if self.ids not in ("int", "string"):
            raise InputError(f"ids={self.ids} is unknown; choose int | string")
        if not 0 <= process.follow_probability <= 1:
            raise InputError(f"follow_probability={process.follow_probability} must lie in [0, 1]")
        for name in ("zipf_exponent", "length_sigma"):
            if not (0 <= getattr(process, name) <= 10):
                raise InputError(f"{name}={getattr(process, name)} must lie in [0, 10]")


def _check_whole(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        why = " (users times shortest_history)" if name == "events" else ""
        raise InputError(f"{name}={value} must be a whole number, {minimum:,} or more{why}")


def make_log(config: SyntheticConfig) -> dict[str, Any]:
    """Write the log and its best scores; returns what `best_scores.json` holds."""
    ours = [BEST_SCORES, *(f"part-{number:05d}.parquet" for number in range(config.files))]
    with new_folder(config.output, ours) as folder:
        record = {"process": asdict(config.process), "ids": config.ids, "protocol": PROTOCOL}
        record |= _write(config, folder)
        text = json.dumps(record, indent=1, sort_keys=True) + "\n"
        (folder / BEST_SCORES).write_text(text)
    return record


def _write(config: SyntheticConfig, folder: Path) -> dict[str, Any]:
    process = config.process
    writer = _Writer(folder, config)
    score = _Score(process)
    with tqdm(total=process.events, unit="event", unit_scale=True, disable=None) as bar:
        for block in stream_log(process):
            writer.write(block)
            score.add(block)
            bar.update(len(block.user_E))
    writer.close()
    return score.result()


class _Writer:
    """The stream cut into files of equal numbers of events."""

    def __init__(self, folder: Path, config: SyntheticConfig) -> None:
        self.folder, self.config, self.written, self.file = folder, config, 0, 0
        kind = pa.string() if config.ids == "string" else pa.int64()
        columns = [("user_id", kind), ("item_id", kind), ("timestamp", pa.int64())]
        self.schema = pa.schema(columns)
        self.writer = self._open()

    def write(self, block: Block) -> None:
        process = self.config.process
        user = _raw_ids(block.user_E, process.users, self.config.ids, "user-")
        item = _raw_ids(block.item_E, process.items, self.config.ids, "item-")
        table = pa.table([user, item, pa.array(block.seconds_E)], schema=self.schema)
        while table.num_rows:
            room = self._end() - self.written
            if room == 0:
                self.writer.close()
                self.file += 1
                self.writer = self._open()
                continue
            self.writer.write_table(table.slice(0, room))
            self.written += min(room, table.num_rows)
            table = table.slice(room)

    def close(self) -> None:
        self.writer.close()

    def _end(self) -> int:
        """The event at which the open file ends."""
        return self.config.process.events * (self.file + 1) // self.config.files

    def _open(self) -> pq.ParquetWriter:
        return pq.ParquetWriter(self.folder / f"part-{self.file:05d}.parquet", self.schema)


def _raw_ids(number_E: np.ndarray, size: int, ids: str, prefix: str) -> pa.Array:
    """Ids whose order says nothing about rank: multiplied by about 0.618 size, modulo size."""
    factor = max(1, int(0.6180339887 * size))
    while math.gcd(factor, size) != 1:
        factor += 1
    raw = pa.array(number_E * factor % size + 1)
    return (
        pc.binary_join_element_wise(prefix, raw.cast(pa.string()), "") if ids == "string" else raw
    )


class _Score:
    """The last events of the scored users, and the counts that popularity ranks by."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.stride = -(-process.users // SCORED_USERS)
        self.count_V = np.zeros(process.items, np.int64)
        self.previous: list[np.ndarray] = []
        self.target: list[np.ndarray] = []

    def add(self, block: Block) -> None:
        left_E = self.process.lengths_U[block.user_E] - block.event_E
        np.add.at(self.count_V, block.item_E[left_E > 2], 1)  # the last two are held out
        last_E = (left_E == 1) & (block.user_E % self.stride == 0)
        self.previous.append(block.previous_E[last_E])
        self.target.append(block.item_E[last_E])

    def result(self) -> dict[str, Any]:
        previous, target = np.concatenate(self.previous), np.concatenate(self.target)
        # Pessimistic: an item as frequent as the target ranks before it.
        rank_N = len(self.count_V) - np.searchsorted(np.sort(self.count_V), self.count_V[target])
        share = np.bincount(rank_N - 1)[: max(CUTOFFS)] / len(target)
        chunk = 65_536
        parts = [previous[at : at + chunk] for at in range(0, len(previous), chunk)]
        weighted = [(self.process.best(part), len(part)) for part in parts]
        best = {
            name: sum(one[name] * size for one, size in weighted) / len(previous)
            for name in weighted[0][0]
        }
        return {"best": best, "popularity": scores(share), "scored_users": len(target)}


@command("make_synthetic")
def main(options: dict[str, Any]) -> None:
    start = time.monotonic()
    config = SyntheticConfig.from_dict(options)
    record = make_log(config)
    process = config.process
    lengths = process.lengths_U
    rows = [
        ("events", f"{process.events:,} in {config.files} file(s)"),
        ("users", f"{process.users:,}"),
        ("items", f"{process.items:,}"),
        (
            "history length",
            f"mean {lengths.mean():.1f}, median {int(np.median(lengths)):,}, "
            f"longest {lengths.max():,}",
        ),
    ]
    for name, label in (("best", "best possible"), ("popularity", "popularity")):
        score = record[name]
        rows.append((label, f"HR@10 {score['hr@10']:.4f}, NDCG@10 {score['ndcg@10']:.4f}"))
    rows.append(("log", f"{config.output} (scores: {BEST_SCORES}; {PROTOCOL})"))
    rows.append(("seconds", f"{time.monotonic() - start:.1f}"))
    print_table(rows)


if __name__ == "__main__":
    main()
