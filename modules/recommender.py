"""What the trainer trains: item table, encoder and loss, in one module that takes a batch.

Legend: T tokens, S read positions, C candidates, D width.
"""

import torch
from torch import Tensor

from data.batch import SequenceBatch
from modules.behind_table import BehindTable, Loss
from modules.encoder import Encoder
from modules.item_table import ItemTable


class Recommender(BehindTable):
    """SSD4Rec for training: the item table in front of `BehindTable`."""

    def __init__(
        self,
        table: ItemTable,
        encoder: Encoder,
        loss: Loss,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(encoder, loss, autocast)
        self.table = table

    def forward(self, batch: SequenceBatch) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar."""
        x_TD, c_CD = self.table(batch.features)
        return self.loss_of_rows(x_TD, c_CD, batch.candidates_C, batch)

    def hidden(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [S, D] at the read positions, candidate rows [C, D])."""
        x_TD, c_CD = self.table(batch.features)
        return self.encode(x_TD, batch.offsets_B1, batch.read_positions_S), c_CD
