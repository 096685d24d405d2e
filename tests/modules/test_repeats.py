"""What the encoder learns of repeats, on histories made of them and on histories without any."""

import pytest
import torch
from torch import Tensor

from data.schema import RESERVED_ROWS
from modules.encoder import Encoder
from modules.losses import FullSoftmax
from modules.repeats import SeenItems, first_bytes

ITEMS, LENGTH, HISTORIES, WIDTH = 40, 20, 12, 16
ROWS = RESERVED_ROWS + ITEMS
OFFSETS = torch.arange(0, HISTORIES * LENGTH + 1, LENGTH)


def habits(random: torch.Generator) -> Tensor:
    """Nine times of ten an earlier item of the same history, any of them, again; [B, L]."""
    items = torch.randint(RESERVED_ROWS, ROWS, (HISTORIES, LENGTH), generator=random)
    for token in range(1, LENGTH):
        earlier = (torch.rand(HISTORIES, generator=random) * token).long()
        again = torch.rand(HISTORIES, generator=random) < 0.9
        old = items.gather(1, earlier[:, None])[:, 0]
        items[:, token] = old.where(again, items[:, token])
    return items


def novelties(random: torch.Generator) -> Tensor:
    """No item twice in a history; [B, L]."""
    order = torch.rand(HISTORIES, ITEMS, generator=random).argsort(1)
    return order[:, :LENGTH] + RESERVED_ROWS


class Model(torch.nn.Module):
    """A causal encoder on a table of its own."""

    def __init__(self, repeats: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = torch.nn.Parameter(0.02 * torch.randn(ROWS, WIDTH))
        self.encoder = Encoder("causal", WIDTH, 1, 8, 16, 2, 4, 0.0, True, repeats=repeats)
        self.loss = FullSoftmax(rank=0)

    def forward(self, items_BL: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean loss, and the repeat scores."""
        items_T = items_BL.flatten()
        targets_BL = torch.zeros_like(items_BL)
        targets_BL[:, :-1] = items_BL[:, 1:]
        h_TD = self.encoder(self.table[items_T], OFFSETS)
        histories = score_T = None
        if self.encoder.repeats:
            score_T = self.encoder.repeat_score(h_TD)
            histories = SeenItems.of(items_T, OFFSETS, None, score_T)
        ids = torch.arange(ROWS)
        total = self.loss(h_TD, targets_BL.flatten(), self.table, ids, None, histories)
        return total / (HISTORIES * (LENGTH - 1)), score_T


def trained(make, repeats: bool) -> tuple[float, float]:
    """The loss on unseen histories after 60 steps, and the mean repeat score there."""
    model, random = Model(repeats), torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(model.parameters(), 2e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(make(random))[0].backward()
        optimizer.step()
    with torch.no_grad():
        loss, score_T = model(make(torch.Generator().manual_seed(3)))
    return float(loss), 0.0 if score_T is None else float(score_T.mean())


@pytest.mark.parametrize(("make", "sign"), [(habits, 1), (novelties, -1)])
def test_repeats_are_learned_in_either_direction(make, sign):
    without, _ = trained(make, repeats=False)
    loss, score = trained(make, repeats=True)
    assert sign * score > 1
    # log(items) is what knows nothing; of novelties, log of the items left is the best there is.
    best = torch.log(ITEMS - torch.arange(1.0, LENGTH)).mean()
    assert loss < without - 0.1
    assert make is habits or loss < best + 0.1


def test_bytes_are_those_of_whole_tiles():
    assert first_bytes(3, 1) == first_bytes(3, 128) == 3 * 128 * 4
    histories = SeenItems.of(torch.full((5,), 9), torch.tensor([0, 5]), None, torch.zeros(5))
    first_ZC = histories.repeats_of_slice(0, 200).first_ZC
    assert first_ZC.untyped_storage().nbytes() == first_bytes(2, 200) + 4  # and a place for none
