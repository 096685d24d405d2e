"""Timing, the two ceilings of a device, and the floor that a piece of work has under them.

A floor is the larger of two times: the fewest bytes that the work must move (each input read once,
each output written once) over the copy bandwidth, and the operations of its definition over the
rate of a large matrix product. Both ceilings are measured here, in the run that uses them.
"""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from modules.products import DTYPES, fp32_products

MOST_REPEATS = 50
FLUSH_BYTES = 256 * 2**20  # written before each timed call: what the last call left in L2 goes


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: the median, and the 20th and 80th percentile of the repeats."""

    median_ms: float
    low_ms: float
    high_ms: float
    repeats: int

    @classmethod
    def of(cls, milliseconds: list[float]) -> "Times":
        ordered = sorted(milliseconds)
        last = len(ordered) - 1
        return cls(
            ordered[len(ordered) // 2],
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            len(ordered),
        )


@dataclass(frozen=True)
class Ceilings:
    """bytes_per_second: a device-to-device copy, read and written bytes counted.
    flops_per_second: a square matrix product, by precision."""

    bytes_per_second: float
    flops_per_second: Mapping[str, float]


@dataclass(frozen=True)
class Floor:
    """The least that some work costs. `flops` are counted at the rate of `precision`."""

    bytes: float
    flops: float = 0.0
    precision: str = "bf16"

    def milliseconds(self, ceilings: Ceilings) -> float:
        rate = ceilings.flops_per_second[self.precision]
        return 1e3 * max(self.bytes / ceilings.bytes_per_second, self.flops / rate)


@dataclass(frozen=True)
class Timer:
    """Times calls on one device, about `budget_ms` each."""

    device: torch.device
    budget_ms: float
    _flush: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, call: Callable[[], object]) -> Times:
        """Warm up (compilation included), then the median of as many calls as fit the budget.

        On CUDA with events, the L2 cache flushed before each call.
        """
        call()
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        estimate_ms = max(1e3 * (time.perf_counter() - started), 1e-3)
        least = 1 if estimate_ms > 1e3 else 3
        repeats = int(min(max(self.budget_ms / estimate_ms, least), MOST_REPEATS))
        measure = self._events if self.device.type == "cuda" else self._clock
        return Times.of(measure(call, repeats))

    def steps(self, step: Callable[[], object], warm_up: int, each: int, groups: int) -> Times:
        """Milliseconds a step of groups of `each` steps, with no wait inside a group."""
        for _ in range(warm_up):
            step()
        milliseconds = []
        for _ in range(groups):
            self.wait()
            started = time.perf_counter()
            for _ in range(each):
                step()
            self.wait()
            milliseconds.append(1e3 * (time.perf_counter() - started) / each)
        return Times.of(milliseconds)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _clock(self, call: Callable[[], object], repeats: int) -> list[float]:
        milliseconds = []
        for _ in range(repeats):
            started = time.perf_counter()
            call()
            milliseconds.append(1e3 * (time.perf_counter() - started))
        return milliseconds

    def _events(self, call: Callable[[], object], repeats: int) -> list[float]:
        if not self._flush:
            self._flush.append(torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device))
        pairs = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush[0].zero_()
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        self.wait()
        return [begin.elapsed_time(end) for begin, end in pairs]


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call holds at its peak beyond what was held before; None on the CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release(device: torch.device) -> None:
    """Give memory of finished measurements back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_ceilings(timer: Timer) -> Ceilings:
    """Copy bandwidth and matrix rates of the timer's device, on random data."""
    rates = {name: _matrix_rate(timer, name) for name in DTYPES}
    ceilings = Ceilings(_copy_rate(timer), rates)
    release(timer.device)
    return ceilings


def link_rate(timer: Timer) -> float:
    """Bytes per second of a copy from pinned host memory to the timer's CUDA device."""
    source = torch.ones(2**28, dtype=torch.int8, pin_memory=True)
    target = torch.empty_like(source, device=timer.device)
    milliseconds = timer(lambda: target.copy_(source, non_blocking=True)).median_ms
    return 1e3 * source.numel() / milliseconds


def _copy_rate(timer: Timer) -> float:
    """Bytes read and written per second."""
    numbers = 2**28 if timer.device.type == "cuda" else 2**24
    source = torch.randn(numbers, device=timer.device)
    target = torch.empty_like(source)
    milliseconds = timer(lambda: target.copy_(source)).median_ms
    return 2e3 * source.numel() * source.element_size() / milliseconds


def _matrix_rate(timer: Timer, precision: str) -> float:
    """Operations per second of a large square product."""
    side = 512
    if timer.device.type == "cuda":
        side = 4096 if precision == "fp32" else 8192
    a, b = torch.randn(2, side, side, device=timer.device).to(DTYPES[precision])
    with fp32_products(precision):
        return 2e3 * side**3 / timer(lambda: a @ b).median_ms
