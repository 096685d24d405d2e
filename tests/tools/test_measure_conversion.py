"""The conversion beside its floor, as a user measures it."""

import re
import sys
from pathlib import Path

import pytest

from tests.tools.conversion_cases import some_events, write
from tests.trained_run import run_command
from tools import measure_conversion


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


def test_what_cannot_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write(tmp_path / "log.parquet", some_events(1, 9))
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,1,1\n")
    scratch = tmp_path / "scratch"

    def refused(sentence: str, source: Path = log) -> None:
        monkeypatch.setattr(sys, "argv", ["measure", f"input={source}", f"scratch={scratch}"])
        with pytest.raises(SystemExit) as ended:
            measure_conversion.main()
        assert ended.value.code == 1
        assert re.fullmatch(f"error: {sentence}\n", capsys.readouterr().err)
        assert not scratch.exists()

    refused(r".*log\.csv is no Parquet, .*; name a Parquet log", tmp_path / "log.csv")
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    refused(r"python -m tools\.convert_logs .* failed; its own sentence is above")
    cost = measure_conversion.Cost(1.0, 1.0, 1, 1)
    monkeypatch.setattr(measure_conversion, "measure", lambda *_: cost)
    refused(r"cannot read the log again and write .*/floor; the reason is above")
