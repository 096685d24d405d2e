"""What the tests of the converter share: random logs, one-line conversions, comparisons."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from data.log_query import LogRules
from data.schema import HISTORIES, VOCABULARY
from tests.tools.reference_conversion import Event
from tools.convert_config import ConvertConfig
from tools.convert_logs import Conversion, convert

ROOT = Path(__file__).parents[2]
LEAVE_ONE_OUT = {"kind": "leave_one_out"}


def run(log: Any, output: Path, split: dict[str, Any] | None = None, **more: Any) -> Conversion:
    rules = {name: more.pop(name) for name in list(more) if name in LogRules.__annotations__}
    options = {"min_user_events": 1, "min_item_events": 1} | more
    inputs = [str(one) for one in log] if isinstance(log, list) else str(log)
    return convert(
        ConvertConfig(inputs, output, LogRules(**rules), split or LEAVE_ONE_OUT, **options)
    )


def write(path: Path, events: list[Event], **extra: list[Any]) -> Path:
    columns = {
        "user_id": [event["user"] for event in events],
        "item_id": [event["item"] for event in events],
        "timestamp": [event["time"] for event in events],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns | extra), path)
    return path


def some_events(seed: int, count: int, kind: type = int, times: int = 30) -> list[Event]:
    """A random log with many ties, repeats, rare users and rare items."""
    draw = random.Random(seed)
    events = []
    for seq in range(count):
        user, item = int(draw.paretovariate(0.6)) % 40, int(draw.paretovariate(0.5)) % 60
        if kind is str:
            user, item = f"u{user}ü", f"i{item}"
        events.append({"user": user, "item": item, "time": draw.randrange(times), "seq": seq})
    return events


def histories(folder: Path) -> pa.Table:
    return pa.concat_tables(
        [pq.read_table(path) for path in sorted((folder / HISTORIES).iterdir())]
    )


def check(folder: Path, expected: dict[str, Any]) -> None:
    table = histories(folder)
    found = {
        row["user_id"]: (row["items"], row["timestamps"], row["n_train"], row["n_validation"])
        for row in table.to_pylist()
    }
    assert len(found) == table.num_rows
    assert found == expected["users"]
    vocabulary = pq.read_table(folder / VOCABULARY).to_pylist()
    assert [(row["item_id"], row["count"]) for row in vocabulary] == expected["vocabulary"]
    assert [row["item"] for row in vocabulary] == list(range(8, 8 + len(vocabulary)))


def digest(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def as_events(pairs: list[tuple[int, int]]) -> list[Event]:
    return [
        {"user": user, "item": item, "time": seq, "seq": seq}
        for seq, (user, item) in enumerate(pairs)
    ]
