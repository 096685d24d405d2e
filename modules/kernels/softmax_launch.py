"""How the kernels of `softmax` that walk are launched: tiles, programs, runs.

Shape suffixes: N positions, C candidates, D width.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton

from modules.products import triton_precision

MULTIPROCESSORS = 132  # of an H100


@dataclass(frozen=True)
class Launch:
    """Positions, candidates and columns of a tile; how a program runs.

    programs: as many as a multiprocessor holds at once.
    """

    rows: int
    candidates: int
    columns: int
    warps: int
    stages: int
    precision: str = "ieee"
    programs: int = 1


def choose_launch(D: int, dtype: torch.dtype) -> Launch:
    """At D 256 two programs share a multiprocessor: one's exponentials hide the other's products.

    With tiles of 64 candidates, so one program, a walk with repeats takes a third longer there.
    32 rows of fp32 keep clear of warp-group products, which Triton 3.6 miscompiles there
    (`tests/gpu/lint_sass.py`).
    """
    if dtype == torch.float32:
        return Launch(32, 64, 32, warps=4, stages=3, precision=triton_precision())
    if D > 256:
        return Launch(128, 128, 64, warps=8, stages=3)
    columns = max(triton.next_power_of_2(D), 16)
    return Launch(128, 32, columns, warps=8, stages=2, programs=2)


@cache
def runs_of(row_tiles: int, tiles: int, programs: int) -> int:
    """Into how many runs the candidate tiles are cut, so that all programs end soonest.

    programs: as many as run at once. One costs its tiles and about one more, for its positions, a
    base and its end.
    """

    def duration(runs: int) -> int:
        waves = triton.cdiv(row_tiles * runs, programs)
        return waves * (triton.cdiv(tiles, runs) + 1)

    return min(range(1, min(tiles, programs) + 1), key=duration)


def grid_of(N: int, C: int, launch: Launch) -> tuple[tuple[int, int], int]:
    """The programs, and the candidate tiles of one. No run is empty."""
    row_tiles, all_tiles = triton.cdiv(N, launch.rows), triton.cdiv(C, launch.candidates)
    runs = runs_of(row_tiles, all_tiles, MULTIPROCESSORS * launch.programs)
    tiles = triton.cdiv(all_tiles, runs)
    return (row_tiles, triton.cdiv(all_tiles, tiles)), tiles


def padded(C: int, launch: Launch) -> int:
    """C, or as whole tiles."""
    return triton.cdiv(C, launch.candidates) * launch.candidates
