"""The exact top k of a large catalogue: half-precision products find a superset and prove it.

    approx = h' . r'       fp16, h' and r' scaled to norms of at most 2^4 and 2^8
    C candidates           those of the largest approx, C about 2 k, 256 at least
    score = h . r          fp32, of the candidates alone; the best k of them are the answer
    proof                  every other item has approx <= a, the least of the candidates, so its
                           score, scaled, is at most a + ERROR; where that is below the k-th score
                           found, no item was missed

"Exact" therefore means: the k largest fp32 scores of the stored rows and the given h, as though
every item had been scored in fp32. A user for whom the proof fails is flagged, and the caller ranks
all items in fp32 (`modules.scorer.Scorer.top`).

ERROR, as a share of |h| max |r|, D the width: 2^-10 for rounding h and r to fp16, 2^-11 for
rounding the product to fp16, D 2^-21 for sums in fp32, most of it in reserve. Between the ranks k
and C scores have to fall by that much; normal scores of a million items fall eight times as far. A
repeat score, which items of a history may get on top, costs a rounding more: 2^-11 of itself.

Why so. A user and a million items of width 256 are 0.51 GFLOP: 0.6 us of an H100's tensor cores,
10 us of its fp32 units. A row of fp32 scores is 4 MB, and `torch.topk` reads its input about six
times, 9 us at 3 TB/s. In fp16 a row is written once and read once, 1.3 us, for the largest of each
group of 64 items, and `topk` sees those 15,632 maxima alone. The C best items lie in the C groups
of the largest maxima, so a second `topk` sees 64 C scores. What is left out (seen items, a list a
user) is set to -inf in the fp16 scores; what nobody may get is no column of the product at all.

Legend: B users, V table rows, I items that may be recommended, J columns of a block of them (and
padding), G = J / 64 groups, C candidates, D width, N pairs to leave out, K = k.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schema import RESERVED_ROWS
from modules.scorer import NO_ROW

GROUP = 64  # near the square root of items / candidates, where both selections cost the same
COLUMNS = 8 * GROUP  # columns come in so many: 8 groups side by side are 16 bytes of fp16
CANDIDATES = 256  # at least
H_NORM, ROW_NORM = 16.0, 256.0  # after scaling: products of at most 2^12
MOST_REPEAT = 2.0**15  # a scaled repeat score: sums stay below fp16's 65,504
SCORE_BYTES = 1 << 31  # fp16 scores held at once
BLOCK_ITEMS = 1 << 20  # of a product: larger catalogues are done in several
USER_TILE = 128  # rows of a product's tile
CONVERT_ROWS = 1 << 16  # table rows turned into fp16 at once
TINY = 1e-30  # keeps 0 from being divided by


@dataclass(frozen=True)
class RepeatPairs:
    """Pairs (table row, user) whose scores get the user's repeat score on top, fp32 [B].

    A pair may stand there twice and counts once. keys_P: user * table rows + row, sorted.
    """

    items_P: Tensor
    users_P: Tensor
    score_B: Tensor
    keys_P: Tensor


@dataclass(frozen=True)
class _Block:
    """Some items as the columns of one product.

    first: the number of the first column among all blocks'. The last column is no item's. half_JD:
    scaled rows, fp16, 0 where there is no item.
    """

    first: int
    items: int
    half_JD: Tensor

    @property
    def columns(self) -> int:
        return len(self.half_JD)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of a column, counted over all blocks, and a user, counted from a product's first."""

    columns_N: Tensor
    users_N: Tensor

    def __sub__(self, first: int) -> "_Pairs":
        """The pairs as a product sees them that starts with user `first`."""
        return _Pairs(self.columns_N, self.users_N - first)

    def places(self, block: _Block, users: int) -> Tensor:
        """Each pair's place among the block's B * J scores.

        What is no pair of these falls on the first user's last column, which is no item's.
        """
        column_N = self.columns_N - block.first
        here_N = (column_N >= 0) & (column_N < block.columns)
        here_N &= (self.users_N >= 0) & (self.users_N < users)
        return torch.where(here_N, self.users_N * block.columns + column_N, block.columns - 1)


@dataclass(frozen=True)
class _Question:
    """What is asked for some users, who are counted from 0 in the pairs.

    half_BD: scaled h, fp16. scale_B: a score times this is comparable with approximate ones.
    error_B: by how much those may be off; inf where it is not known. first: the number of the first
    of these users in `repeats`.
    """

    h_BD: Tensor
    half_BD: Tensor
    scale_B: Tensor
    error_B: Tensor
    excluded: _Pairs
    repeated: _Pairs | None
    repeats: RepeatPairs | None
    first: int = 0

    def part(self, first: int, users: int) -> "_Question":
        some = slice(first, first + users)
        return _Question(
            self.h_BD[some],
            self.half_BD[some],
            self.scale_B[some],
            self.error_B[some],
            self.excluded - first,
            None if self.repeated is None else self.repeated - first,
            self.repeats,
            first,
        )

    def scaled_repeats(self) -> Tensor:
        """What each pair of `repeated` adds to an approximate score; any number for other users."""
        assert self.repeats is not None
        assert self.repeated is not None
        users = len(self.h_BD)
        score_B = self.repeats.score_B[self.first : self.first + users] * self.scale_B
        return score_B[self.repeated.users_N.clamp(0, users - 1)]

    def repeat_scores(self, row_BC: Tensor, table_rows: int) -> Tensor:
        """What rows score more as repeats, fp32 [B, C]; 0 if they are none."""
        assert self.repeats is not None
        keys_P = self.repeats.keys_P
        user_B = self.first + torch.arange(len(row_BC), device=row_BC.device)
        key_BC = user_B.unsqueeze(1) * table_rows + row_BC
        place_BC = torch.searchsorted(keys_P, key_BC).clamp(max=len(keys_P) - 1)
        score_B1 = self.repeats.score_B[user_B].unsqueeze(1)
        return torch.where(keys_P[place_BC] == key_BC, score_B1, 0.0)


class Catalogue:
    """The items that may be recommended, on the device that ranks them.

    rows_VD: the table, fp32, fp16 or int8. scales_V: fp32, for int8 rows, else None.
    allowed_V: bool, as in `modules.scorer.Scorer.forward`. score_bytes: of fp16 scores held at
    once. block_items: of one product. Beside the table it holds two bytes a number, and the scores.
    """

    def __init__(
        self,
        rows_VD: Tensor,
        scales_V: Tensor | None = None,
        allowed_V: Tensor | None = None,
        score_bytes: int = SCORE_BYTES,
        block_items: int = BLOCK_ITEMS,
    ) -> None:
        self.rows_VD, self.scales_V, self.score_bytes = rows_VD, scales_V, score_bytes
        device, width = rows_VD.device, rows_VD.shape[1]
        self.error = H_NORM * ROW_NORM * (2**-10 + 2**-11 + width * 2**-21)
        here_V = torch.ones(len(rows_VD), dtype=torch.bool, device=device)
        if allowed_V is not None:
            here_V &= allowed_V.to(device)
        here_V[:RESERVED_ROWS] = False
        items_I = here_V.nonzero().squeeze(1)
        self.row_scale = self._row_scale(items_I)
        self.column_V = torch.empty(len(rows_VD), dtype=torch.int64, device=device)
        self.blocks: list[_Block] = []
        rows_of_columns, first = [], 0
        for part in items_I.split(block_items):
            block = self._new_block(part, first)
            self.column_V[part] = torch.arange(first, first + len(part), device=device)
            padding = (0, block.columns - len(part))
            rows_of_columns.append(torch.nn.functional.pad(part, padding, value=NO_ROW))
            self.blocks.append(block)
            first += block.columns
        self.row_of_column = torch.cat(rows_of_columns)
        self.column_V[~here_V] = first - 1
        most_columns = max(block.columns for block in self.blocks)
        self.most_users = max(1, score_bytes // (2 * most_columns))
        self._scores = torch.empty(0, dtype=torch.float16, device=device)

    def look_up(self, rows: Tensor) -> Tensor:
        """Rows of the table in fp32, [..., D] for indices of any shape [...]. Unchecked."""
        flat = rows.flatten()
        x = self.rows_VD.index_select(0, flat).float()
        if self.scales_V is not None:
            x = x * self.scales_V.index_select(0, flat).unsqueeze(1)
        return x.unflatten(0, rows.shape)

    def _row_scale(self, items_I: Tensor) -> Tensor:
        """What the longest row is multiplied by to have the norm ROW_NORM."""
        norms = [self.look_up(part).norm(dim=1).amax() for part in items_I.split(CONVERT_ROWS)]
        return ROW_NORM / torch.stack(norms).amax().clamp(min=TINY)

    def _new_block(self, items_I: Tensor, first: int) -> _Block:
        columns = (len(items_I) // COLUMNS + 1) * COLUMNS
        half_JD = self.rows_VD.new_zeros([columns, self.rows_VD.shape[1]], dtype=torch.float16)
        for start in range(0, len(items_I), CONVERT_ROWS):
            part = items_I[start : start + CONVERT_ROWS]
            half_JD[start : start + len(part)] = (self.look_up(part) * self.row_scale).half()
        return _Block(first, len(items_I), half_JD)

    @torch.no_grad()
    def top(
        self,
        h_BD: Tensor,
        k: int,
        exclude_items_N: Tensor,
        exclude_users_N: Tensor,
        repeats: RepeatPairs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(table rows [B, k] int64, scores [B, k] fp32, proved [B] bool), best first.

        h_BD: fp32, B at least 1. k: at most the number of rows that are not reserved. The pairs
        (table row, user) are left out. Where fewer than k items remain the rest is NO_ROW with
        -inf. Nothing waits for the device.
        """
        question = self._question(h_BD, exclude_items_N, exclude_users_N, repeats)
        step = self._users_at_once(len(h_BD))
        answers = [
            self._answer(question.part(first, step), k) for first in range(0, len(h_BD), step)
        ]
        rows_BK, scores_BK, proved_B = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return rows_BK, scores_BK, proved_B

    def _question(
        self, h_BD: Tensor, items_N: Tensor, users_N: Tensor, repeats: RepeatPairs | None
    ) -> _Question:
        norm_scale_B = H_NORM / h_BD.norm(dim=1).clamp(min=TINY)
        scale_B = norm_scale_B * self.row_scale
        error_B = torch.full_like(scale_B, self.error)
        repeated = None
        if repeats is not None and len(repeats.items_P):
            repeated = _Pairs(self.column_V[repeats.items_P], repeats.users_P)
            repeat_B = (repeats.score_B * scale_B).abs()
            error_B += 2**-11 * (H_NORM * ROW_NORM + repeat_B)
            error_B = error_B.where(repeat_B <= MOST_REPEAT, torch.inf)
        half_BD = (h_BD * norm_scale_B.unsqueeze(1)).half()
        excluded = _Pairs(self.column_V[items_N], users_N)
        return _Question(h_BD, half_BD, scale_B, error_B, excluded, repeated, repeats)

    def _answer(self, question: _Question, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """`top` of one product's users."""
        approx_BC, row_BC = self._candidates(question, max(CANDIDATES, 2 * k))
        x_BCD = self.look_up(row_BC.clamp(min=0))
        score_BC = torch.bmm(x_BCD, question.h_BD.unsqueeze(2)).squeeze(2)
        if question.repeated is not None:
            score_BC += question.repeat_scores(row_BC, len(self.rows_VD))
        score_BC = score_BC.masked_fill(approx_BC == -torch.inf, -torch.inf)
        score_BK, row_BK = _best(score_BC, row_BC, k)
        least_B, reached_B = approx_BC.amin(1).float(), score_BK[:, -1] * question.scale_B
        proved_B = (least_B == -torch.inf) | (least_B + question.error_B < reached_B)
        return row_BK, score_BK, proved_B & question.error_B.isfinite()

    def _users_at_once(self, users: int) -> int:
        """Blocks of about equal size, in whole tiles of a product."""
        even = -(-users // -(-users // self.most_users))
        return min(-(-even // USER_TILE) * USER_TILE, self.most_users)

    def _candidates(self, question: _Question, count: int) -> tuple[Tensor, Tensor]:
        """The largest approximate scores and their rows, [B, C] each, in no order."""
        approx, columns = [], []
        for block in self.blocks:
            scores = self._block_scores(block, question)
            approx_BC, column_BC = _largest(scores, block.columns, count)
            approx.append(approx_BC)
            columns.append(column_BC + block.first)
        approx_BC, column_BC = torch.cat(approx, 1), torch.cat(columns, 1)
        if len(self.blocks) > 1:
            approx_BC, place_BC = approx_BC.topk(min(count, approx_BC.shape[1]), sorted=False)
            column_BC = column_BC.gather(1, place_BC)
        return approx_BC, self.row_of_column[column_BC]

    def _block_scores(self, block: _Block, question: _Question) -> Tensor:
        """Approximate scores of a block, fp16, user by user in one dimension [B * J]."""
        users, columns = len(question.h_BD), block.columns
        if len(self._scores) < users * columns:
            self._scores = self._scores.new_empty(users * columns)
        flat = self._scores[: users * columns]
        scores_BJ = torch.mm(question.half_BD, block.half_JD.t(), out=flat.view(users, columns))
        scores_BJ[:, block.items :] = -torch.inf
        if question.repeated is not None:
            at_P = question.repeated.places(block, users)
            flat.index_copy_(0, at_P, (flat[at_P].float() + question.scaled_repeats()).half())
        return flat.index_fill_(0, question.excluded.places(block, users), -torch.inf)


def _largest(scores: Tensor, columns: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each user's scores, and their columns, in no order.

    A group is every G-th column: its maximum is then taken over rows of memory, side by side.
    """
    groups = columns // GROUP
    scores_BMG = scores.view(-1, GROUP, groups)
    group_BC = scores_BMG.amax(1).topk(min(count, groups), sorted=False).indices
    inside = group_BC.unsqueeze(1).expand(-1, GROUP, -1)
    chosen_BX = scores_BMG.gather(2, inside).flatten(1)
    approx_BC, place_BC = chosen_BX.topk(min(count, chosen_BX.shape[1]), sorted=False)
    taken = group_BC.shape[1]
    member_BC = place_BC.div(taken, rounding_mode="floor")
    return approx_BC, member_BC * groups + group_BC.gather(1, place_BC % taken)


def _best(score_BC: Tensor, row_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their rows; NO_ROW for -inf and where there are fewer."""
    missing = k - score_BC.shape[1]
    if missing > 0:  # a catalogue of fewer columns than that
        score_BC = torch.nn.functional.pad(score_BC, (0, missing), value=-torch.inf)
        row_BC = torch.nn.functional.pad(row_BC, (0, missing), value=NO_ROW)
    score_BK, place_BK = score_BC.topk(k, dim=1)
    return score_BK, row_BC.gather(1, place_BK).masked_fill(score_BK == -torch.inf, NO_ROW)
