"""Histories of 100,000 events, users with one event, a shard of one user and one of none."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.evaluation import EvaluationBatches
from data.loader import TrainingSteps
from data.negatives import FullCandidates
from data.reader import HistoryDataset
from data.schema import PADDING_ROW, Manifest
from tests.data.datasets import write_dataset
from tests.tools.conversion_cases import run

LONG, ITEMS = 100_000, 700


def train(dataset: HistoryDataset, world_size: int, long_history: str, batch_tokens: int) -> dict:
    """Every rank's steps of an epoch: targets trained, and the number of steps of each rank."""
    targets, steps = 0, []
    for rank in range(world_size):
        with TrainingSteps(
            dataset,
            objective="causal",
            batch_tokens=batch_tokens,
            max_sequences=64,
            mask_ratio=0.0,
            long_history=long_history,
            overlap=0,
            window_tokens=10_000,
            seed=1,
            candidates=FullCandidates(dataset.table_rows, rank, world_size),
            rank=rank,
            world_size=world_size,
            max_epochs=1,
        ) as mine:
            batches = [step.batch for step in mine]
        targets += sum(int((batch.targets_S != PADDING_ROW).sum()) for batch in batches)
        steps.append(len(batches))
    assert len(set(steps)) == 1
    return {"targets": targets, "steps": steps[0]}


def test_from_a_log_to_batches(tmp_path: Path) -> None:
    """One user of 100,000 events and two of one, in three files: each a shard of a single user."""
    user = np.concatenate([np.full(LONG, 7), [1, 2]])
    draws = np.random.default_rng(0)
    log = {"user_id": user, "item_id": draws.integers(0, ITEMS, LONG + 2)}
    log["timestamp"] = draws.integers(0, 1_000, LONG + 2)
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    run(tmp_path / "log.parquet", tmp_path / "out", shards=3, row_group_events=1_000)
    dataset = HistoryDataset(tmp_path / "out")
    assert sorted(dataset.n_train_U) == [1, 1, LONG - 2]
    assert [one.rows for one in Manifest.read(tmp_path / "out").histories] == [1, 1, 1]
    long = next(dataset.read(g) for g in range(3) if len(dataset.read(g).items_N) == LONG)
    order = np.lexsort((log["timestamp"][:LONG],))  # stable: ties keep the order of the log
    vocabulary = pq.read_table(tmp_path / "out/vocabulary.parquet")["item_id"].to_numpy()
    assert np.array_equal(vocabulary[long.items_N - 8], log["item_id"][:LONG][order])

    for world_size in (1, 2):
        done = train(dataset, world_size, "windows", 16_384)
        assert done["targets"] == LONG - 3
        assert done["steps"] == -(-7 // world_size)
        assert train(dataset, world_size, "truncate", 512) == {"targets": 512, "steps": 1}

    test = EvaluationBatches(dataset, "test", "all", 512, 4, 0, 1)
    (batch,) = list(test)
    assert test.batch_tokens == LONG - 1  # grown to the whole history: none is cut
    assert batch.history_length_S[0] == LONG - 1
    assert test.samples == 1


@pytest.mark.parametrize("world_size", [1, 2])
def test_empty_shards_and_users_with_one_event(tmp_path: Path, world_size: int) -> None:
    """Five files for two users, and users without a target: every rank has the same steps."""
    histories = [[8, 9, 10, 11, 12], [9]]
    folder = write_dataset(tmp_path, histories, n_train=[3, 1], n_validation=[1, 0], files=5)
    assert [one.rows for one in Manifest.read(folder).histories] == [1, 1, 0, 0, 0]
    dataset = HistoryDataset(folder)
    assert train(dataset, world_size, "refuse", 8) == {"targets": 2, "steps": 1}
    for rank in range(world_size):
        batches = EvaluationBatches(dataset, "test", "all", 8, 4, rank, world_size)
        assert (len(list(batches)), batches.samples) == (1, 1)
