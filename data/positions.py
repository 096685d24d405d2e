"""Positions: what stands behind the lookups of a packed batch. Without TorchRec.

Legend: T tokens, B sequences, S read positions (where a hidden state is read), C candidates.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Positions:
    """Where the sequences lie, where they are read, and what follows there.

    offsets_B1: int64. Sequence b is tokens offsets[b] to offsets[b+1]. Unused sequences are empty
        and stand last: their offsets equal the number of tokens in use.
    targets_S: int64, the table row that follows each read position; PADDING_ROW is no target.
    read_positions_S: int64, the last token of each sequence, whose hidden state is read (S = B), or
        None for every token (S = T). Those of unused sequences are token 0 and have no target.
    log_counts_C: float32, log of each candidate's expected count among the draws (the logQ
        correction), or None where every item is a candidate once.
    items_T: int64, the history's items as they are, unmasked.
    """

    offsets_B1: Tensor
    targets_S: Tensor
    read_positions_S: Tensor | None
    log_counts_C: Tensor | None
    items_T: Tensor
