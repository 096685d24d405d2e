"""The rows of a benchmark on the terminal, and the whole of it as JSON."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from configs.environment import versions
from data.schema import write_atomically

if TYPE_CHECKING:
    from tools.benchmarks.bench import Bench, Row

NAME_COLUMNS = 48
HEADER = (
    f"{'':<{NAME_COLUMNS}}{'ms':>10}{'±':>5}{'per second':>14}{'floor ms':>10}{'x':>6}{'MiB':>7}"
)


def print_row(row: "Row") -> None:
    """One line of at most 100 characters; a peer is indented, with its name behind."""
    name = row.name
    if row.by != "ours":
        room = NAME_COLUMNS - len(row.by) - 5
        name = f"  {row.name[:room]} [{row.by}]"
    spread = f"{50 * (row.high_ms - row.low_ms) / row.median_ms:.0f}%" if row.repeats > 1 else ""
    speed = _quantity(row.per_second, row.unit) if row.per_second is not None else ""
    floor = f"{row.floor_ms:.3f}" if row.floor_ms is not None else ""
    ratio = ""
    if row.times_floor is not None:
        ratio = f"{row.times_floor:.1f}" if row.times_floor < 1_000 else f"{row.times_floor:.0f}"
    memory = f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes is not None else ""
    print(
        f"{name:<{NAME_COLUMNS}.{NAME_COLUMNS}}{row.median_ms:>10.3f}{spread:>5}"
        f"{speed:>14}{floor:>10}{ratio:>6}{memory:>7}",
        flush=True,
    )


def _quantity(value: float, unit: str) -> str:
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.1f} {unit}"


def device_name(device: torch.device) -> str:
    """The card, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def document(bench: "Bench", suites: list[str], seconds: float) -> dict[str, Any]:
    """Everything that a figure needs beside it."""
    found = versions() | {"cuda": torch.version.cuda or "none"}
    return {
        "command": " ".join(["python -m tools.benchmark", *sys.argv[1:]]),
        "suites": suites,
        "quick": bench.quick,
        "device": device_name(bench.device),
        "versions": found,
        "seconds": seconds,
        "ceilings": asdict(bench.ceilings),
        "rows": [
            asdict(row) | {"per_second": row.per_second, "times_floor": row.times_floor}
            for row in bench.rows
        ],
        "findings": _texts(bench.findings),
        "skipped": _texts(bench.skipped),
        "failures": _texts(bench.failures),
    }


def write(output: Path, content: dict[str, Any]) -> None:
    write_atomically(output, (json.dumps(content, indent=1) + "\n").encode())


def _texts(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"suite": suite, "text": text} for suite, text in pairs]
