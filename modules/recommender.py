"""What the trainer trains: item table, encoder and loss, in one module that takes a batch.

Legend: T tokens, S read positions, C candidates, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from data.batch import CANDIDATES, HISTORY, SequenceBatch
from modules.encoder import Encoder
from modules.item_table import ItemTable
from modules.losses import FullSoftmax, SampledSoftmax

Loss = FullSoftmax | SampledSoftmax


class Recommender(nn.Module):
    """SSD4Rec for training. `autocast` is the dtype of the encoder's and loss's products."""

    def __init__(
        self,
        table: ItemTable,
        encoder: Encoder,
        loss: Loss,
        autocast: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.table, self.encoder, self.loss, self.autocast = table, encoder, loss, autocast
        self.drop_nonfinite_rows = False  # whether rows keep clear of gradients that are not finite
        self._captured: Callable[..., Tensor] | None = None

    def forward(self, batch: SequenceBatch) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar."""
        x_TD, c_CD = self.table(batch.features)
        if self.drop_nonfinite_rows and torch.is_grad_enabled():
            x_TD.register_hook(_zero_unless_finite)
            c_CD.register_hook(_zero_unless_finite)
        core = self._core(batch) if self._captured is None else self._captured
        return core(x_TD, c_CD, *_tensors(batch))

    def hidden(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """(hidden states [S, D] at the read positions, candidate rows [C, D])."""
        x_TD, c_CD = self.table(batch.features)
        return self.encode(x_TD, batch.offsets_B1, batch.read_positions_S), c_CD

    def encode(self, x_TD: Tensor, offsets_B1: Tensor, read_positions_S: Tensor | None) -> Tensor:
        """The encoder alone, with its products in `autocast`; hidden states [S, D]."""
        with _products(x_TD, self.autocast):
            return self.encoder(x_TD, offsets_B1, read_positions_S)

    def capture(self, batch: SequenceBatch) -> None:
        """Capture encoder and loss, forward and backward, as CUDA graphs of this batch's shapes.

        Launching the encoder's few hundred kernels one by one costs more than running them. The
        table stays outside: its input distribution depends on the ids. To be called on CUDA, in
        training mode, before anything hangs hooks on the parameters (DDP).
        """
        width = self.table.width
        x_TD, c_CD = (
            torch.randn(count, width, device=batch.offsets_B1.device, requires_grad=True)
            for count in (
                batch.features[HISTORY].values().numel(),
                batch.features[CANDIDATES].values().numel(),
            )
        )
        core = self._core(batch)
        core.train()
        arguments = (x_TD, c_CD, *_tensors(batch))
        # Not as an attribute, which would register its parameters a second time.
        object.__setattr__(self, "_captured", torch.cuda.make_graphed_callables(core, arguments))

    def _core(self, batch: SequenceBatch) -> "_EncoderAndLoss":
        reads, corrected = batch.read_positions_S is not None, batch.log_counts_C is not None
        return _EncoderAndLoss(self.encoder, self.loss, self.autocast, reads, corrected)


class _EncoderAndLoss(nn.Module):
    """From rows to the sum of losses: what a CUDA graph can hold. Takes tensors alone."""

    def __init__(
        self, encoder: Encoder, loss: Loss, autocast: torch.dtype, reads: bool, corrected: bool
    ) -> None:
        super().__init__()
        self.encoder, self.loss, self.autocast = encoder, loss, autocast
        self.reads, self.corrected = reads, corrected

    def forward(
        self,
        x_TD: Tensor,
        c_CD: Tensor,
        offsets_B1: Tensor,
        targets_S: Tensor,
        candidates_C: Tensor,
        *optional: Tensor,
    ) -> Tensor:
        rest = list(optional)
        read_positions_S = rest.pop(0) if self.reads else None
        log_counts_C = rest.pop(0) if self.corrected else None
        with _products(x_TD, self.autocast):
            h_SD = self.encoder(x_TD, offsets_B1, read_positions_S)
            return self.loss(h_SD, targets_S, c_CD, candidates_C, log_counts_C)


def _zero_unless_finite(gradient: Tensor) -> Tensor:
    return torch.where(torch.isfinite(gradient).all(), gradient, torch.zeros_like(gradient))


def _tensors(batch: SequenceBatch) -> list[Tensor]:
    """What `_EncoderAndLoss` takes of a batch besides the rows, in its order."""
    optional = [batch.read_positions_S, batch.log_counts_C]
    return [
        batch.offsets_B1,
        batch.targets_S,
        batch.features[CANDIDATES].values(),
        *(one for one in optional if one is not None),
    ]


def _products(like: Tensor, autocast: torch.dtype) -> torch.autocast:
    # Without the cache of cast weights, which a captured graph cannot share.
    return torch.autocast(
        like.device.type,
        dtype=autocast if autocast != torch.float32 else torch.bfloat16,
        enabled=autocast != torch.float32,
        cache_enabled=False,
    )
