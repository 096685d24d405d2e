"""What lies behind the lookups: encoder and loss, from rows to one number. Without TorchRec.

Legend: T tokens, S read positions, C candidates, D width.
"""

import torch
from torch import Tensor, nn

from data.positions import Positions
from modules.encoder import Encoder
from modules.losses import FullSoftmax, SampledSoftmax
from modules.repeats import SeenItems

Loss = FullSoftmax | SampledSoftmax


class BehindTable(nn.Module):
    """Encoder and loss. `autocast` is the dtype of their products."""

    def __init__(self, encoder: Encoder, loss: Loss, autocast: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder, self.loss, self.autocast = encoder, loss, autocast

    def loss_of_rows(
        self, x_TD: Tensor, c_CD: Tensor, candidates_C: Tensor, batch: Positions
    ) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar.

        x_TD, c_CD: the batch's history and candidate rows. candidates_C: the candidates' ids.
        """
        with _products(x_TD, self.autocast):
            # In the products' dtype, to which the loss would round it anyway.
            kind = self.autocast if x_TD.dtype == torch.float32 else x_TD.dtype
            h_SD = self.encode(x_TD, batch.offsets_B1, batch.read_positions_S, kind)
            return self.loss(
                h_SD,
                batch.targets_S,
                c_CD,
                candidates_C,
                batch.log_counts_C,
                self.histories(h_SD, batch),
            )

    def histories(self, h_SD: Tensor, batch: Positions) -> SeenItems | None:
        """What the loss needs to know repeats, for an encoder that scores them."""
        if not self.encoder.repeats:
            return None
        score_S = self.encoder.repeat_score(h_SD)
        return SeenItems.of(batch.items_T, batch.offsets_B1, batch.read_positions_S, score_S)

    def encode(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        read_positions_S: Tensor | None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The encoder alone, with its products in `autocast`; hidden states [S, D]."""
        # A batch that names read positions names the last token of each sequence.
        read_last = read_positions_S is not None
        with _products(x_TD, self.autocast):
            return self.encoder(x_TD, offsets_B1, read_positions_S, read_last, dtype)


def _products(like: Tensor, autocast: torch.dtype) -> torch.autocast:
    # Without the cache of cast weights, which a captured graph cannot share.
    return torch.autocast(
        like.device.type,
        dtype=autocast if autocast != torch.float32 else torch.bfloat16,
        enabled=autocast != torch.float32,
        cache_enabled=False,
    )
