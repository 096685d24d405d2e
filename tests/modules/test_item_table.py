"""The table's rows depend on (seed, row, column) alone."""

import torch

from data.batch import SequenceBatch
from modules.item_table import ROW_STD, ItemTable, fill_rows


def filled(rows: int = 2000, width: int = 16, seed: int = 3, row: int = 0, column: int = 0):
    weight = torch.empty(rows, width)
    fill_rows(weight, seed, row, column)
    return weight


def test_rows_are_normal_and_distinct():
    weight = filled(5000)
    assert abs(weight.mean().item()) < 3e-4
    assert abs(weight.std().item() / ROW_STD - 1) < 0.02
    assert len(torch.unique(weight, dim=0)) == len(weight)
    across = torch.corrcoef(weight.T) - torch.eye(16)
    assert across.abs().max() < 0.06
    along = (weight[1:] * weight[:-1]).mean() / ROW_STD**2
    assert abs(along) < 0.02


def test_a_shard_is_that_part_of_the_whole():
    whole = filled()
    assert torch.equal(filled(500, 4, row=700, column=8), whole[700:1200, 8:12])


def test_blocks_change_nothing(monkeypatch):
    whole = filled()
    monkeypatch.setattr("modules.item_table.FILL_NUMBERS", 16 * 7)
    assert torch.equal(filled(), whole)


def test_another_seed_gives_other_rows():
    assert not torch.isclose(filled(seed=3), filled(seed=4)).any(dim=1).all()


def test_lookup_returns_histories_and_candidates():
    table = ItemTable(50, 8, device=torch.device("cpu"))
    weight = next(table.parameters())
    fill_rows(weight.data, 0)
    ids, candidates = torch.tensor([9, 1, 9]), torch.tensor([40, 8])
    batch = SequenceBatch.build(ids, candidates, torch.tensor([0, 3]), ids)
    history, rows = table(batch.features)
    assert torch.equal(history, weight[ids])
    assert torch.equal(rows, weight[candidates])
