"""The benchmark: floors by hand, crossings, and the command as a user runs it, small."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from data.errors import InputError
from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS
from data.vocabulary import Vocabulary
from tools.benchmark import SUITES, chosen, main
from tools.benchmarks import attention, inputs, kernels, loss, published, ssd, table
from tools.benchmarks.measure import Ceilings, Floor, Timer, Times
from tools.benchmarks.passes import new_encoder
from trainer.config import ModelConfig

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = Ceilings(1e12, {"bf16": 100e12, "fp32": 10e12})


def test_a_floor_is_the_slower_of_bytes_and_operations() -> None:
    assert Floor(5e9).milliseconds(CEILINGS) == pytest.approx(5.0)
    assert Floor(5e9, 1e12).milliseconds(CEILINGS) == pytest.approx(10.0)
    assert Floor(5e9, 1e12, "fp32").milliseconds(CEILINGS) == pytest.approx(100.0)


def test_ssd_floor_counts_each_tensor_once() -> None:
    case = ssd.Case(head=4, state=8, precision="bf16")
    tokens, channels, heads = 10, 16, 4
    x, B, dt = 2 * tokens * channels, 2 * tokens * 8, 4 * tokens * heads
    forward = ssd.floor(tokens, channels, case, backward=False)
    assert forward.bytes == (x + B + B + dt) + x
    assert forward.flops == 4 * tokens * channels * 8
    both = ssd.floor(tokens, channels, case, backward=True)
    assert both.bytes == forward.bytes + (x + x + B + B + dt) + (x + B + B + dt)
    assert both.flops == 3 * forward.flops


def test_loss_floor_is_three_products() -> None:
    assert loss.floor(3, 5, 7, "bf16").flops == 3 * 2 * 3 * 5 * 7


def test_table_floor_counts_distinct_rows() -> None:
    row = 4 * table.WIDTH
    assert table.floor(100, 30, None).bytes == 100 * row + 30 * row
    trained = table.floor(100, 30, "rowwise_adagrad").bytes
    assert trained == 2 * 100 * row + 30 * row + 2 * 30 * (row + 4)


def test_crossings_are_interpolated() -> None:
    assert attention.crossings([10, 1000], [0.5, 2.0]) == [pytest.approx(100.0)]
    assert attention.crossings([10, 100, 1000], [2.0, 3.0, 1.5]) == []
    assert "level at length 100" in attention.describe([100.0], [0.5, 2.0], "length")
    assert "behind attention at every mean" in attention.describe([], [0.5, 0.9], "mean length")


def small_model(kind: Literal["causal", "bidirectional"]) -> ModelConfig:
    return ModelConfig(kind, 16, 2, 4, 8, 2, 4, 0.0, True, 0.1, False, False)


def test_published_composition_is_our_encoder() -> None:
    encoder = new_encoder(small_model("bidirectional"), torch.device("cpu"))
    offsets_B1 = torch.tensor([0, 1, 8, 20])
    x_TD = torch.randn(20, 16, requires_grad=True)
    last_S = offsets_B1[1:] - 1
    ours = encoder(x_TD, offsets_B1, last_S)
    theirs = published.Published(encoder, published.plain_mixer)(x_TD, offsets_B1, last_S)
    dh_SD = torch.randn_like(ours)
    gradients = [torch.autograd.grad(one, x_TD, dh_SD)[0] for one in (ours, theirs)]
    assert published.distance(ours, theirs) < 1e-5
    assert published.distance(*gradients) < 1e-5


def test_attention_peer_is_causal_and_stays_in_its_history() -> None:
    encoder = attention.new_attention(small_model("causal"), torch.device("cpu"))
    offsets_B1 = torch.tensor([0, 5, 10, 15])
    x_TD = torch.randn(15, 16)
    before = encoder(x_TD, offsets_B1)
    x_TD[7] += torch.randn(16)
    changed = (encoder(x_TD, offsets_B1) - before).abs().amax(1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [7, 8, 9]


def test_kernels_are_told_apart_and_sorted() -> None:
    a = torch.ones(256, 256)
    found = kernels.profiled(lambda: torch.relu(a @ a @ a), torch.device("cpu"))
    assert next(iter(found)) == "aten::mm"
    assert {"aten::relu", "aten::clamp_min"} & set(found)
    times = [one.median_ms for one in found.values()]
    assert times == sorted(times, reverse=True)
    assert times[-1] > 0


def test_times_are_order_statistics() -> None:
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (times.median_ms, times.low_ms, times.high_ms, times.repeats) == (3.0, 2.0, 4.0, 5)


def test_timer_repeats_within_its_budget() -> None:
    calls = []
    times = Timer(torch.device("cpu"), budget_ms=5.0)(lambda: calls.append(torch.ones(10).sum()))
    assert len(calls) == times.repeats + 2
    assert 3 <= times.repeats <= 50
    assert 0 < times.low_ms <= times.median_ms <= times.high_ms


def test_lengths_fill_the_batch() -> None:
    lengths = inputs.filling_lengths(10_000, 200, seed=1)
    assert lengths.sum() == 10_000
    assert lengths.min() >= 1
    prefixes = inputs.prefix_lengths(20_000, seed=1)
    assert prefixes.min() >= 1
    assert 180 < prefixes.mean() < 220  # ML-1M's mean prefix is 195.8


def test_prefixes_are_uniform_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories of 3 and 5 events have proper prefixes 1, 2 and 1, 2, 3, 4."""
    monkeypatch.setattr(inputs, "ml1m_lengths", lambda users, random: np.array([3, 5]))
    drawn = np.bincount(inputs.prefix_lengths(60_000, seed=1)) / 60_000
    np.testing.assert_allclose(drawn, np.array([0, 2, 2, 1, 1]) / 6, atol=0.01)


def test_data_set_is_one_that_training_reads(tmp_path: Path) -> None:
    folder = inputs.write_data_set(tmp_path / "data", users=50, items=30, seed=1)
    dataset, vocabulary = HistoryDataset(folder), Vocabulary.read(folder)
    histories = dataset.read(0)
    assert len(dataset) == 50
    assert dataset.table_rows == vocabulary.table_rows == RESERVED_ROWS + 30
    assert (np.diff(histories.offsets_U1) == dataset.n_train_U + 2).all()
    trained = np.concatenate(
        [
            histories.items_N[start : start + n]
            for start, n in zip(histories.offsets_U1[:-1], dataset.n_train_U, strict=True)
        ]
    )
    np.testing.assert_array_equal(
        vocabulary.counts, np.bincount(trained, minlength=dataset.table_rows)
    )


def test_suites_are_chosen_by_name() -> None:
    assert chosen("all") == list(SUITES)
    assert chosen(["loss", "ssd", "loss"]) == ["loss", "ssd"]
    with pytest.raises(InputError, match="suite=speed is unknown"):
        chosen("speed")


def test_output_needs_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none" / "figures.json"
    monkeypatch.setattr(sys, "argv", ["benchmark", "suite=ssd", f"output={output}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == f"error: output={output}: its folder does not exist; make it first\n"


def test_command_line(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments = [
        "suite=[ssd,loss,table,state,checkpoint,scoring]",
        f"output={output}",
        "device=cpu",
        "quick=true",
    ]
    small = ["model.width=32"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", *arguments, *small],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-1000:]
    lines = done.stdout.replace(str(output), "figures.json").splitlines()
    table = [line for line in lines if not line.startswith("skipped")]
    assert max(map(len, table)) <= 100
    found = json.loads(output.read_text())
    assert not found["failures"]
    assert found["quick"] is True
    assert found["command"].startswith(
        "python -m tools.benchmark suite=[ssd,loss,table,state,checkpoint,scoring]"
    )
    assert "hydra" not in found["command"]
    assert found["versions"]["torch"]
    assert {row["suite"] for row in found["rows"]} == {
        *("ssd", "loss", "table", "state", "checkpoint", "scoring")
    }
    assert {row["by"] for row in found["rows"]} >= {"ours", "plain logits"}
    for row in found["rows"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        alone = row["suite"] == "state" and row["name"].startswith("history")
        if alone or row["name"].endswith("one core"):
            assert row["floor_ms"] is None
            continue
        assert row["times_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        if row["suite"] != "checkpoint":
            assert row["per_second"] == pytest.approx(1e3 * row["work"] / row["median_ms"])
    assert [one for one in found["skipped"] if "liger" in one["text"]]
    assert [one for one in found["findings"] if "top-100 overlap" in one["text"]]


def test_a_failing_case_is_reported_and_the_rest_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    program = f"""
import sys
import torch
import tools.benchmark
from tools.benchmarks import layer, ssd

def broken(bench):
    with bench.case("first"):
        raise RuntimeError("no such kernel")
    with bench.case("second", peer=True):
        raise torch.OutOfMemoryError("tried to allocate")

layer.run = broken
ssd.run = lambda bench: bench.record("a sum", lambda: torch.ones(10).sum(), work=10)
sys.argv = ["benchmark", "suite=[layer,ssd]", "output={output}", "device=cpu", "quick=true"]
tools.benchmark.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 case(s) failed")
    found = json.loads(output.read_text())
    assert [(row["suite"], row["name"], row["work"]) for row in found["rows"]] == [
        ("ssd", "a sum", 10)
    ]
    (failure,), (skipped,) = found["failures"], found["skipped"]
    assert failure["suite"] == "layer"
    assert failure["text"].startswith("first: RuntimeError: no such kernel")
    assert skipped == {"suite": "layer", "text": "second: out of memory"}


@pytest.mark.gpu
def test_every_suite_runs_on_the_gpu(tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    arguments = ["suite=all", f"output={output}", "device=cuda", "quick=true", "mamba=false"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.benchmark", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    rows = json.loads(output.read_text())["rows"]
    assert {row["suite"] for row in rows} == set(SUITES)
