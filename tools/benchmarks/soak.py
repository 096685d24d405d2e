"""Suite `soak`: does a long run stay as it began?

Tokens/s and memory of the trainer's steps, window by window, loader included, on the data of suite
`step`.

A leak, fragmentation or a clock that throttles shows as a drift over the windows.
"""

import os
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import ML1M_ITEMS, ML1M_USERS, write_data_set
from tools.benchmarks.measure import Times
from tools.benchmarks.step import assemble, step_config

PAGE = os.sysconf("SC_PAGE_SIZE")


def run(bench: Bench) -> None:
    tokens = bench.size(16_384, 4_096, 2_560)
    windows, each = bench.size(12, 3, 3), bench.size(1_000, 3, 1)
    with tempfile.TemporaryDirectory(prefix="ssd4rec-benchmark-") as folder, ExitStack() as stack:
        path = write_data_set(Path(folder) / "data", ML1M_USERS, ML1M_ITEMS, seed=1)
        stepper, steps = assemble(bench, step_config(bench.config, path, tokens), stack)
        number, rates, memory = 0, [], []
        for window in range(windows + 1):  # the first warms up
            handled, started = 0, time.perf_counter()
            for _ in range(each):
                step = next(steps)
                stepper.take(step, number)
                handled, number = handled + step.tokens, number + 1
            bench.timer.wait()
            seconds = time.perf_counter() - started
            if window:
                ms = 1e3 * seconds / each
                times = Times(ms, ms, ms, each)
                name = f"steps {number - each:,} to {number:,}"
                row = bench.keep(name, times, work=handled // each, peak=_device_bytes(bench))
                rates.append(row.per_second or 0.0)
                memory.append((_device_bytes(bench) or 0, _host_bytes()))
    half = len(rates) // 2
    drift = sum(rates[-half:]) / sum(rates[:half]) - 1.0
    mib = [[number / 2**20 for number in (one[0], one[-1])] for one in zip(*memory, strict=True)]
    bench.find(
        f"{number - each:,} steps: tokens/s of the second half {drift:+.1%} against the first; "
        f"device memory {mib[0][0]:,.1f} to {mib[0][1]:,.1f} MiB, host {mib[1][0]:,.1f} to "
        f"{mib[1][1]:,.1f} MiB"
    )


def _device_bytes(bench: Bench) -> int | None:
    """What PyTorch holds of the device, free blocks included: fragmentation shows as growth."""
    return torch.cuda.memory_reserved(bench.device) if bench.on_gpu else None


def _host_bytes() -> int:
    """Resident memory of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
