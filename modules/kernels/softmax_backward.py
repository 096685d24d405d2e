"""The gradients of `softmax`, from the exponentials of the forward or from some made anew.

Shape suffixes: N positions, C candidates, D width, Z sequences; R positions and K candidates of a
chunk, G runs of candidate tiles, J candidates in whole tiles.
"""

from functools import partial

import torch
import triton
from torch import Tensor

from modules.kernels.softmax_launch import Launch, choose_launch, grid_of
from modules.kernels.softmax_rows import factor_kernel, place_kernel, scale_rows_kernel
from modules.kernels.softmax_walk import exponentials_kernel
from modules.softmax_memory import CHUNK_BYTES

CHUNK_CANDIDATES = 16_384  # at least, where there are as many: dc's product has to fill the card
ALIGNED = 8  # candidates of a chunk: 16 bytes of bf16, without which cuBLAS is 4 times slower
PLACE_ROWS, FACTOR_ROWS, SCALED_ROWS = 16, 128, 8  # positions of a program


def chunk_shape(N: int, C: int, itemsize: int, launch: Launch) -> tuple[int, int]:
    """Positions and candidates of a chunk, whose exponentials take CHUNK_BYTES or little more."""
    candidates = _even(C, max(CHUNK_CANDIDATES, CHUNK_BYTES // (itemsize * N)), launch.candidates)
    positions = max(1, CHUNK_BYTES // (itemsize * candidates))
    return _even(N, positions, launch.rows), candidates


def _even(total: int, limit: int, tile: int) -> int:
    """The size of equal parts of about `limit` at most, a multiple of `tile`."""
    part = triton.cdiv(total, triton.cdiv(total, limit))
    return triton.cdiv(part, tile) * tile


def _chunks(total: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, total)) for start in range(0, total, chunk)]


@torch.library.custom_op("ssd4rec::candidate_logsumexp_backward", mutates_args=())
def candidate_logsumexp_backward_op(
    dlse_N: Tensor, dtarget_N: Tensor, h_ND: Tensor, c_CD: Tensor, bias_C: Tensor,
    candidates_C: Tensor | None, targets_N: Tensor | None, place_N: Tensor | None,
    first_ZC: Tensor | None, sequence_N: Tensor | None, token_N: Tensor | None,
    score_N: Tensor | None, lse_N: Tensor, logit_N: Tensor, base_N: Tensor, repeat_sum_N: Tensor,
    exp_NJ: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of h and c, in their dtype, and of the repeat scores, fp32 ([0] without them).

    exp_NJ: E as the forward kept it, or of no rows. For the products its entries at the targets'
    places are replaced, and then put back: an operator must leave its inputs alone. Sums over
    chunks are fp32.
    """
    (N, D), C = h_ND.shape, c_CD.shape[0]
    h_ND, c_CD, bias_C = h_ND.contiguous(), c_CD.contiguous(), bias_C.contiguous()
    dlse_N, dtarget_N = dlse_N.contiguous(), dtarget_N.contiguous()
    repeats, stride = score_N is not None, 0 if first_ZC is None else first_ZC.stride(0)
    dscore_N = h_ND.new_zeros(N if repeats else 0, dtype=torch.float32)
    if N == 0 or C == 0:
        return torch.zeros_like(h_ND), torch.zeros_like(c_CD), dscore_N
    launch = choose_launch(D, h_ND.dtype)
    kept = len(exp_NJ) > 0
    if kept:
        chunk_N, chunk_C = N, exp_NJ.shape[1]
    else:
        chunk_N, chunk_C = chunk_shape(N, C, h_ND.element_size(), launch)
        exp_NJ = h_ND.new_empty(min(N, chunk_N), chunk_C)
        base_N = lse_N
        repeat_sum_N = torch.zeros_like(dscore_N)
    factor_N, there_N = torch.empty_like(lse_N), h_ND.new_empty(N)
    factor_kernel[(triton.cdiv(N, FACTOR_ROWS),)](
        place_N, first_ZC, sequence_N, token_N, base_N, lse_N, dlse_N, dtarget_N, factor_N,
        dscore_N, N, C, stride, FACTOR_ROWS, place_N is not None, repeats, num_warps=4,
    )  # fmt: skip
    scaled_ND = _scaled(h_ND, factor_N, launch)
    parts_N, parts_C = triton.cdiv(N, chunk_N), triton.cdiv(C, chunk_C)
    dh_ND = _total(h_ND, N, parts_C)
    dc_CD = c_CD.new_empty(aligned(C, launch), D)
    for some in _chunks(C, chunk_C):
        c_KD = _aligned_rows(c_CD[some], launch)
        dc_KD = dc_CD[some.start : some.start + len(c_KD)]
        total_KD = dc_KD if parts_N == 1 else _total(c_CD, len(c_KD), parts_N)
        for rows in _chunks(N, chunk_N):
            exp_RJ = exp_NJ[: rows.stop - rows.start]
            if not kept:
                _make_exponentials(
                    exp_RJ, repeat_sum_N[rows], h_ND[rows], c_CD[some], bias_C[some],
                    _part(candidates_C, some), _part(targets_N, rows),
                    None if first_ZC is None else first_ZC[:, some], _part(sequence_N, rows),
                    _part(token_N, rows), _part(score_N, rows), lse_N[rows], launch,
                )  # fmt: skip
            at_places = partial(
                place_kernel[(triton.cdiv(len(exp_RJ), PLACE_ROWS),)],
                _part(candidates_C, some), _part(targets_N, rows), _part(place_N, rows),
                base_N[rows], logit_N[rows], dtarget_N[rows], factor_N[rows], exp_RJ, there_N,
                len(exp_RJ), some.stop - some.start, some.start, exp_RJ.stride(0), PLACE_ROWS,
                candidates_C is not None, num_warps=1,
            )  # fmt: skip
            if place_N is not None:
                at_places(PUT_BACK=False)
            exp_RK = exp_RJ[:, : len(c_KD)]
            _add_product(dh_ND[rows], exp_RK, c_KD, parts_C)
            _add_product(total_KD, exp_RK.T, scaled_ND[rows], parts_N)
            if place_N is not None and kept:
                at_places(PUT_BACK=True)
        if parts_N > 1:
            dc_KD.copy_(total_KD)
    if repeats:
        dscore_N.addcmul_(factor_N, repeat_sum_N)
    return _scaled(dh_ND.to(h_ND.dtype), factor_N, launch), dc_CD[:C], dscore_N


def _scaled(x_ND: Tensor, factor_N: Tensor, launch: Launch) -> Tensor:
    """Rows times their factors."""
    (N, D), out_ND = x_ND.shape, torch.empty_like(x_ND)
    scale_rows_kernel[(triton.cdiv(N, SCALED_ROWS),)](
        x_ND, factor_N, out_ND, N, D, launch.columns, SCALED_ROWS, num_warps=4
    )
    return out_ND


def aligned(K: int, launch: Launch) -> int:
    """K, or as whole tiles where ALIGNED does not divide it."""
    return K if K % ALIGNED == 0 else triton.cdiv(K, launch.candidates) * launch.candidates


def _aligned_rows(c_KD: Tensor, launch: Launch) -> Tensor:
    """Candidates, with rows of 0 up to `aligned`."""
    extra = aligned(len(c_KD), launch) - len(c_KD)
    return torch.nn.functional.pad(c_KD, (0, 0, 0, extra)) if extra else c_KD


def _make_exponentials(
    exp_RJ: Tensor, repeat_sum_R: Tensor, h_RD: Tensor, c_KD: Tensor, bias_K: Tensor,
    candidates_K: Tensor | None, targets_R: Tensor | None, first_ZK: Tensor | None,
    sequence_R: Tensor | None, token_R: Tensor | None, score_R: Tensor | None, base_R: Tensor,
    launch: Launch,
) -> None:  # fmt: skip
    """E of a chunk: 0 from K to the end of the last tile, which the kernel stores whole, and
    undefined behind it. Adds its sums over repeats to repeat_sum_R."""
    (R, D), K = h_RD.shape, c_KD.shape[0]
    grid, tiles = grid_of(R, K, launch)
    repeats, stride = first_ZK is not None, 0 if first_ZK is None else first_ZK.stride(0)
    sum_GR = base_R.new_empty(grid[1], R) if repeats else None
    exponentials_kernel[grid](
        h_RD, c_KD, bias_K, candidates_K, targets_R, first_ZK, sequence_R, token_R, score_R,
        base_R, exp_RJ, None, sum_GR, R, K, tiles, exp_RJ.stride(0), stride, D, launch.columns,
        launch.rows, launch.candidates, candidates_K is not None, repeats, False,
        launch.precision, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if sum_GR is not None:
        repeat_sum_R.add_(sum_GR.sum(0))


def _total(like: Tensor, rows: int, parts: int) -> Tensor:
    """What `parts` products are summed in: of several, zeros in fp32."""
    shape = rows, like.shape[1]
    return like.new_empty(shape) if parts == 1 else like.new_zeros(shape, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor, parts: int) -> None:
    if parts == 1:
        torch.mm(a, b, out=total)
    else:
        total.add_(a @ b)


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


@candidate_logsumexp_backward_op.register_fake
def _(
    dlse_N: Tensor, dtarget_N: Tensor, h_ND: Tensor, c_CD: Tensor, bias_C: Tensor,
    candidates_C: Tensor | None, targets_N: Tensor | None, place_N: Tensor | None,
    first_ZC: Tensor | None, sequence_N: Tensor | None, token_N: Tensor | None,
    score_N: Tensor | None, lse_N: Tensor, logit_N: Tensor, base_N: Tensor, repeat_sum_N: Tensor,
    exp_NJ: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    scores = 0 if score_N is None else h_ND.shape[0]
    dscore_N = h_ND.new_empty(scores, dtype=torch.float32)
    return h_ND.new_empty(h_ND.shape), c_CD.new_empty(c_CD.shape), dscore_N
