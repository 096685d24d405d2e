"""The one item table: an EmbeddingCollection that serves histories and candidates.

Row values at the start are a function of (seed, row, column) alone, so that a run does not depend
on the number of ranks or the kind of sharding, no two rows are equal, and a grown table's new rows
follow the same rule. TorchRec's own initialisation on the meta device gives every shard the same
values under equal seeds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionContext
from torchrec.distributed.embedding_types import KJTList
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.batch import CANDIDATES, HISTORY
from modules.row_exchange import CrossedIds, RowExchange

TABLE = "item"
ROW_STD = 0.02
# Rows in one go of `fill_rows`: bounds its temporaries to a few times this many numbers.
FILL_NUMBERS = 1 << 24


@dataclass(frozen=True)
class Exchanged:
    """Ids at the ranks that hold their rows, and what TorchRec needs to bring the rows back."""

    collection: Any  # an EmbeddingCollection, sharded
    context: EmbeddingCollectionContext
    ids: KJTList

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory until this stream, another than the exchange's, is done with it."""
        self.context.record_stream(stream)
        self.ids.record_stream(stream)

    def rows(self) -> tuple[Tensor, Tensor]:
        """History rows and candidate rows. Collective, once."""
        rows = self.collection.compute_and_output_dist(self.context, self.ids)
        return rows[HISTORY].values(), rows[CANDIDATES].values()


class ItemTable(nn.Module):
    """Rows [V, D] of the item table; `features` in, history rows and candidate rows out."""

    def __init__(
        self,
        rows: int,
        width: int,
        dtype: DataType = DataType.FP32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.rows, self.width = rows, width
        config = EmbeddingConfig(
            name=TABLE,
            num_embeddings=rows,
            embedding_dim=width,
            data_type=dtype,
            feature_names=[HISTORY, CANDIDATES],
            init_fn=torch.nn.init.zeros_,  # the values come from `fill_rows`, where the rows live
        )
        self.collection = EmbeddingCollection(tables=[config], device=device)
        self._lookup: Callable[[Tensor, Tensor], Tensor] | None = None
        self._runs: RowExchange | None = None

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        """(history rows [T, D], candidate rows [C, D])."""
        if self._lookup is not None:
            rows = self._lookup(features.values(), features.offsets().long())
            x_TD, c_CD = rows.split(features.length_per_key())
            return x_TD, c_CD
        if self._runs is not None:
            return self._runs.send_ids(features).rows()
        rows = self.collection(features)
        return rows[HISTORY].values(), rows[CANDIDATES].values()

    def exchange(self, features: KeyedJaggedTensor) -> Exchanged | CrossedIds:
        """The first half of `forward` where the table is sharded: the ids, not yet their `rows`.

        Collective, and the host waits for the current stream.
        """
        if self._runs is not None:
            return self._runs.send_ids(features)
        context = self.collection.create_context()
        ids = self.collection.input_dist(context, features).wait().wait()
        return Exchanged(self.collection, context, ids)

    @property
    def alone(self) -> bool:
        """Whether no id or row leaves this rank (`serve_alone`)."""
        return self._lookup is not None

    def serve_alone(self, kernel: nn.Module) -> None:
        """Look up by the one FBGEMM kernel that holds the whole table (ids, offsets -> rows).

        What TorchRec puts around it to exchange ids and rows between ranks costs a single rank more
        of the host than the lookup itself, and one wait for the device a step.
        """
        self._lookup = kernel.forward  # not the module, which would be registered twice

    def serve_runs(self, exchange: RowExchange) -> None:
        """Look up by ours, where each rank holds one run of the table's rows."""
        self._runs = exchange


@torch.no_grad()
def fill_rows(weight_VD: Tensor, seed: int, first_row: int = 0, first_column: int = 0) -> None:
    """Fill a table, or the shard of one that starts at (first_row, first_column), with N(0, 0.02).

    Works block by block on the tensor's own device. The value at (row, column) is the normal
    quantile of a hash of (seed, row, column).
    """
    rows, width = weight_VD.shape
    columns_D = torch.arange(first_column, first_column + width, device=weight_VD.device)
    step = max(1, FILL_NUMBERS // max(1, width))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        rows_R = torch.arange(first_row + start, first_row + stop, device=weight_VD.device)
        hashed_RD = _mix(_mix(rows_R + _mix_seed(seed))[:, None] ^ columns_D)
        # 23 bits, centred in their cell, are exact in fp32 and never 0 or 1.
        uniform_RD = ((hashed_RD >> 20) & 0x7FFFFF).to(torch.float32).add_(0.5).div_(1 << 23)
        normal_RD = torch.erfinv(uniform_RD.mul_(2).sub_(1)).mul_(2**0.5 * ROW_STD)
        weight_VD[start:stop].copy_(normal_RD)


def _mix_seed(seed: int) -> int:
    return int(_mix(torch.tensor(seed, dtype=torch.int64)))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on int64, whose products wrap like uint64's."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as int64
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB as int64
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: int64's own shift repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
