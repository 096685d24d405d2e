"""`Bench`: what a suite gets to measure with, and where its results go."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from modules.products import DTYPES
from tools.benchmarks.measure import Ceilings, Floor, Timer, Times, peak_bytes, release
from tools.benchmarks.report import HEADER, print_row
from trainer.config import Config, ModelConfig
from trainer.graphs import captured
from trainer.world import World


class UnavailableError(Exception):
    """A peer that is not installed here, or does not fit this device: reported, no failure."""


@dataclass(frozen=True)
class Row:
    """One measurement. `by` is who did it: "ours" or a peer's name.

    work: what one call handles, in `unit`. peak_bytes: beyond inputs and gradients; None on the
    CPU. floor_ms: None where no floor is known.
    """

    suite: str
    name: str
    by: str
    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int
    work: int | None
    unit: str
    floor_ms: float | None
    floor_bytes: float | None
    floor_flops: float | None
    peak_bytes: int | None

    @property
    def per_second(self) -> float | None:
        return None if self.work is None else 1e3 * self.work / self.median_ms

    @property
    def times_floor(self) -> float | None:
        return self.median_ms / self.floor_ms if self.floor_ms else None


@dataclass
class Bench:
    """One run of the benchmark. `config` is the training config that suites start from."""

    world: World
    config: Config
    quick: bool
    mamba: bool
    timer: Timer
    ceilings: Ceilings
    suite: str = ""
    rows: list[Row] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def precision(self) -> str:
        """What `trainer.precision` stands for here."""
        wanted = self.config.trainer.precision
        if wanted == "auto":
            return "bf16" if self.on_gpu else "fp32"
        return wanted

    def size(self, gpu: int, cpu: int, quick_cpu: int) -> int:
        """A size by device: the CPU runs the same suites small."""
        if self.on_gpu:
            return gpu
        return quick_cpu if self.quick else cpu

    def model(self, **changes: Any) -> ModelConfig:
        """The config's model with some fields changed."""
        return replace(self.config.model, **changes)

    def autocast(self, precision: str | None = None) -> torch.autocast:
        kind = DTYPES[precision or self.precision]
        enabled = kind != torch.float32
        return torch.autocast(
            self.device.type, dtype=kind if enabled else torch.bfloat16, enabled=enabled
        )

    def graphed(self, call: Callable[[], object], wanted: bool) -> Callable[[], object]:
        """`call` as the replay of a CUDA graph, as the trainer runs it; on the CPU `call` itself.

        Launching many small kernels one by one can cost more than running them.
        """
        if not (wanted and self.on_gpu):
            return call
        return captured(call)

    def record(
        self,
        name: str,
        call: Callable[[], object],
        *,
        by: str = "ours",
        work: int | None = None,
        unit: str = "tok",
        floor: Floor | None = None,
        gradient_bytes: int | None = 0,
        graph: bool = False,
    ) -> Row:
        """Time `call`, print the row and keep it.

        gradient_bytes: not counted as peak memory; None for a call whose peak says nothing.
        graph: time what `graphed` makes of it.
        """
        times = self.timer(self.graphed(call, graph))
        peak = None if gradient_bytes is None else peak_bytes(call, self.device)
        if peak is not None:
            peak = max(0, peak - (gradient_bytes or 0))
        return self.keep(name, times, by=by, work=work, unit=unit, floor=floor, peak=peak)

    def keep(
        self,
        name: str,
        times: Times,
        *,
        by: str = "ours",
        work: int | None = None,
        unit: str = "tok",
        floor: Floor | None = None,
        peak: int | None = None,
    ) -> Row:
        """Print and keep what was timed elsewhere."""
        row = Row(
            self.suite,
            name,
            by,
            times.median_ms,
            times.low_ms,
            times.high_ms,
            times.repeats,
            work,
            unit,
            floor.milliseconds(self.ceilings) if floor else None,
            floor.bytes if floor else None,
            floor.flops if floor else None,
            peak,
        )
        self.rows.append(row)
        print_row(row)
        return row

    def find(self, text: str) -> None:
        """A result that is no timing."""
        self.findings.append((self.suite, text))
        print(f"  {text}", flush=True)

    @contextmanager
    def case(self, name: str, peer: bool = False) -> Iterator[None]:
        """One piece of a suite: what it raises is reported with its reason, the rest goes on.

        That a `peer` needs more memory than there is is a result, not a failure.
        """
        try:
            yield
        except UnavailableError as reason:
            self._drop(self.skipped, "skipped", name, str(reason))
        except Exception as error:
            if peer and isinstance(error, torch.OutOfMemoryError):
                self._drop(self.skipped, "skipped", name, "out of memory")
            else:
                self._drop(self.failures, "FAILED", name, _reason(error))
        finally:
            release(self.device)

    def _drop(self, into: list[tuple[str, str]], how: str, name: str, reason: str) -> None:
        into.append((self.suite, f"{name}: {reason}"))
        print(f"  {how} {name}: {reason}", flush=True)

    def run(self, suite: str, measure: Callable[["Bench"], None]) -> None:
        """Run a suite under its heading."""
        self.suite = suite
        print(f"\n{suite}\n{HEADER}", flush=True)
        with self.case(suite):
            measure(self)


def _reason(error: Exception) -> str:
    """One line: the kind, the first line of the message, and where in our code."""
    first = (str(error).strip().splitlines() or [""])[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [one for one in frames if "site-packages" not in one.filename] or frames
    return f"{type(error).__name__}: {first} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"
