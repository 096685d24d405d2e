"""Suite `checkpoint`: how long a save holds training up, and how long it takes to the disk.

Wall clock, on the disk of the temporary folder. The floor is a copy of the state in memory.
"""

import tempfile
import time
from pathlib import Path

from tools.benchmarks import table as table_suite
from tools.benchmarks.bench import Bench
from tools.benchmarks.measure import Floor, Times
from trainer import checkpoint
from trainer.checkpoint import RunState
from trainer.saver import Saver

TOKENS = 4_096
REPEATS, QUICK_REPEATS = 5, 2


def run(bench: Bench) -> None:
    rows = bench.size(1_000_000, 1_000_000, 50_000)
    optimizer = table_suite.OPTIMIZERS[bench.device.type][0]
    name = f"{rows:,} rows"
    with bench.case(name), tempfile.TemporaryDirectory(prefix="ssd4rec-benchmark-") as folder:
        _measure(bench, name, rows, optimizer, Path(folder))


def _measure(bench: Bench, name: str, rows: int, optimizer: str, folder: Path) -> None:
    sharded = table_suite.sharded_table(bench, rows, optimizer, TOKENS)
    repeats = QUICK_REPEATS if bench.quick else REPEATS
    for asynchronous in (False, True):
        kind = "asynchronous" if asynchronous else "synchronous"
        waits, wholes = [], []
        with Saver(
            folder / kind, sharded, bench.world, RunState(), "", 1, asynchronous, print
        ) as saver:
            for number in range(1, repeats + 2):
                state, started = RunState(step=number), time.perf_counter()
                saver.save(state, {})
                waits.append(1e3 * (time.perf_counter() - started))
                saver.require_written(saver.settle(state))
                wholes.append(1e3 * (time.perf_counter() - started))
        last = checkpoint.list_checkpoints(folder / kind)[-1]
        stored = sum(one.stat().st_size for one in last.iterdir())
        floor = Floor(2 * stored, precision="fp32")
        # The first one makes the folder and the buffers.
        bench.keep(f"{name}, {kind}: training waits", Times.of(waits[1:]), floor=floor)
        bench.keep(f"{name}, {kind}: on the disk", Times.of(wholes[1:]), floor=floor)

    def verify() -> None:
        checkpoint.verify(last, bench.world)

    bench.record(
        f"{name}: verify", verify, floor=Floor(stored, precision="fp32"), gradient_bytes=None
    )
    bench.find(f"{name}: {stored / 2**20:,.0f} MiB on the disk")
