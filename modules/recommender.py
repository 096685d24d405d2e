"""What the trainer trains: item table, encoder and loss, in one module that takes a batch.

Legend: T tokens, S read positions, C candidates, D width.
"""

import torch
from torch import Tensor, nn

from data.batch import CANDIDATES, SequenceBatch
from modules.encoder import Encoder
from modules.item_table import ItemTable
from modules.losses import FullSoftmax, SampledSoftmax


class Recommender(nn.Module):
    """SSD4Rec for training. `autocast` is the dtype of the encoder's and loss's products."""

    def __init__(
        self,
        table: ItemTable,
        encoder: Encoder,
        loss: FullSoftmax | SampledSoftmax,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.table, self.encoder, self.loss, self.autocast = table, encoder, loss, autocast

    def forward(self, batch: SequenceBatch) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar."""
        h_SD, c_CD = self.hidden(batch)
        with self._products(h_SD):
            return self.loss(
                h_SD,
                batch.targets_S,
                c_CD,
                batch.features[CANDIDATES].values(),
                batch.log_counts_C,
            )

    def hidden(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [S, D] at the read positions, candidate rows [C, D])."""
        x_TD, c_CD = self.table(batch.features)
        with self._products(x_TD):
            return self.encoder(x_TD, batch.offsets_B1, batch.read_positions_S), c_CD

    def _products(self, like: Tensor) -> torch.autocast:
        return torch.autocast(
            like.device.type,
            dtype=self.autocast if self.autocast != torch.float32 else torch.bfloat16,
            enabled=self.autocast != torch.float32,
        )
