"""Lookups in a table whose ranks each hold one run of rows: ids go there, rows and gradients back.

TorchRec's row-wise sharding does the same for any number of tables and features. Its Python takes
the host several milliseconds a step, more than the device needs for a small model, and its ids
take three collectives. One table needs two, and a dozen operators.

Legend: T ids of this rank, R ids that it receives, D width, W ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.batch import IDS_A_SAMPLE
from modules.collectives import world_size


@dataclass(frozen=True)
class CrossedIds:
    """Ids at the ranks that hold their rows. lookup: see `RowExchange`.

    ids_R: counted from the first row of this rank. sent, received: how many go to, and came from,
    each rank. place_T: the place of each of this rank's own ids among those that it sent. parts:
    how many of these are of each feature.
    """

    lookup: Callable[[Tensor, Tensor], Tensor]
    parts: list[int]
    ids_R: Tensor
    sent: list[int]
    received: list[int]
    place_T: Tensor

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until this stream, another than the exchange's, is done with it."""
        self.ids_R.record_stream(stream)
        self.place_T.record_stream(stream)

    def rows(self) -> tuple[Tensor, Tensor]:
        """History rows and candidate rows, in the order of the ids. Collective, once."""
        R = len(self.ids_R)
        samples = 2 * max(1, -(-R // (2 * IDS_A_SAMPLE)))
        starts = torch.arange(samples + 1, device=self.ids_R.device) * IDS_A_SAMPLE
        rows_RD = self.lookup(self.ids_R, starts.clamp_(max=R))
        x_TD, c_CD = _RowsBack.apply(rows_RD, self).split(self.parts)
        return x_TD, c_CD


class RowExchange:
    """Sends ids to where their rows are.

    lookup: (ids, offsets of samples) -> rows, of this rank's part, for two features. rows_a_rank:
    of every rank but, perhaps, the last. group: of the ids; rows and gradients go by the default.
    """

    def __init__(
        self,
        lookup: Callable[[Tensor, Tensor], Tensor],
        rows_a_rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.lookup, self.rows_a_rank, self.group = lookup, rows_a_rank, group

    def send_ids(self, features: KeyedJaggedTensor) -> CrossedIds:
        """Collective. The host waits for the current stream, to know how many ids come."""
        ids_T, ranks = features.values(), world_size()
        lengths, sent_T, _, _, place_T = torch.ops.fbgemm.block_bucketize_sparse_features(
            features.lengths(),
            ids_T,
            bucketize_pos=False,
            sequence=True,
            block_sizes=ids_T.new_full((1,), self.rows_a_rank),
            my_size=ranks,
        )
        counts_2W = ids_T.new_empty(2, ranks)
        torch.sum(lengths.view(ranks, -1), 1, dtype=torch.int64, out=counts_2W[0])
        dist.all_to_all_single(counts_2W[1], counts_2W[0], group=self.group)
        sent, received = counts_2W.tolist()
        ids_R = ids_T.new_empty(sum(received))
        dist.all_to_all_single(ids_R, sent_T, received, sent, group=self.group)
        parts = features.length_per_key()
        return CrossedIds(self.lookup, parts, ids_R, sent, received, place_T)


class _RowsBack(torch.autograd.Function):
    """Rows to the ranks that asked; in the backward their gradients, averaged over ranks as by
    TorchRec, to the ranks that hold the rows."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, crossed: CrossedIds) -> Tensor:
        ctx.crossed = crossed
        came_TD = rows_RD.new_empty(len(crossed.place_T), rows_RD.shape[1])
        dist.all_to_all_single(came_TD, rows_RD, crossed.sent, crossed.received)
        return came_TD.index_select(0, crossed.place_T)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None]:
        crossed: CrossedIds = ctx.crossed
        sent_TD = torch.empty_like(gradient_TD, memory_format=torch.contiguous_format)
        sent_TD.index_copy_(0, crossed.place_T, gradient_TD).div_(world_size())
        gradient_RD = sent_TD.new_empty(len(crossed.ids_R), sent_TD.shape[1])
        dist.all_to_all_single(gradient_RD, sent_TD, crossed.received, crossed.sent)
        return gradient_RD, None
