"""The kernels of `softmax`: a program holds a tile of positions and walks over candidate tiles.

The logits of a pair of tiles are one product over the whole width, held in registers. The forward
carries their running maximum and sum, as exponentials of 2; the backward writes weights.

A candidate is a repeat where the position's sequence held it by then: where `first`, the token at
which a sequence first holds a candidate, is not behind the position's token.

Shape suffixes: N positions, D width; R positions and K candidates of a tile, G runs of tiles.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_block(ptr, row_R, rows, d_D, D: tl.constexpr):
    """Rows of a [rows, D] matrix, 0 outside."""
    mask_RD = (row_R < rows)[:, None] & (d_D < D)[None, :]
    pointers = ptr + row_R.to(tl.int64)[:, None] * D + d_D[None, :]
    return tl.load(pointers, mask=mask_RD, other=0.0)


@triton.jit
def load_repeats(
    sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions,
    REPEATS: tl.constexpr,
):  # fmt: skip
    """Of each position: its row of `first`, its token, and the score of what is seen by then."""
    if REPEATS:
        inside_R = n_R < positions
        sequence_R = tl.load(sequence_ptr + n_R, mask=inside_R, other=0)
        first_ptr_R = first_ptr + sequence_R * first_stride
        token_R = tl.load(token_ptr + n_R, mask=inside_R, other=-1)
        score_R = tl.load(score_ptr + n_R, mask=inside_R, other=0.0)
    else:
        first_ptr_R, token_R, score_R = n_R, n_R, n_R
    return first_ptr_R, token_R, score_R


@triton.jit
def scaled_logits(
    h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R, score_R,
    c_K, candidates, D: tl.constexpr, COLUMNS: tl.constexpr, HITS: tl.constexpr,
    REPEATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[R, K] logits times log2(e), -inf where there is no rival, and whether each is a repeat.

    h_RD holds all D, or is not used. The small loads come first: behind the product they would
    wait for it.
    """
    inside_K = c_K < candidates
    bias_K = tl.load(bias_ptr + c_K, mask=inside_K, other=float("-inf")) * LOG2E
    if HITS:
        id_K = tl.load(id_ptr + c_K, mask=inside_K, other=-1)
    # rows of `first` are padded, so that whole tiles can be read
    first_RK = tl.load(first_ptr_R[:, None] + c_K[None, :]) if REPEATS else c_K
    repeat_RK = first_RK <= token_R[:, None] if REPEATS else c_K
    if D > COLUMNS:
        logit_RK = tl.zeros([n_R.shape[0], c_K.shape[0]], tl.float32)
        for first in range(0, D, COLUMNS):
            d_D = first + tl.arange(0, COLUMNS)
            part_RD = load_block(h_ptr, n_R, positions, d_D, D)
            c_KD = load_block(c_ptr, c_K, candidates, d_D, D)
            logit_RK = tl.dot(part_RD, tl.trans(c_KD), logit_RK, input_precision=PRECISION)
    else:
        c_KD = load_block(c_ptr, c_K, candidates, tl.arange(0, COLUMNS), D)
        logit_RK = tl.dot(h_RD, tl.trans(c_KD), input_precision=PRECISION)
    logit_RK = logit_RK * LOG2E + bias_K[None, :]
    if REPEATS:
        logit_RK += tl.where(repeat_RK, (score_R * LOG2E)[:, None], 0.0)
    if HITS:
        logit_RK = tl.where(target_R[:, None] == id_K[None, :], float("-inf"), logit_RK)
    return logit_RK, repeat_RK


@triton.jit
def finite(x):
    """x, 0 for -inf: the base of exponentials that are all 0."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["positions", "candidates", "tiles"])
def logsumexp_kernel(
    h_ptr, c_ptr, bias_ptr, id_ptr, target_ptr, first_ptr, sequence_ptr, token_ptr, score_ptr,
    lse_ptr, positions, candidates, tiles, first_stride, D: tl.constexpr, COLUMNS: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, HITS: tl.constexpr, REPEATS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (r, g): the logsumexp of position tile r over `tiles` candidate tiles, [G, N]."""
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    h_RD = load_block(h_ptr, n_R, positions, tl.arange(0, COLUMNS), D)
    target_R = tl.load(target_ptr + n_R, mask=n_R < positions, other=-1) if HITS else n_R
    first_ptr_R, token_R, score_R = load_repeats(
        sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions, REPEATS
    )
    high_R = tl.full([R], float("-inf"), tl.float32)
    sum_R = tl.zeros([R], tl.float32)
    begin = tl.program_id(1) * tiles * K
    for first in range(begin, tl.minimum(begin + tiles * K, candidates), K):
        logit_RK, _ = scaled_logits(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, first + tl.arange(0, K), candidates, D, COLUMNS, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        higher_R = tl.maximum(high_R, tl.max(logit_RK, 1))
        base_R = finite(higher_R)
        sum_R = sum_R * tl.exp2(high_R - base_R) + tl.sum(tl.exp2(logit_RK - base_R[:, None]), 1)
        high_R = higher_R
    lse_R = (high_R + tl.log2(sum_R)) / LOG2E
    row = tl.program_id(1).to(tl.int64) * positions
    tl.store(lse_ptr + row + n_R, lse_R, mask=n_R < positions)


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


@triton.jit(do_not_specialize=["positions", "candidates", "tiles", "offset"])
def weight_kernel(
    h_ptr, c_ptr, bias_ptr, id_ptr, target_ptr, place_ptr, first_ptr, sequence_ptr, token_ptr,
    score_ptr, lse_ptr, dlse_ptr, dtarget_ptr, weight_ptr, dscore_ptr, positions, candidates,
    tiles, offset, stride, first_stride, D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, HITS: tl.constexpr, PLACE: tl.constexpr, REPEATS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """w of a chunk whose first candidate has place `offset`; rows of `stride`, a multiple of K.

    Also its sum over repeats, of this program's candidates, [G, N].
    """
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = n_R < positions
    h_RD = load_block(h_ptr, n_R, positions, tl.arange(0, COLUMNS), D)
    target_R = tl.load(target_ptr + n_R, mask=inside_R, other=-1) if HITS else n_R
    lse_R = finite(tl.load(lse_ptr + n_R, mask=inside_R, other=0.0)) * LOG2E
    dlse_R = tl.load(dlse_ptr + n_R, mask=inside_R, other=0.0)
    if PLACE:
        place_R = tl.load(place_ptr + n_R, mask=inside_R, other=-1) - offset
        place_R = tl.where((place_R >= 0) & (place_R < candidates), place_R, -1).to(tl.int32)
        dtarget_R = tl.load(dtarget_ptr + n_R, mask=inside_R, other=0.0)
    first_ptr_R, token_R, score_R = load_repeats(
        sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions, REPEATS
    )
    dscore_R = tl.zeros([R], tl.float32)
    row_ptr_R = weight_ptr + n_R.to(tl.int64) * stride
    begin = tl.program_id(1) * tiles * K
    for first in range(begin, tl.minimum(begin + tiles * K, candidates), K):
        c_K = first + tl.arange(0, K)
        logit_RK, repeat_RK = scaled_logits(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, c_K, candidates, D, COLUMNS, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        weight_RK = tl.exp2(logit_RK - lse_R[:, None]) * dlse_R[:, None]
        if PLACE:
            weight_RK += tl.where(place_R[:, None] == c_K[None, :], dtarget_R[:, None], 0.0)
        if REPEATS:
            dscore_R += tl.sum(tl.where(repeat_RK, weight_RK, 0.0), 1)
        pointers = row_ptr_R[:, None] + c_K[None, :]
        tl.store(pointers, weight_RK.to(weight_ptr.dtype.element_ty), mask=inside_R[:, None])
    if REPEATS:
        row = tl.program_id(1).to(tl.int64) * positions
        tl.store(dscore_ptr + row + n_R, dscore_R, mask=inside_R)
