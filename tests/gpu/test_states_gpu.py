"""Users' states moved on by a GPU, against those of a CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

pytest.importorskip("duckdb")  # which groups the log

from data.bundle_manifest import BundleManifest
from data.log_query import LogRules
from data.schema import RESERVED_ROWS
from data.user_states import TOGETHER_BYTES, numbers_of
from tests.tools.test_score_histories import scores_of
from tools.benchmarks.inputs import write_data_set
from tools.benchmarks.scoring import write_bundle
from tools.update_states import Report, UpdateConfig, update
from trainer.config import ModelConfig

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ITEMS, USERS, K = 2_000, 700, 20
MODEL = ModelConfig("causal", 64, 2, 32, 32, 2, 4, 0.0, True, 0.1, False, True)
NOISE = 1e-4  # of the largest number: fp32 sums of another order


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """Random weights, and the rules of a log."""
    folder = tmp_path_factory.mktemp("states")
    data = write_data_set(folder / "data", 10, ITEMS, seed=1)
    bundle = write_bundle(folder / "bundle", data, MODEL, ITEMS)
    manifest = BundleManifest.read(bundle)
    replace(manifest, data={"options": LogRules().as_options()}).write(bundle)
    return bundle


@pytest.fixture(scope="module")
def days(tmp_path_factory) -> list[Path]:
    """Two days of 0 to some 90 events a user; some users come on the second."""
    folder, random = tmp_path_factory.mktemp("log"), np.random.default_rng(2)
    paths = []
    for day in range(2):
        lengths = random.geometric(1 / 15, USERS) - 1
        lengths[: 100 * (1 - day)] = 0
        users = np.arange(USERS).repeat(lengths)
        columns = {
            "user_id": users,
            "item_id": random.integers(RESERVED_ROWS, RESERVED_ROWS + ITEMS, len(users)),
            "timestamp": 1_000 * day + random.integers(0, 1_000, len(users)),
        }
        paths.append(folder / f"day{day}.parquet")
        pq.write_table(pa.table(columns), paths[-1])
    return paths


def carry(bundle: Path, days: list[Path], folder: Path, device: str) -> Report:
    """Both days one after the other; the second's report."""
    options = {"bundle": str(bundle), "device": device, "k": K}
    update(UpdateConfig(**options, events=str(days[0]), output=str(folder / "day0")))
    second = {"events": str(days[1]), "states": str(folder / "day0")}
    return update(UpdateConfig(**options, **second, output=str(folder / "day1")))


@pytest.mark.parametrize("piece_bytes", [1 << 20, TOGETHER_BYTES["cuda"]])
def test_states_and_scores_are_those_of_a_cpu(bundle, days, tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setitem(TOGETHER_BYTES, DEVICE, piece_bytes)
    reports = {}
    for name, device in (("host", "cpu"), ("card", DEVICE)):
        reports[name] = carry(bundle, days, tmp_path / name, device)
    assert reports["card"].manifest.counts == reports["host"].manifest.counts
    assert reports["host"].manifest.counts["users_new"] > 0
    host, card = (
        pq.read_table(tmp_path / name / "day1" / "states").combine_chunks()
        for name in ("host", "card")
    )
    assert card.drop_columns("state").equals(host.drop_columns("state"))
    expected, got = (numbers_of(one["state"], "fp32") for one in (host, card))
    assert len(got) > 600
    assert np.abs(got - expected).max() <= NOISE * np.abs(expected).max()
    assert_same_best(*(scores_of(tmp_path / name / "day1" / "scores") for name in ("host", "card")))


def assert_same_best(expected: dict, got: dict) -> None:
    """Scores by rank as far as sums of another order allow, and the items of nearly all."""
    assert got.keys() == expected.keys()
    same = []
    for user, (items, scores) in expected.items():
        np.testing.assert_allclose(got[user][1], scores, rtol=1e-3, atol=1e-4)
        same.append(len(set(items) & set(got[user][0])) / K)
    assert np.mean(same) > 0.999


def test_both_ways_of_a_full_pass_are_timed(bundle, days, tmp_path):
    report = carry(bundle, days, tmp_path, DEVICE)
    assert report.device == torch.cuda.get_device_name()
    slow, fast = report.full_passes
    assert (slow.kernels, fast.kernels) == ("torchscript", "bf16")
    assert 0 < fast.seconds_an_event < slow.seconds_an_event
    assert 0 < report.break_even_events(slow) < report.break_even_events(fast)
