"""The scriptable model that is exported: packed histories in, the best items and scores out.

Legend: T packed tokens, B sequences, V table rows, D width, R rows of one block, K = k,
N pairs to leave out, M those that lie in a block, P pairs seen, F numbers of a user's state.

The item rows are no part of the module: they are plain tensors (fp32, fp16, or int8 with one scale
a row) in blocks, given once by `set_rows` on the device that computes, and turned to fp32 a block
at a time. So one `model.pt` serves every row format, CPU and CUDA, and loading maps the rows from
their files. Everything computes in fp32.
"""

import torch
from torch import Tensor, nn

from data.schema import RESERVED_ROWS
from modules.encoder import Encoder
from modules.ssd import sequence_of_tokens

NO_ROW = -1  # where fewer than k items remain; its score is -inf
SCORE_BYTES = 1 << 26  # scores, and dequantised rows, held at once: 64 MiB of each


class Scorer(nn.Module):
    """Encoder, item rows and the exact top-k over the whole catalogue.

    score_bytes: the most bytes of scores, and of dequantised rows, that are held at once.
    """

    rows: list[Tensor]
    scales: list[Tensor]
    first_rows: list[int]

    def __init__(self, encoder: Encoder, score_bytes: int = SCORE_BYTES) -> None:
        super().__init__()
        self.encoder = encoder.float().eval()
        self.score_bytes = score_bytes
        self.reserved_rows = RESERVED_ROWS
        self.no_row = NO_ROW
        self.table_rows = 0
        self.width = 0
        # A causal encoder's state and, behind it, the user vector h; 0 where it has no state.
        self.state_numbers = encoder.state_numbers + encoder.width if encoder.causal else 0
        self.rows, self.scales, self.first_rows = [], [], []

    @torch.jit.export
    def set_rows(self, rows: list[Tensor], scales: list[Tensor]) -> None:
        """The table's rows in order, in blocks [R, D] of fp32, fp16 or int8.

        scales: fp32 [R] a block where the rows are int8, else empty.
        """
        first_rows: list[int] = []  # a local, because TorchScript takes a bare [] for tensors
        self.table_rows = 0
        for block in rows:
            first_rows.append(self.table_rows)
            self.table_rows += block.shape[0]
            self.width = block.shape[1]
        self.rows, self.scales, self.first_rows = rows, scales, first_rows

    def forward(
        self,
        items_T: Tensor,
        offsets_B1: Tensor,
        k: int,
        exclude_seen: bool = True,
        exclude_items_N: Tensor | None = None,
        exclude_sequences_N: Tensor | None = None,
        allowed_V: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(table rows [B, k] int64, scores [B, k] fp32), best first.

        items_T: int64 table rows; sequence b is tokens offsets[b] to offsets[b+1], oldest first.
        exclude_seen: leave out the items of the sequence itself; otherwise an encoder with
            `repeats` adds its repeat score to them.
        exclude_items_N, exclude_sequences_N: further pairs (item, sequence) to leave out.
        allowed_V: bool, the table rows that may be recommended; None for all.

        Reserved rows are never recommended. Where fewer than k items remain, and for an empty
        sequence, of which the model knows nothing, the rest is NO_ROW with -inf. Equal scores
        stand in no particular order.
        """
        used = int(offsets_B1[-1])
        nothing = items_T[:0]
        seen_P, seen_by_P = items_T[:used], sequence_of_tokens(offsets_B1, used)
        items_N, sequences_N = nothing, nothing
        if exclude_seen:
            items_N, sequences_N, seen_P, seen_by_P = seen_P, seen_by_P, nothing, nothing
        if exclude_items_N is not None and exclude_sequences_N is not None:
            items_N = torch.cat([items_N, exclude_items_N])
            sequences_N = torch.cat([sequences_N, exclude_sequences_N])
        h_BD = self.hidden(items_T, offsets_B1)
        rows_BK, scores_BK = self.top(h_BD, k, items_N, sequences_N, allowed_V, seen_P, seen_by_P)
        empty_B1 = (offsets_B1[1:] == offsets_B1[:-1]).unsqueeze(1)
        return rows_BK.masked_fill(empty_B1, self.no_row), scores_BK.masked_fill(
            empty_B1, -float("inf")
        )

    @torch.jit.export
    def hidden(self, items_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The user vectors h [B, D]: the encoder's output at each last token; 0 where empty."""
        with torch.no_grad():
            sequences = offsets_B1.shape[0] - 1
            if items_T.shape[0] == 0:
                return torch.zeros([sequences, self.width], device=items_T.device)
            last_B = (offsets_B1[1:] - 1).clamp(min=0)
            h_BD = self.encoder(self.look_up(items_T), offsets_B1, last_B)
            empty_B1 = (offsets_B1[1:] == offsets_B1[:-1]).unsqueeze(1)
            return h_BD.masked_fill(empty_B1, 0.0)

    @torch.jit.export
    def top(
        self,
        h_BD: Tensor,
        k: int,
        exclude_items_N: Tensor,
        exclude_sequences_N: Tensor,
        allowed_V: Tensor | None = None,
        seen_items_P: Tensor | None = None,
        seen_sequences_P: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k best items for user vectors, as `forward`; pairs (item, sequence) are left out.

        seen_items_P, seen_sequences_P: pairs that get the encoder's repeat score, if it has one.
        """
        if k < 1:
            raise RuntimeError(f"k={k} must be at least 1")
        seen_P, seen_by_P = exclude_items_N[:0], exclude_items_N[:0]
        repeat_B = torch.zeros(h_BD.shape[0], device=h_BD.device)
        if self.encoder.repeats and seen_items_P is not None and seen_sequences_P is not None:
            seen_P, seen_by_P = seen_items_P, seen_sequences_P
            repeat_B = self.encoder.repeat_score(h_BD)
        best_score = torch.full([h_BD.shape[0], k], -float("inf"), device=h_BD.device)
        best_row = torch.full([h_BD.shape[0], k], self.no_row, device=h_BD.device)
        wider = max(h_BD.shape[0], h_BD.shape[1], 1)
        step = max(1, self.score_bytes // (4 * wider))
        with torch.no_grad():
            for number in range(len(self.rows)):
                block = self.rows[number]
                for start in range(0, block.shape[0], step):
                    stop = min(start + step, block.shape[0])
                    first = self.first_rows[number] + start
                    scores = h_BD @ self._dequantised(number, start, stop).t()
                    scores[:, : max(0, self.reserved_rows - first)] = -float("inf")
                    if seen_P.shape[0] > 0:
                        repeated = (seen_P >= first) & (seen_P < first + stop - start)
                        repeated_M = repeated.nonzero().squeeze(1)
                        seen_M, by_M = seen_P[repeated_M] - first, seen_by_P[repeated_M]
                        # an item seen twice is written twice, with one value
                        scores[by_M, seen_M] = scores[by_M, seen_M] + repeat_B[by_M]
                    if allowed_V is not None:
                        scores.masked_fill_(~allowed_V[first : first + stop - start], -float("inf"))
                    here = (exclude_items_N >= first) & (exclude_items_N < first + stop - start)
                    here_M = here.nonzero().squeeze(1)
                    sequences_M = exclude_sequences_N[here_M]
                    scores[sequences_M, exclude_items_N[here_M] - first] = -float("inf")
                    score, place = scores.topk(min(k, stop - start), dim=1)
                    if first == 0 and stop - start >= k:
                        best_score, best_row = score, place
                    else:
                        best_score, merged = torch.cat([best_score, score], 1).topk(k, dim=1)
                        best_row = torch.cat([best_row, place + first], 1).gather(1, merged)
        return best_row.masked_fill(best_score == -float("inf"), self.no_row), best_score

    @torch.jit.export
    def advance(self, state_BF: Tensor, items_B: Tensor) -> Tensor:
        """The states of B users one event later, fp32 [B, F]; a new user's is 0.

        F = state_numbers. The last D numbers are h as `hidden` gives it for the whole history.
        """
        with torch.no_grad():
            carried = state_BF[:, : self.state_numbers - self.width]
            h_BD, carried = self.encoder.step(self.look_up(items_B), carried)
            return torch.cat([carried, h_BD], 1)

    @torch.jit.export
    def look_up(self, items_T: Tensor) -> Tensor:
        """Rows of the table, fp32 [T, D]. Raises for a row that the table lacks."""
        low, high = int(items_T.min()), int(items_T.max())
        if low < 0 or high >= self.table_rows:
            raise RuntimeError(f"items {low} to {high} are outside the table's {self.table_rows}")
        x_TD = torch.empty([items_T.shape[0], self.width], device=items_T.device)
        for number in range(len(self.rows)):
            first = self.first_rows[number]
            here_T = (items_T >= first) & (items_T < first + self.rows[number].shape[0])
            place_M = here_T.nonzero().squeeze(1)
            row_M = items_T[place_M] - first
            x_MD = self.rows[number].index_select(0, row_M).float()
            if len(self.scales) > 0:
                x_MD = x_MD * self.scales[number].index_select(0, row_M).unsqueeze(1)
            x_TD.index_copy_(0, place_M, x_MD)
        return x_TD

    def _dequantised(self, number: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of a block, fp32 [R, D]."""
        rows_RD = self.rows[number][start:stop].float()
        if len(self.scales) > 0:
            rows_RD = rows_RD * self.scales[number][start:stop].unsqueeze(1)
        return rows_RD


def quantise(rows_RD: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """Rows in a bundle's format, fp32 | fp16 | int8, and for int8 their scales, fp32 [R].

    int8: row = scale * integer, scale = max |row| / 127, so no value is off by more than half a
    scale.
    """
    rows_RD = rows_RD.float()
    match kind:
        case "fp32":
            return rows_RD, None
        case "fp16":
            return rows_RD.half(), None
        case "int8":
            scales_R = rows_RD.abs().amax(1) / 127.0
            scales_R = scales_R.where(scales_R > 0, 1.0)
            return torch.round(rows_RD / scales_R.unsqueeze(1)).to(torch.int8), scales_R
    raise ValueError(f"rows are fp32, fp16 or int8, not {kind}")
