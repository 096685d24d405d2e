"""Softmax losses over a candidate set, with a bounded number of bytes of logits.

Legend: S read positions of this rank, N positions of all ranks (W S), C candidates of this rank,
D model width. Candidates are rows of the item table, looked up in the same pass as the histories,
so one fused optimizer serves inputs and outputs.

Full softmax is candidate-parallel: each rank scores the positions of *all* ranks against its own
slice of the rows. Two numbers a position cross between ranks, the log of the slice's sum of
exponentials and the target's logit; every row is looked up, and updated, by one rank alone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.schema import PADDING_ROW, RESERVED_ROWS
from modules.collectives import all_gather, all_to_all, world_size
from modules.repeats import Repeats, SeenItems
from modules.softmax_memory import LOGIT_BYTES, keeps_exponentials

LogSumExp = Callable[..., tuple[Tensor, Tensor]]


def candidate_logsumexp(
    h_ND: Tensor,
    c_CD: Tensor,
    bias_C: Tensor,
    candidates_C: Tensor | None = None,
    targets_N: Tensor | None = None,
    place_N: Tensor | None = None,
    repeats: Repeats | None = None,
) -> tuple[Tensor, Tensor]:
    """(log sum_c exp(logit_c), the logit at `place_N`), fp32 [N] each.

    logit_c is h . c + bias_c, and the position's repeat score more where its history holds c.
    With `candidates_C` and `targets_N` a candidate that is the position's own target is left out
    of the sum. `place_N` is the target's place among the candidates; where it is none of 0 to
    C - 1, or not given, the second answer is 0. Products are taken in the autocast dtype.
    """
    if h_ND.is_cuda:
        return logsumexp_fused(h_ND, c_CD, bias_C, candidates_C, targets_N, place_N, repeats)
    return logsumexp_reference(h_ND, c_CD, bias_C, candidates_C, targets_N, place_N, repeats)


class FullSoftmax(nn.Module):
    """Cross entropy against every item of the catalogue.

    This rank's candidates are table rows `rank * C` to `rank * C + C - 1`; rows below
    RESERVED_ROWS and the padding behind the table's end are no items.

    smoothing: weight of a uniform target over all items beside the real one (label smoothing,
    Szegedy et al., CVPR 2016); repeat scores are left out of it.
    """

    def __init__(
        self, rank: int, logsumexp: LogSumExp = candidate_logsumexp, smoothing: float = 0.0
    ) -> None:
        super().__init__()
        self.rank, self.logsumexp, self.smoothing = rank, logsumexp, smoothing

    def forward(
        self,
        h_SD: Tensor,
        targets_S: Tensor,
        c_CD: Tensor,
        candidates_C: Tensor,
        log_counts_C: Tensor | None,
        histories: SeenItems | None = None,
    ) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar."""
        h_SD, c_CD = _product_dtype(h_SD, c_CD)  # half the bytes between ranks under bf16
        h_ND = all_gather(h_SD)
        targets_N = all_gather(targets_S)
        bias_C = torch.zeros_like(candidates_C, dtype=torch.float32)
        bias_C = bias_C.masked_fill(candidates_C < RESERVED_ROWS, -torch.inf)
        place_N = targets_N - self.rank * candidates_C.numel()
        place_N = place_N.where(targets_N != PADDING_ROW, -1)
        repeats = None
        if histories is not None:
            first_row = self.rank * candidates_C.numel()
            repeats = histories.gathered().repeats_of_slice(first_row, candidates_C.numel())
        lse_N, target_N = self.logsumexp(h_ND, c_CD, bias_C, place_N=place_N, repeats=repeats)
        if self.smoothing:
            target_N = (1.0 - self.smoothing) * target_N
            target_N = target_N + self.smoothing * self._mean_logit(h_ND, c_CD, candidates_C)
        lse_WS = all_to_all(lse_N).view(world_size(), -1)
        lse_S = torch.logsumexp(lse_WS, dim=0) if len(lse_WS) > 1 else lse_WS[0]
        target_S = all_to_all(target_N).view(world_size(), -1).sum(0)
        return (lse_S - target_S).where(targets_S != PADDING_ROW, 0.0).sum()

    def _mean_logit(self, h_ND: Tensor, c_CD: Tensor, candidates_C: Tensor) -> Tensor:
        """This slice's part of the mean of h . c over all items, fp32 [N]."""
        item_C = (candidates_C >= RESERVED_ROWS).to(torch.float32)
        items = all_gather(item_C.sum().view(1)).sum()
        with torch.autocast(h_ND.device.type, enabled=False):
            return h_ND.float() @ ((item_C @ c_CD.float()) / items)


class SampledSoftmax(nn.Module):
    """Cross entropy against `negatives` shared draws, corrected by their expected counts (logQ).

    The batch's candidates are [negatives; the S targets]. For position t the rivals are the draws
    c with score s(c) - log count(c), and with `in_batch` the other positions' targets as well; a
    rival that equals y_t is an accidental hit and is left out (Yi et al., RecSys 2019; Bengio and
    Senecal 2008). `logq=False` leaves the correction out.
    """

    def __init__(
        self,
        negatives: int,
        in_batch: bool,
        logq: bool,
        logsumexp: LogSumExp = candidate_logsumexp,
    ) -> None:
        super().__init__()
        self.negatives, self.in_batch, self.logq = negatives, in_batch, logq
        self.logsumexp = logsumexp

    def forward(
        self,
        h_SD: Tensor,
        targets_S: Tensor,
        c_CD: Tensor,
        candidates_C: Tensor,
        log_counts_C: Tensor | None,
        histories: SeenItems | None = None,
    ) -> Tensor:
        """The sum of the losses of this rank's targets, fp32 scalar."""
        if log_counts_C is None:
            raise ValueError("sampled softmax needs the candidates' log counts")
        own_SD = c_CD[self.negatives :]
        kind = _accumulator(h_SD)
        target_S = (h_SD.to(kind) * own_SD.to(kind)).sum(-1)
        if histories is not None:
            target_S = target_S + histories.score_of(targets_S)
        if not self.in_batch:
            c_CD = c_CD[: self.negatives]
            candidates_C, log_counts_C = (
                candidates_C[: self.negatives],
                log_counts_C[: self.negatives],
            )
        bias_C = -log_counts_C if self.logq else torch.zeros_like(log_counts_C)
        bias_C = bias_C.masked_fill(candidates_C < RESERVED_ROWS, -torch.inf)
        repeats = None if histories is None else histories.repeats_of(candidates_C)
        lse_S, _ = self.logsumexp(h_SD, c_CD, bias_C, candidates_C, targets_S, repeats=repeats)
        return F.softplus(lse_S - target_S).where(targets_S != PADDING_ROW, 0.0).sum()


def logsumexp_reference(
    h_ND: Tensor,
    c_CD: Tensor,
    bias_C: Tensor,
    candidates_C: Tensor | None = None,
    targets_N: Tensor | None = None,
    place_N: Tensor | None = None,
    repeats: Repeats | None = None,
    logit_bytes: int = LOGIT_BYTES,
) -> tuple[Tensor, Tensor]:
    """`candidate_logsumexp` in PyTorch, fp64 for fp64 inputs; at most `logit_bytes` of logits.

    Where all logits fit they are kept for the backward pass, otherwise each chunk of positions is
    computed again there.
    """
    h_ND, c_CD = _product_dtype(h_ND, c_CD)
    chunk = max(1, logit_bytes // (4 * max(1, c_CD.shape[0])))
    ids = candidates_C, targets_N, place_N
    return _CandidateLogSumExp.apply(
        h_ND, c_CD, bias_C, *ids, *(repeats or (None, None, None, None)), chunk
    )


def logsumexp_fused(
    h_ND: Tensor,
    c_CD: Tensor,
    bias_C: Tensor,
    candidates_C: Tensor | None = None,
    targets_N: Tensor | None = None,
    place_N: Tensor | None = None,
    repeats: Repeats | None = None,
) -> tuple[Tensor, Tensor]:
    """`candidate_logsumexp` on Triton, bf16 or fp32 products.

    Exponentials of all logits are kept for the backward pass where they fit, otherwise each chunk
    is computed again there.
    """
    from modules.kernels.softmax import candidate_logsumexp_triton  # Triton comes with a GPU

    h_ND, c_CD = _product_dtype(h_ND, c_CD)
    ids, held = (candidates_C, targets_N, place_N), repeats or (None, None, None, None)
    wanted = any(one is not None and one.requires_grad for one in (h_ND, c_CD, held[-1]))
    needed = h_ND.shape[0] * c_CD.shape[0] * h_ND.element_size()
    keep = torch.is_grad_enabled() and wanted and keeps_exponentials(needed, h_ND.device)
    return candidate_logsumexp_triton(h_ND, c_CD, bias_C, *ids, *held, keep=keep)


def _product_dtype(h_ND: Tensor, c_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the autocast dtype, if autocast is on."""
    if not torch.is_autocast_enabled(h_ND.device.type):
        return h_ND, c_CD
    kind = torch.get_autocast_dtype(h_ND.device.type)
    return h_ND.to(kind), c_CD.to(kind)


class _CandidateLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, h_ND, c_CD, bias_C, candidates_C, targets_N, place_N, first_ZC, sequence_N,
        token_N, score_N, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        repeats = None if score_N is None else Repeats(first_ZC, sequence_N, token_N, score_N)
        lse_N = h_ND.new_empty(h_ND.shape[0], dtype=_accumulator(h_ND))
        target_N = torch.zeros_like(lse_N)
        logits = None
        for rows in _chunks(h_ND.shape[0], chunk):
            logits = _logits(h_ND[rows], c_CD, bias_C, repeats, rows)
            if place_N is not None:
                here, place = _within(place_N[rows], c_CD.shape[0])
                target_N[rows] = logits.gather(1, place[:, None])[:, 0].where(here, 0.0)
            _leave_out_hits(logits, candidates_C, targets_N, rows)
            lse_N[rows] = torch.logsumexp(logits, dim=-1)
        kept = logits if h_ND.shape[0] <= chunk else None
        ctx.save_for_backward(
            h_ND, c_CD, bias_C, candidates_C, targets_N, place_N, first_ZC, sequence_N, token_N,
            score_N, lse_N, kept,
        )  # fmt: skip
        ctx.chunk = chunk
        return lse_N, target_N

    @staticmethod
    def backward(
        ctx: Any, gradient_N: Tensor, target_gradient_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        h_ND, c_CD, bias_C, candidates_C, targets_N, place_N, *repeated, lse_N, kept = (
            ctx.saved_tensors
        )
        repeats = None if repeated[-1] is None else Repeats(*repeated)
        dscore_N = None if repeats is None else torch.empty_like(repeats.score_N)
        dh_ND = torch.empty_like(h_ND)
        dc_CD = torch.zeros_like(c_CD, dtype=lse_N.dtype)
        lse_N = lse_N.nan_to_num(neginf=0.0)  # no rivals at all: every weight is exp(-inf) = 0
        for rows in _chunks(h_ND.shape[0], ctx.chunk):
            logits = kept
            if logits is None:
                logits = _logits(h_ND[rows], c_CD, bias_C, repeats, rows)
                _leave_out_hits(logits, candidates_C, targets_N, rows)
            weights = (logits - lse_N[rows, None]).exp_().mul_(gradient_N[rows, None])
            if place_N is not None:
                here, place = _within(place_N[rows], c_CD.shape[0])
                at_target = target_gradient_N[rows].where(here, 0.0)
                weights.scatter_add_(1, place[:, None], at_target[:, None])
            if repeats is not None and dscore_N is not None:
                dscore_N[rows] = weights.where(_repeated(repeats, rows), 0.0).sum(1)
            weights = weights.to(h_ND.dtype)
            dh_ND[rows] = weights @ c_CD
            dc_CD.add_((weights.T @ h_ND[rows]).to(dc_CD.dtype))
        no_ids = (None,) * 7
        return dh_ND, dc_CD.to(c_CD.dtype), *no_ids, dscore_N, None


def _within(place_R: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """Whether a place is one of the candidates', and the place, 0 where it is not."""
    here_R = (place_R >= 0) & (place_R < candidates)
    return here_R, place_R.where(here_R, 0)


def _chunks(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


def _accumulator(h_ND: Tensor) -> torch.dtype:
    return torch.promote_types(h_ND.dtype, torch.float32)


def _logits(
    h_RD: Tensor, c_CD: Tensor, bias_C: Tensor, repeats: Repeats | None, rows: slice
) -> Tensor:
    logits_RC = (h_RD @ c_CD.T).to(_accumulator(h_RD)).add_(bias_C)
    if repeats is not None:
        score_R1 = repeats.score_N[rows, None].to(logits_RC.dtype)
        logits_RC += score_R1.where(_repeated(repeats, rows), 0.0)
    return logits_RC


def _repeated(repeats: Repeats, rows: slice) -> Tensor:
    """Which candidates the histories of some positions hold, bool [R, C]."""
    return repeats.first_ZC[repeats.sequence_N[rows]] <= repeats.token_N[rows, None]


def _leave_out_hits(
    logits_RC: Tensor, candidates_C: Tensor | None, targets_N: Tensor | None, rows: slice
) -> None:
    if candidates_C is not None and targets_N is not None:
        logits_RC.masked_fill_(candidates_C == targets_N[rows, None], -torch.inf)
