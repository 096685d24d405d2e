"""What a position's history already holds: the items whose score the model raises or lowers.

People watch a film once and buy coffee every week. A dot product of a user vector with an item row
cannot tell the items of a history from their neighbours, so the encoder adds one number to all of
them, `Encoder.repeat_score`: learned, and its own at every position.

Legend: T tokens, S read positions of this rank, N positions of all ranks, Z sequences of all ranks,
C candidates, W ranks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.collectives import all_gather, world_size
from modules.ssd import sequence_of_tokens

NEVER = 2**31 - 1
WHOLE_TILES = 128  # a multiple of the candidates of each tile of modules.kernels.softmax


class SeenItems(NamedTuple):
    """The tokens of a batch, the positions that are read there, and their repeat scores.

    items_T: int64 table rows, unmasked. sequence_T: int64, B for padding. token_S: int64.
    score_S: fp32. sequences: B + 1, with the padding's.
    """

    items_T: Tensor
    sequence_T: Tensor
    token_S: Tensor
    score_S: Tensor
    sequences: int

    @classmethod
    def of(
        cls, items_T: Tensor, offsets_B1: Tensor, read_S: Tensor | None, score_S: Tensor
    ) -> "SeenItems":
        tokens = len(items_T)
        sequence_T = sequence_of_tokens(offsets_B1, tokens)
        token_S = torch.arange(tokens, device=items_T.device) if read_S is None else read_S
        return cls(items_T, sequence_T, token_S, score_S, len(offsets_B1))

    @property
    def sequence_S(self) -> Tensor:
        return self.sequence_T[self.token_S]

    def gathered(self) -> "SeenItems":
        """Those of all ranks, with sequences numbered through; tokens stay as they are."""
        if world_size() == 1:
            return self
        first = torch.arange(world_size(), device=self.items_T.device) * self.sequences
        sequence_WT = all_gather(self.sequence_T).view(world_size(), -1) + first[:, None]
        tokens = len(self.items_T)
        token_WS = all_gather(self.token_S).view(world_size(), -1)
        row_WS = token_WS + torch.arange(world_size(), device=first.device)[:, None] * tokens
        return SeenItems(
            all_gather(self.items_T),
            sequence_WT.flatten(),
            row_WS.flatten(),
            all_gather(self.score_S),
            self.sequences * world_size(),
        )

    def repeats_of_slice(self, first_row: int, candidates: int) -> "Repeats":
        """Of the candidates that are the table's rows `first_row` and following."""
        place_T = self.items_T - first_row
        place_T = place_T.where((place_T >= 0) & (place_T < candidates), -1)
        return self._repeats(self._first(place_T, candidates))

    def repeats_of(self, candidates_C: Tensor) -> "Repeats":
        """Of any candidates, some of them perhaps the same item."""
        sorted_C, _ = candidates_C.sort()
        place_T = torch.searchsorted(sorted_C, self.items_T).clamp(max=len(sorted_C) - 1)
        place_T = place_T.where(sorted_C[place_T] == self.items_T, -1)
        first_ZC = self._first(place_T, len(sorted_C))
        column_C = torch.searchsorted(sorted_C, candidates_C)
        columns = F.pad(column_C, (0, _stride(len(column_C)) - len(column_C)))
        return self._repeats(first_ZC.index_select(1, columns)[:, : len(column_C)])

    def score_of(self, items_S: Tensor) -> Tensor:
        """The repeat score of each position's own item: 0 where its history does not hold it."""
        rows = torch.maximum(self.items_T.max(), items_S.max()) + 1
        key_T, order_T = (self.sequence_T * rows + self.items_T).sort(stable=True)
        key_S = self.sequence_S * rows + items_S
        place_S = torch.searchsorted(key_T, key_S).clamp(max=len(key_T) - 1)
        held_S = (key_T[place_S] == key_S) & (order_T[place_S] <= self.token_S)
        return self.score_S.where(held_S, 0.0)

    def _first(self, place_T: Tensor, candidates: int) -> Tensor:
        """int32 [Z, C]: the token at which a sequence first holds a candidate, or NEVER."""
        stride = _stride(candidates)
        first = place_T.new_full((self.sequences * stride + 1,), NEVER, dtype=torch.int32)
        at_T = (self.sequence_T * stride + place_T).where(place_T >= 0, len(first) - 1)
        token_T = torch.arange(len(place_T), device=place_T.device, dtype=torch.int32)
        first.scatter_reduce_(0, at_T, token_T, "amin")
        return first[:-1].view(self.sequences, stride)[:, :candidates]

    def _repeats(self, first_ZC: Tensor) -> "Repeats":
        return Repeats(first_ZC, self.sequence_S, self.token_S.int(), self.score_S)


class Repeats(NamedTuple):
    """Position n's score is added to candidate c where `first_ZC[sequence_N[n], c] <= token_N[n]`.

    first_ZC: int32, rows at a multiple of WHOLE_TILES in memory. sequence_N: int64. token_N: int32.
    score_N: fp32, the only one with a gradient.
    """

    first_ZC: Tensor
    sequence_N: Tensor
    token_N: Tensor
    score_N: Tensor


def _stride(candidates: int) -> int:
    return -(-candidates // WHOLE_TILES) * WHOLE_TILES


def first_bytes(sequences: int, candidates: int) -> int:
    """Bytes of `first_ZC`."""
    return 4 * sequences * _stride(candidates)
