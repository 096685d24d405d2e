"""The scaling of a step over ranks, as a user measures it, small."""

import json
import sys
from pathlib import Path

import pytest

from data.errors import InputError
from tests.trained_run import run_command
from tests.trainer.test_config import composed
from tools.benchmarks.scaling import CASES, Case, chosen, measure_case, write_case
from tools.measure_scaling import efficiency, launch, numbers_of_ranks, table

TINY = ["model.width=16", "model.state=4", "model.head=8", "model.layers=1"]
PARTS = ["loader", "lookup", "model, loss", "all-reduce", "table grad", "update"]


def test_two_ranks_are_measured_beside_one(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    command = ["tools.measure_scaling", f"output={output}", "device=cpu", "cases=[full-2k]", *TINY]
    printed = run_command(*command)
    content = json.loads(output.read_bytes())
    assert not content["failures"]
    assert not content["skipped"]
    found = {(one["scaling"], one["ranks"]): one for one in content["rows"]}
    one, weak, strong = found["weak", 1], found["weak", 2], found["strong", 2]
    assert {**found["strong", 1], "scaling": "weak"} == one
    assert (one["tokens_a_rank"], weak["tokens_a_rank"], strong["tokens_a_rank"]) == (
        1_024,
        1_024,
        512,
    )
    assert weak["tokens"] == pytest.approx(2 * one["tokens"], rel=0.2)
    assert strong["tokens"] == pytest.approx(one["tokens"], rel=0.2)
    for row in content["rows"]:
        assert row["tokens_per_second"] == 1e3 * row["tokens"] / row["times"]["median_ms"]
        assert list(row["parts"]) == PARTS
        assert min(row["parts"].values()) >= 0
    for line in table(content["rows"]):
        assert line in printed
        assert len(line) <= 100
    assert "cases=['large'] is unknown on cpu" in run_command(
        *command[:3], "cases=[large]", fails=True
    )


def test_efficiency_is_of_one_rank() -> None:
    def row(case: str, scaling: str, ranks: int, speed: float) -> dict:
        return {
            "case": case,
            "scaling": scaling,
            "ranks": ranks,
            "tokens_a_rank": 64,
            "tokens_per_second": speed,
            "times": {"median_ms": 1.0},
            "peak_bytes": None,
            "parts": {},
        }

    rows = [
        row("a", "weak", 1, 10.0),
        row("a", "weak", 2, 15.0),
        row("b", "strong", 1, 1.0),
        row("b", "weak", 2, 1.0),
    ]
    assert [efficiency(one, rows) for one in rows] == [1.0, 0.75, 1.0, None]
    line = next(one for one in table(rows) if one.split()[:2] == ["b", "weak"])
    assert "no 1 rank" in line


def test_ranks_that_can_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    assert numbers_of_ranks(None, "cuda") == [1, 2, 4]
    assert numbers_of_ranks([6, 3, 3], "cuda") == [3, 6]
    with pytest.raises(InputError, match=r"ranks=\[8\], but this host has 6 GPUs"):
        numbers_of_ranks([8], "cuda")
    with pytest.raises(InputError, match="ranks=0 must be a whole number"):
        numbers_of_ranks([0], "cpu")
    assert [one.name for one in chosen(["sampled-20k"], "cpu")] == ["sampled-20k"]
    assert chosen(None, "cuda") == list(CASES["cuda"])


def test_a_launch_that_fails_or_hangs_is_ended_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "scaling.json"
    monkeypatch.setattr(sys, "executable", "/usr/bin/false")
    assert launch(2, output, "cpu", "", 60) == "2 ranks ended with status 1; the reason is above"
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    assert launch(2, output, "cpu", "", 1) == "2 ranks took longer than launch_seconds=1"


def test_a_table_without_room_is_skipped_with_the_reason(tmp_path: Path, one_rank) -> None:
    case = Case("huge", "sampled", 2_000_000_000, 64, 4_096, "fp16", "rowwise_adagrad", False)
    write_case(case, tmp_path)
    output = tmp_path / "scaling.json"
    output.write_text('{"rows": [], "skipped": []}')
    measure_case(case, composed("trainer.device=cpu", f"data.path={tmp_path}"), one_rank, output)
    content = json.loads(output.read_bytes())
    assert content["rows"] == []
    (skipped,) = content["skipped"]
    assert (skipped["case"], skipped["ranks"]) == ("huge", 1)
    assert "the item table needs 15,2" in skipped["reason"]
    assert "GiB of host memory a rank" in skipped["reason"]
