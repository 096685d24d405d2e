"""How fast is each part, beside its floor and its peers?

    python -m tools.benchmark suite=SUITE|[SUITE,…]|all output=FILE.json
                              [device=auto|cpu|cuda] [quick=true] [mamba=false]

Prints a table and writes JSON: medians, spread, floors, the card, versions and the command. On a
CPU the same suites run small. What fails or is not installed is reported with its reason, the rest
goes on, and the exit status is non-zero if anything failed. docs/benchmarks.md says how to read it.
"""

import importlib
import time
from pathlib import Path
from typing import Any

from configs.command import command
from data.errors import InputError
from tools.benchmarks.bench import Bench
from tools.benchmarks.measure import Ceilings, Timer, measure_ceilings
from tools.benchmarks.report import device_name, document, write
from trainer.config import Config
from trainer.distributed import process_group, quiet_libraries

SUITES = (
    *("ssd", "layer", "loss", "table", "data", "step", "state", "checkpoint"),
    *("scoring", "soak", "peers", "kernels"),
)
BUDGET_MS, QUICK_BUDGET_MS = 200.0, 60.0  # of each timing


@command("benchmark")
def main(options: dict[str, Any]) -> None:
    started = time.monotonic()
    suites = chosen(options.pop("suite"))
    output = Path(options.pop("output")).resolve()
    if not output.parent.is_dir():
        raise InputError(f"output={output}: its folder does not exist; make it first")
    device, quick, mamba = (options.pop(name) for name in ("device", "quick", "mamba"))
    config = Config.of(options)
    quiet_libraries()
    with process_group(device) as world:
        timer = Timer(world.device, QUICK_BUDGET_MS if quick else BUDGET_MS)
        bench = Bench(world, config, quick, mamba, timer, measure_ceilings(timer))
        print(describe(device_name(world.device), bench.ceilings))
        try:
            for suite in suites:
                bench.run(suite, lambda one, name=suite: load(name).run(one))  # type: ignore[misc]
        finally:  # interrupted as well: what was measured is worth keeping
            write(output, document(bench, suites, time.monotonic() - started))
    seconds = time.monotonic() - started
    print(f"\n{len(bench.rows)} measurements in {seconds:.0f} s are in {output}")
    for kind, pairs in (("skipped", bench.skipped), ("FAILED", bench.failures)):
        for suite, text in pairs:
            print(f"{kind}: {suite}: {text}")
    if bench.failures:
        raise InputError(f"{len(bench.failures)} case(s) failed; the reasons are above")


def chosen(wanted: str | list[str]) -> list[str]:
    """The suites to run, in the order given. Raises InputError for an unknown one."""
    names = [wanted] if isinstance(wanted, str) else wanted
    unknown = sorted({str(name) for name in names} - {*SUITES, "all"})
    if unknown or not names:
        raise InputError(f"suite={','.join(unknown)} is unknown; it is {'|'.join(SUITES)}|all")
    return list(SUITES) if "all" in names else list(dict.fromkeys(names))


def load(suite: str) -> Any:
    """A suite's module: imported when it runs, so that one that cannot is that suite's failure."""
    return importlib.import_module(f"tools.benchmarks.{suite}")


def describe(device: str, ceilings: Ceilings) -> str:
    rates = ", ".join(
        f"{name} {rate / 1e12:,.2f}" for name, rate in ceilings.flops_per_second.items()
    )
    bandwidth = ceilings.bytes_per_second / 1e9
    return f"{device}: copy {bandwidth:,.0f} GB/s, matrix products {rates} TFLOP/s"


if __name__ == "__main__":
    main()
