"""The synthetic log: exact sizes, independence of how it is cut, and a best score that is true."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data.synthetic
from data.errors import InputError
from data.synthetic import CUTOFFS, Process, scores, stream_log
from tools.make_synthetic import BEST_SCORES, SyntheticConfig, make_log

ROOT = Path(__file__).parents[2]


def make(output: Path, files: int = 3, ids: str = "int", **process: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {"events": 20_000, "users": 400, "items": 300, "seed": 7}
    return make_log(SyntheticConfig(output, Process(**sizes | process), files, ids))


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("*.parquet"))])


def next_item(process: Process, item: int) -> np.ndarray:
    """The distribution of the item after `item`, over the whole catalogue."""
    every = np.arange(process.items)
    probability_V = (1 - process.follow_probability) * process.zipf_probability(every)
    for which, weight in enumerate(process.successor_weights_M):
        successor = process.successor(np.array([item]), np.array([which]))
        probability_V[successor] += process.follow_probability * weight
    return probability_V


def test_command_line(tmp_path: Path) -> None:
    arguments = ["events=5000", "users=100", "items=50", "seed=3", "files=4", "ids=string"]
    command = [sys.executable, "-m", "tools.make_synthetic", f"output={tmp_path / 'log'}"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "best possible" in done.stdout
    names = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert names == [BEST_SCORES, *(f"part-{number:05d}.parquet" for number in range(4))]
    table = read(tmp_path / "log")
    assert table.schema.types == [pa.string(), pa.string(), pa.int64()]
    record = json.loads((tmp_path / "log" / BEST_SCORES).read_text())
    assert f"{record['best']['hr@10']:.4f}" in done.stdout
    assert record["process"]["seed"] == 3


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_sizes_are_exact_and_time_rises(tmp_path: Path, sigma: float) -> None:
    make(tmp_path / "log", files=7, length_sigma=sigma)
    table = read(tmp_path / "log")
    assert table.num_rows == 20_000
    sizes = [pq.read_metadata(path).num_rows for path in (tmp_path / "log").glob("*.parquet")]
    assert max(sizes) - min(sizes) <= 1
    _, lengths = np.unique(table["user_id"].to_numpy(), return_counts=True)
    assert len(lengths) == 400
    assert lengths.min() >= 5
    assert np.all(np.diff(table["timestamp"].to_numpy()) >= 0)
    assert set(np.unique(table["item_id"].to_numpy())) <= set(range(1, 301))


def test_the_log_depends_on_the_seed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make(tmp_path / "one", files=1)
    second = make(tmp_path / "five", files=5)
    assert read(tmp_path / "one").equals(read(tmp_path / "five"))
    assert first == second
    monkeypatch.setattr(data.synthetic, "BLOCK_EVENTS", 700)
    third = make(tmp_path / "blocks", files=2)
    assert read(tmp_path / "one").equals(read(tmp_path / "blocks"))
    assert third["best"] == pytest.approx(first["best"])
    make(tmp_path / "seed", seed=8)
    assert not read(tmp_path / "one").equals(read(tmp_path / "seed"))


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.3])
def test_distributions_sum_to_one_and_are_what_is_drawn(exponent: float) -> None:
    process = Process(1, 1, 50, seed=2, zipf_exponent=exponent, shortest_history=1)
    assert process.zipf_probability(np.arange(50)).sum() == pytest.approx(1)
    draws = 200_000
    user_N = np.arange(draws)
    for previous in (0, 17):
        item_N = process.step(np.full(draws, previous), user_N, np.ones(draws, np.int64))
        share_V = np.bincount(item_N, minlength=50) / draws
        assert np.abs(share_V - next_item(process, previous)).max() < 5 * (0.25 / draws) ** 0.5


@pytest.mark.parametrize("successors", [1, 4, 30])
def test_best_score_equals_ranking_the_whole_catalogue(successors: int) -> None:
    process = Process(100, 10, 60, seed=5, successors=successors)
    items = np.arange(60)
    ordered = np.stack([-np.sort(-next_item(process, item)) for item in items])
    assert process.best(items) == pytest.approx(scores(ordered.mean(axis=0)))


def test_best_score_is_reached_and_popularity_is_far_below(tmp_path: Path) -> None:
    """The ranking by the true distribution, on the targets that the log holds."""
    sizes = {"events": 60_000, "users": 8_000, "items": 300, "seed": 7}
    record = make(tmp_path / "log", **sizes)
    process = Process(**sizes)
    ranking = {item: np.argsort(-next_item(process, item)) for item in range(300)}
    blocks = list(stream_log(process))
    rank = []
    for block in blocks:
        for place in np.flatnonzero(block.event_E == process.lengths_U[block.user_E] - 1):
            order = ranking[int(block.previous_E[place])]
            rank.append(int(np.flatnonzero(order == block.item_E[place])[0]))
    assert len(rank) == record["scored_users"] == 8_000
    share = np.bincount(rank, minlength=max(CUTOFFS))[: max(CUTOFFS)] / len(rank)
    for name, value in scores(share).items():
        assert value == pytest.approx(record["best"][name], abs=0.015)
    assert record["best"]["hr@10"] > 2 * record["popularity"]["hr@10"]


def test_previous_items_are_the_users_own(tmp_path: Path) -> None:
    last: dict[int, int] = {}
    for block in stream_log(Process(5_000, 50, 40, seed=1)):
        columns = (block.user_E, block.event_E, block.item_E, block.previous_E)
        for user, event, item, previous in zip(*map(np.ndarray.tolist, columns), strict=True):
            assert previous == last.get(user, -1)
            assert (event == 0) == (user not in last)
            last[user] = item


def test_popularity_is_counted_on_training_events(tmp_path: Path) -> None:
    record = make(tmp_path / "log")
    table = read(tmp_path / "log")
    user_N, item_N = table["user_id"].to_numpy(), table["item_id"].to_numpy()
    order = np.argsort(user_N, kind="stable")
    ends = np.cumsum(np.unique(user_N, return_counts=True)[1])
    held_out = np.concatenate([ends - 1, ends - 2])
    train = np.delete(item_N[order], held_out)
    count_V = np.bincount(train, minlength=301)
    count_V[0] = -1
    target = item_N[order][ends - 1]
    rank = np.array([(count_V >= count_V[item]).sum() - 1 for item in target])
    share = np.bincount(rank, minlength=20)[:20] / len(target)
    assert record["popularity"] == pytest.approx(scores(share))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"events": 1_999}, r"events=1999 must be a whole number, 2,000 or more"),
        ({"items": 5}, "items=5"),
        ({"users": 0}, "users=0"),
        ({"files": 30_000}, "files=30000 is more than events"),
        ({"ids": "uuid"}, "ids=uuid is unknown"),
        ({"follow_probability": 1.5}, r"follow_probability=1.5 must lie in \[0, 1\]"),
        ({"length_sigma": -1}, r"length_sigma=-1 must lie in \[0, 10\]"),
    ],
)
def test_errors(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(tmp_path / "log", **options)


def test_existing_output_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "log")
    with pytest.raises(InputError, match="already exists"):
        make(tmp_path / "log")
