"""How the training step scales over the GPUs of this host.

    python -m tools.measure_scaling output=FILE.json [ranks=[1,2] cases=[full-1m] device=auto]

One launch of torchrun a number of ranks. Prints weak and strong scaling and where rank 0's time
goes, and writes the same as JSON, which keeps what was measured when a launch fails.
docs/scaling.md says what is measured.
"""

# ruff: noqa: E402
from configs.environment import check_versions, versions

check_versions()  # a mismatch would break the imports below

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from configs.command import command
from data.errors import InputError, check_whole
from tools.benchmarks.report import write
from tools.benchmarks.scaling import chosen, write_case
from trainer.config import Config


@command("measure_scaling")
def main(options: dict[str, Any]) -> None:
    output = Path(options.pop("output")).resolve()
    if not output.parent.is_dir():
        raise InputError(f"output={output}: its folder does not exist; make it first")
    seconds = options.pop("launch_seconds")
    check_whole("launch_seconds", seconds, 1)
    device, ranks, names = (options.pop(name) for name in ("device", "ranks", "cases"))
    Config.of(options)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = numbers_of_ranks(ranks, device)
    cases = chosen(names, device)
    call = " ".join(["python -m tools.measure_scaling", *sys.argv[1:]])
    content = {"command": call, "versions": versions(), "rows": [], "skipped": [], "failures": []}
    write(output, content)
    with tempfile.TemporaryDirectory(prefix="ssd4rec-scaling-") as folder:
        for case in cases:
            write_case(case, Path(folder))
        failures = [launch(number, output, device, folder, seconds) for number in counts]
    content = json.loads(output.read_bytes())
    content["failures"] = [one for one in failures if one]
    write(output, content)
    print("\n".join(table(content["rows"])))
    for one in content["skipped"]:
        print(f"skipped: {one['case']} on {one['ranks']}: {one['reason']}")
    if content["failures"]:
        raise InputError("; ".join(content["failures"]))


def numbers_of_ranks(ranks: list[int] | None, device: str) -> list[int]:
    """The launches to make, ascending. Raises InputError for more ranks than GPUs."""
    most = torch.cuda.device_count() if device == "cuda" else 2
    if ranks is None:
        return [2**power for power in range(most.bit_length())]
    for one in ranks:
        check_whole("ranks", one, 1)
    if device == "cuda" and max(ranks, default=0) > most:
        raise InputError(f"ranks={ranks}, but this host has {most} GPUs")
    return sorted(set(ranks))


def launch(ranks: int, output: Path, device: str, folder: str, seconds: int) -> str | None:
    """Measure with so many ranks, which write to `output`; why it failed, or None."""
    print(f"\n{ranks} {'rank' if ranks == 1 else 'ranks'}", flush=True)
    given = [one for one in sys.argv[1:] if not one.startswith(("output=", "device="))]
    program = ["-m", "tools.benchmarks.scaling", *given]
    options = [f'output="{output}"', f"device={device}", f'data.path="{folder}"']
    process = subprocess.Popen(
        [
            *[sys.executable, "-m", "torch.distributed.run", "--standalone"],
            *[f"--nproc_per_node={ranks}", *program, *options],
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"{ranks} ranks took longer than launch_seconds={seconds}"
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun ends its ranks
            process.wait()
    return f"{ranks} ranks ended with status {status}; the reason is above" if status else None


def efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Tokens/s a rank, as a share of one rank's; None where one rank was not measured."""
    for one in rows:
        if (one["case"], one["scaling"], one["ranks"]) == (row["case"], row["scaling"], 1):
            each: float = row["tokens_per_second"] / row["ranks"]
            return each / one["tokens_per_second"]
    return None


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Two tables for the terminal: speed and memory, and the parts of rank 0's step."""
    rows = sorted(rows, key=lambda one: (one["case"], one["scaling"] != "weak", one["ranks"]))
    lines = [
        "",
        f"{'case':<14}{'scaling':<8}{'ranks':>5}{'tokens a rank':>15}{'ms':>10}{'M tokens/s':>12}"
        f"{'efficiency':>12}{'GiB a rank':>12}",
    ]
    for one in rows:
        share = efficiency(one, rows)
        of_one = "no 1 rank" if share is None else f"{share:.1%}"
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**30:.1f}"
        lines.append(
            f"{_head(one)}{one['tokens_a_rank']:>15,}{one['times']['median_ms']:>10.2f}"
            f"{one['tokens_per_second'] / 1e6:>12.3f}{of_one:>12}{memory:>12}"
        )
    parts = list(dict.fromkeys(part for one in rows for part in one["parts"]))
    lines += ["", f"{'ms on rank 0':<27}" + "".join(f"{one:>12}" for one in parts)]
    for one in rows:
        lines.append(_head(one) + "".join(f"{one['parts'][part]:>12.2f}" for part in parts))
    return lines


def _head(row: dict[str, Any]) -> str:
    return f"{row['case']:<14}{row['scaling']:<8}{row['ranks']:>5}"


if __name__ == "__main__":
    main()
