"""The conversion beside its floor, as a user measures it."""

import re
from pathlib import Path

from tests.tools.conversion_cases import some_events, write
from tests.trained_run import run_command


def test_conversion_and_floor_are_measured(tmp_path: Path) -> None:
    log = write(tmp_path / "day=1/log.parquet", some_events(1, 5_000))
    scratch = tmp_path / "scratch"
    command = ["tools.measure_conversion", f'input="{log}"', f"scratch={scratch}", "rounds=1"]
    out = run_command(*command)
    assert re.search(r"round 1: conversion \d+\.\d s \(\d+\.\d s CPU\), read and write", out)
    assert "5,000" in out
    assert re.search(r"times the floor +[\d.]+ by the clock, [\d.]+ by CPU seconds", out)
    assert re.search(r"most memory +0\.\d+ GiB", out)
    assert not scratch.exists()
    assert "cannot make scratch" in run_command(*command[:2], f'scratch="{log}"', fails=True)
    assert "rounds=0 must be" in run_command(*command[:3], "rounds=0", fails=True)
