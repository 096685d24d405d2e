"""The kernels of `softmax` that do not walk: a few numbers of each position.

Shape suffixes: N positions, D width; R positions of a program.
"""

import triton
import triton.language as tl

from modules.kernels.softmax_walk import LOG2E, finite, load_block, load_repeats

LEAST_SHARE = tl.constexpr(2.0**-24)  # below what fp32 keeps of the larger one


@triton.jit(do_not_specialize=["positions", "candidates"])
def target_kernel(
    h_ptr, c_ptr, bias_ptr, place_ptr, first_ptr, sequence_ptr, token_ptr, score_ptr, logit_ptr,
    positions, candidates, first_stride, D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """The logit of each position's place, 0 where that is none of the candidates."""
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    place_R = tl.load(place_ptr + n_R, mask=n_R < positions, other=-1)
    here_R = (place_R >= 0) & (place_R < candidates)
    place_R = tl.where(here_R, place_R, 0)
    logit_R = tl.load(bias_ptr + place_R, mask=here_R, other=0.0)
    if REPEATS:
        first_ptr_R, token_R, score_R = load_repeats(
            sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions, REPEATS
        )
        logit_R += tl.where(tl.load(first_ptr_R + place_R) <= token_R, score_R, 0.0)
    for first in tl.static_range(0, D, COLUMNS):
        d_D = first + tl.arange(0, COLUMNS)
        h_RD = load_block(h_ptr, n_R, positions, d_D, D).to(tl.float32)
        c_RD = load_block(c_ptr, place_R, candidates, d_D, D).to(tl.float32)
        logit_R += tl.sum(h_RD * c_RD, 1)
    tl.store(logit_ptr + n_R, tl.where(here_R, logit_R, 0.0), mask=n_R < positions)


@triton.jit(do_not_specialize=["positions", "candidates"])
def factor_kernel(
    place_ptr, first_ptr, sequence_ptr, token_ptr, base_ptr, lse_ptr, dlse_ptr, dtarget_ptr,
    factor_ptr, dscore_ptr, positions, candidates, first_stride, R: tl.constexpr,
    PLACE: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    """What a row of exponentials is to be multiplied by, and the place's part of dscore.

    Where the place is one of the candidates, dlse is at least LEAST_SHARE of dtarget, which is
    divided by the factor.
    """
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = n_R < positions
    lse_R = finite(tl.load(lse_ptr + n_R, mask=inside_R, other=0.0))
    base_R = finite(tl.load(base_ptr + n_R, mask=inside_R, other=0.0))
    dlse_R = tl.load(dlse_ptr + n_R, mask=inside_R, other=0.0)
    if PLACE:
        place_R = tl.load(place_ptr + n_R, mask=inside_R, other=-1)
        here_R = (place_R >= 0) & (place_R < candidates)
        dtarget_R = tl.load(dtarget_ptr + n_R, mask=here_R, other=0.0)
        least_R = tl.abs(dtarget_R) * LEAST_SHARE
        dlse_R = tl.where(tl.abs(dlse_R) < least_R, least_R, dlse_R)
    factor_R = tl.exp2((base_R - lse_R) * LOG2E) * dlse_R
    tl.store(factor_ptr + n_R, factor_R, mask=inside_R)
    if REPEATS:
        dscore_R = tl.zeros([R], tl.float32)
        if PLACE:
            first_ptr_R, token_R, _ = load_repeats(
                sequence_ptr, token_ptr, dtarget_ptr, first_ptr, first_stride, n_R, positions, True
            )
            held_R = tl.load(first_ptr_R + tl.where(here_R, place_R, 0)) <= token_R
            dscore_R = tl.where(here_R & held_R, dtarget_R, 0.0)
        tl.store(dscore_ptr + n_R, dscore_R, mask=inside_R)


@triton.jit(do_not_specialize=["rows"])
def scale_rows_kernel(
    x_ptr, factor_ptr, out_ptr, rows, D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr
):
    """out = factor * x, [rows, D]."""
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    factor_R = tl.load(factor_ptr + n_R, mask=n_R < rows, other=0.0)
    for first in tl.static_range(0, D, COLUMNS):
        d_D = first + tl.arange(0, COLUMNS)
        x_RD = load_block(x_ptr, n_R, rows, d_D, D).to(tl.float32) * factor_R[:, None]
        pointers = out_ptr + n_R.to(tl.int64)[:, None] * D + d_D[None, :]
        mask_RD = (n_R < rows)[:, None] & (d_D < D)[None, :]
        tl.store(pointers, x_RD.to(out_ptr.dtype.element_ty), mask=mask_RD)


@triton.jit(do_not_specialize=["positions", "candidates", "offset"])
def place_kernel(
    id_ptr, target_ptr, place_ptr, base_ptr, logit_ptr, dtarget_ptr, factor_ptr, exp_ptr, there_ptr,
    positions, candidates, offset, stride, R: tl.constexpr, HITS: tl.constexpr,
    PUT_BACK: tl.constexpr,
):  # fmt: skip
    """Writes each place's exponential plus `dtarget / factor`, of candidates from `offset` on.

    The exponential is made anew from its logit, in fp32: where the target is nearly certain both
    nearly cancel. `there` gets what was there before; with PUT_BACK it is put there again.
    """
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = n_R < positions
    place_R = tl.load(place_ptr + n_R, mask=inside_R, other=-1) - offset
    here_R = inside_R & (place_R >= 0) & (place_R < candidates)
    pointers = exp_ptr + n_R.to(tl.int64) * stride + place_R
    if PUT_BACK:
        tl.store(pointers, tl.load(there_ptr + n_R, mask=here_R, other=0.0), mask=here_R)
    else:
        tl.store(there_ptr + n_R, tl.load(pointers, mask=here_R, other=0.0), mask=here_R)
        base_R = finite(tl.load(base_ptr + n_R, mask=inside_R, other=0.0))
        logit_R = tl.load(logit_ptr + n_R, mask=inside_R, other=0.0)
        dtarget_R = tl.load(dtarget_ptr + n_R, mask=inside_R, other=0.0)
        factor_R = tl.load(factor_ptr + n_R, mask=inside_R, other=0.0)
        exp_R = tl.exp2((logit_R - base_R) * LOG2E)
        if HITS:
            id_R = tl.load(id_ptr + place_R, mask=here_R, other=-1)
            target_R = tl.load(target_ptr + n_R, mask=inside_R, other=-1)
            exp_R = tl.where(id_R == target_R, 0.0, exp_R)
        exp_R += tl.where(factor_R == 0.0, 0.0, dtarget_R / factor_R)
        tl.store(pointers, exp_R.to(exp_ptr.dtype.element_ty), mask=here_R)
