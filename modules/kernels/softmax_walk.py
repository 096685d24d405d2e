"""The kernels of `softmax`: a program holds a tile of positions and walks over candidate tiles.

The logits of a pair of tiles are one product over the whole width, held in registers. A walk either
carries their running maximum and sum, as exponentials of 2, or writes exponentials against a base
that is known before.

A candidate is a repeat where the position's sequence held it by then: where `first`, the token at
which a sequence first holds a candidate, is not behind the position's token.

Shape suffixes: N positions, D width; R positions and K candidates of a tile, G runs of tiles.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Nats from a base to a logsumexp that is made again: e^-40 times LEAST_SHARE (`softmax_rows`) and
# the smallest gradient of a mean loss is still a normal number.
FAR = tl.constexpr(40.0)
HIGHEST = tl.constexpr(100.0)  # exponent of 2: as many sums as there are candidates stay finite


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


@triton.jit
def walk_logsumexp(
    h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R, score_R,
    begin, end, candidates, D: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
    HITS: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[R], log2 of the sum of the exponentials of the tiles from `begin` to `end`."""
    high_R = tl.full([n_R.shape[0]], float("-inf"), tl.float32)
    sum_R = tl.zeros([n_R.shape[0]], tl.float32)
    for first in range(begin, end, K):
        logit_RK, _ = scaled_logits(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, first + tl.arange(0, K), candidates, D, COLUMNS, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        higher_R = tl.maximum(high_R, tl.max(logit_RK, 1))
        base_R = finite(higher_R)
        sum_R = sum_R * tl.exp2(high_R - base_R) + tl.sum(tl.exp2(logit_RK - base_R[:, None]), 1)
        high_R = higher_R
    return high_R + tl.log2(sum_R)


@triton.jit
def walk_exponentials(
    h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R, score_R,
    base_R, begin, end, candidates, exp_ptr_R, write_R, D: tl.constexpr, COLUMNS: tl.constexpr,
    K: tl.constexpr, HITS: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Writes exp(logit - base) of whole tiles; [R], their sum and the sum over repeats."""
    sum_R = tl.zeros([n_R.shape[0]], tl.float32)
    repeat_sum_R = tl.zeros([n_R.shape[0]], tl.float32)
    for first in range(begin, end, K):
        c_K = first + tl.arange(0, K)
        logit_RK, repeat_RK = scaled_logits(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, c_K, candidates, D, COLUMNS, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        exp_RK = tl.exp2(tl.minimum(logit_RK - base_R[:, None], HIGHEST))
        sum_R += tl.sum(exp_RK, 1)
        if REPEATS:
            repeat_sum_R += tl.sum(tl.where(repeat_RK, exp_RK, 0.0), 1)
        pointers = exp_ptr_R[:, None] + c_K[None, :]
        tl.store(pointers, exp_RK.to(exp_ptr_R.dtype.element_ty), mask=write_R[:, None])
    return sum_R, repeat_sum_R


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
    begin = tl.program_id(1) * tiles * K
    lse_R = walk_logsumexp(
        h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
        score_R, begin, tl.minimum(begin + tiles * K, candidates), candidates, D, COLUMNS, K, HITS,
        REPEATS, PRECISION,
    )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * positions
    tl.store(lse_ptr + row + n_R, lse_R / LOG2E, mask=n_R < positions)


@triton.jit(do_not_specialize=["positions", "candidates", "tiles"])
def exponentials_kernel(
    h_ptr, c_ptr, bias_ptr, id_ptr, target_ptr, first_ptr, sequence_ptr, token_ptr, score_ptr,
    base_ptr, exp_ptr, sum_ptr, repeat_sum_ptr, positions, candidates, tiles, stride, first_stride,
    D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, HITS: tl.constexpr,
    REPEATS: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (r, g): exp(logit - base) of position tile r and `tiles` candidate tiles.

    Rows of `stride`, a multiple of K. Also the sums over this program's candidates, [G, N]: over
    repeats and, with FIRST, over all. FIRST: the base is made here, of the first tile's logits, and
    written; else it is given.
    """
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = n_R < positions
    h_RD = load_block(h_ptr, n_R, positions, tl.arange(0, COLUMNS), D)
    target_R = tl.load(target_ptr + n_R, mask=inside_R, other=-1) if HITS else n_R
    first_ptr_R, token_R, score_R = load_repeats(
        sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions, REPEATS
    )
    if FIRST:
        logit_RK, _ = scaled_logits(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, tl.arange(0, K), candidates, D, COLUMNS, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        base_R = finite(tl.max(logit_RK, 1)) / LOG2E
        tl.store(base_ptr + n_R, base_R, mask=inside_R & (tl.program_id(1) == 0))
    else:
        base_R = finite(tl.load(base_ptr + n_R, mask=inside_R, other=0.0))
    begin = tl.program_id(1) * tiles * K
    sum_R, repeat_sum_R = walk_exponentials(
        h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
        score_R, base_R * LOG2E, begin, tl.minimum(begin + tiles * K, candidates), candidates,
        exp_ptr + n_R.to(tl.int64) * stride, inside_R, D, COLUMNS, K, HITS, REPEATS, PRECISION,
    )  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * positions
    if FIRST:
        tl.store(sum_ptr + row + n_R, sum_R, mask=inside_R)
    if REPEATS:
        tl.store(repeat_sum_ptr + row + n_R, repeat_sum_R, mask=inside_R)


@triton.jit(do_not_specialize=["positions", "candidates", "runs"])
def finish_kernel(
    h_ptr, c_ptr, bias_ptr, id_ptr, target_ptr, first_ptr, sequence_ptr, token_ptr, score_ptr,
    base_ptr, exp_ptr, sum_ptr, repeat_sums_ptr, lse_ptr, repeat_sum_ptr, positions, candidates,
    runs, stride, first_stride, D: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr,
    K: tl.constexpr, HITS: tl.constexpr, REPEATS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The logsumexp and the sum over repeats, [N], from those of `runs` runs.

    Where the logsumexp is FAR from the base, it and the exponentials are made again, with itself as
    the base: by one program for all candidates, however long that takes.
    """
    n_R = tl.program_id(0) * R + tl.arange(0, R)
    inside_R = n_R < positions
    base_R = tl.load(base_ptr + n_R, mask=inside_R, other=0.0)
    sum_R = tl.zeros([R], tl.float32)
    repeat_sum_R = tl.zeros([R], tl.float32)
    for run in range(runs):
        row = tl.cast(run, tl.int64) * positions
        sum_R += tl.load(sum_ptr + row + n_R, mask=inside_R, other=1.0)
        if REPEATS:
            repeat_sum_R += tl.load(repeat_sums_ptr + row + n_R, mask=inside_R, other=0.0)
    above_R = tl.log2(sum_R) / LOG2E
    lse_R = base_R + above_R
    far_R = inside_R & ~(tl.abs(above_R) < FAR)  # NaN is far
    if tl.max(far_R.to(tl.int32), 0) > 0:
        h_RD = load_block(h_ptr, n_R, positions, tl.arange(0, COLUMNS), D)
        target_R = tl.load(target_ptr + n_R, mask=inside_R, other=-1) if HITS else n_R
        first_ptr_R, token_R, score_R = load_repeats(
            sequence_ptr, token_ptr, score_ptr, first_ptr, first_stride, n_R, positions, REPEATS
        )
        again_R = walk_logsumexp(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, 0, candidates, candidates, D, COLUMNS, K, HITS, REPEATS, PRECISION,
        ) / LOG2E  # fmt: skip
        lse_R = tl.where(far_R, again_R, lse_R)
        base_R = tl.where(far_R, finite(again_R), base_R)
        _, repeats_R = walk_exponentials(
            h_RD, h_ptr, n_R, positions, c_ptr, bias_ptr, id_ptr, target_R, first_ptr_R, token_R,
            score_R, base_R * LOG2E, 0, candidates, candidates,
            exp_ptr + n_R.to(tl.int64) * stride, far_R, D, COLUMNS, K, HITS, REPEATS, PRECISION,
        )  # fmt: skip
        repeat_sum_R = tl.where(far_R, repeats_R, repeat_sum_R)
        tl.store(base_ptr + n_R, base_R, mask=far_R)
    tl.store(lse_ptr + n_R, lse_R, mask=inside_R)
    if REPEATS:
        tl.store(repeat_sum_ptr + n_R, repeat_sum_R, mask=inside_R)
