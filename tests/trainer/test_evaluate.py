"""Ranks against brute force, and the metrics against an independent library."""

import ir_measures
import numpy as np
import pytest
import torch
from ir_measures import RR, Success, nDCG

from data.errors import InputError
from data.evaluation import EvaluationBatches
from data.reader import HistoryDataset
from data.schema import RESERVED_ROWS
from modules.encoder import Encoder
from modules.item_table import ItemTable, fill_rows
from modules.losses import FullSoftmax
from modules.recommender import Recommender
from tests.data.datasets import write_dataset
from trainer import evaluate as evaluation
from trainer.evaluate import Ranking, evaluate, evaluate_popularity, rank_metrics, top_items

ROWS = 60


@pytest.fixture
def dataset(tmp_path) -> HistoryDataset:
    random = np.random.default_rng(0)
    histories = [
        random.integers(RESERVED_ROWS, ROWS, length).tolist()
        for length in random.integers(3, 12, 30)
    ]
    return HistoryDataset(write_dataset(tmp_path / "data", histories, table_rows=ROWS))


def batches(dataset, split="test") -> EvaluationBatches:
    return EvaluationBatches(dataset, split, "all", 32, 8, rank=0, world_size=1)


def make_recommender(kind="causal", repeats=False) -> Recommender:
    torch.manual_seed(0)
    encoder = Encoder(kind, 8, 1, 4, 4, 2, 4, 0.5, True, repeats=repeats)
    table = ItemTable(ROWS, 8, device=torch.device("cpu"))
    fill_rows(next(table.parameters()).data, 0)
    return Recommender(table, encoder, FullSoftmax(0))


def histories_and_targets(dataset, split):
    histories = dataset.read_many(range(len(dataset.groups)))
    pairs = []
    for user in range(len(histories)):
        start, stop = histories.offsets_U1[user : user + 2]
        place = stop - 1 if split == "test" else stop - 2
        pairs.append((histories.items_N[start:place], histories.items_N[place]))
    return pairs


@pytest.mark.parametrize("split", ["validation", "test"])
@pytest.mark.parametrize(
    ("kind", "repeats"), [("causal", False), ("bidirectional", False), ("causal", True)]
)
def test_ranks_are_brute_force(dataset, one_rank, split, kind, repeats, monkeypatch):
    recommender = make_recommender(kind, repeats)
    if repeats:  # large, and of both signs
        recommender.encoder.repeat.weight.data.mul_(40)
    monkeypatch.setattr(evaluation, "SCORE_BYTES", 4 * 60 * 7)
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 4 * 8 * 25)  # three blocks of rows
    monkeypatch.setattr(evaluation, "HIDDEN_BYTES", 4 * 8 * 8 * 2)  # two batches a run
    ranking = evaluate(recommender, batches(dataset, split), one_rank, ROWS)
    recommender.eval()
    table = next(recommender.table.parameters()).detach()
    expected = []
    for history, target in histories_and_targets(dataset, split):
        offsets = torch.tensor([0, len(history)])
        h = recommender.encoder(table[torch.tensor(history.tolist())], offsets)[-1]
        scores = table @ h
        if repeats:
            scores[history.tolist()] += recommender.encoder.repeat_score(h[None])
        rivals = set(range(RESERVED_ROWS, ROWS)) - {int(target)}
        above = {rival for rival in rivals if scores[rival] >= scores[int(target)]}
        fresh = above - set(history.tolist())
        expected.append((int(target), len(history), 1 + len(above), 1 + len(fresh)))
    got = zip(
        ranking.targets_N.tolist(),
        ranking.history_length_N.tolist(),
        ranking.unfiltered_N.tolist(),
        ranking.filtered_N.tolist(),
        strict=True,
    )
    assert sorted(got) == sorted(expected)
    assert any(one[2] != one[3] for one in expected)


def test_evaluation_leaves_training_mode_on(dataset, one_rank):
    recommender = make_recommender()
    evaluate(recommender, batches(dataset), one_rank, ROWS)
    assert recommender.training


def test_ties_are_pessimistic(dataset, one_rank):
    counts = np.zeros(ROWS, dtype=np.int64)
    counts[RESERVED_ROWS:] = 5  # every item as popular as every other
    ranking = evaluate_popularity(counts, batches(dataset), one_rank)
    assert (ranking.unfiltered_N == ROWS - RESERVED_ROWS).all()
    assert (ranking.filtered_N < ranking.unfiltered_N).all()


def test_popularity_ranks_by_count(dataset, one_rank):
    counts = np.zeros(ROWS, dtype=np.int64)
    counts[RESERVED_ROWS:] = np.arange(ROWS - RESERVED_ROWS)[::-1]
    ranking = evaluate_popularity(counts, batches(dataset), one_rank)
    assert (ranking.unfiltered_N == ranking.targets_N - RESERVED_ROWS + 1).all()


def test_top_items_are_the_best_rows(dataset, one_rank, monkeypatch):
    monkeypatch.setattr(evaluation, "BLOCK_BYTES", 4 * 8 * 25)
    recommender = make_recommender()
    h = torch.randn(5, 8)
    rows, scores = top_items(recommender, h, 7, one_rank, ROWS)
    everything = h @ next(recommender.table.parameters()).detach().T
    everything[:, :RESERVED_ROWS] = -torch.inf
    expected = everything.topk(7)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values)


def test_metrics_equal_an_independent_library():
    ranks = np.random.default_rng(1).integers(1, 60, 200)
    qrels, run = [], []
    for user, rank in enumerate(ranks):
        qrels.append(ir_measures.Qrel(str(user), "target", 1))
        for place in range(1, 61):
            item = "target" if place == rank else f"other{place}"
            run.append(ir_measures.ScoredDoc(str(user), item, -float(place)))
    ours = rank_metrics(ranks)
    for k in (10, 20):
        theirs = ir_measures.calc_aggregate([Success @ k, nDCG @ k, RR @ k], qrels, run)
        assert ours[f"hr@{k}"] == pytest.approx(theirs[Success @ k])
        assert ours[f"ndcg@{k}"] == pytest.approx(theirs[nDCG @ k])
        assert ours[f"mrr@{k}"] == pytest.approx(theirs[RR @ k])


def test_octaves_split_the_targets_and_their_metrics():
    draws = np.random.default_rng(2)
    ranks = draws.integers(1, 40, 500)
    values = draws.integers(0, 300, 500)
    ranking = Ranking(ranks, ranks + 1, values, values)
    records = ranking.by_octave(values)
    assert [one["from"] for one in records] == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert sum(one["targets"] for one in records) == 500
    for name, one in ranking.metrics()["filtered"].items():
        parts = sum(part["targets"] * part["filtered"][name] for part in records)
        assert parts / 500 == pytest.approx(one)
    chosen = (values >= 64) & (values < 128)
    gains = [1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks[chosen] + 1]
    record = records[7]["unfiltered"]
    assert record["ndcg@10"] == pytest.approx(np.mean(gains))
    error = np.std(gains, ddof=1) / len(gains) ** 0.5
    assert record["ndcg@10_error"] == pytest.approx(error)


def test_a_diverged_model_is_no_perfect_one(dataset, one_rank):
    recommender = make_recommender()
    next(recommender.table.parameters()).data[20] = torch.nan
    with pytest.raises(InputError, match="training has diverged"):
        evaluate(recommender, batches(dataset), one_rank, ROWS)
