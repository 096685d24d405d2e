"""log sum_c exp(h_n . c_c + bias_c) without its logits in memory, and its gradients, on Triton.

Both ways work on exponentials against a base that each position has, `E_nc = exp(logit_nc - b_n)`,
rounded to the dtype of h (`softmax_walk`). What a gradient still lacks is one factor a position,
`f_n = exp(b_n - lse_n) dlse_n`, which may stand before the products as well as behind them, and
the target's part, which goes into E at its place:

  dh = f * (E c),   dc = E^T (f * h),   E_n,place += dtarget_n / f_n

So where E fits into KEPT_SHARE the forward keeps it: its base is then the largest logit of the
first tile, and three products do, as many as the definition has. A position whose logsumexp is far
from that, beyond what exponents hold, gets its own exponentials with the logsumexp as the base. In
larger problems the forward sums alone, and the backward makes E anew chunk by chunk, with the
logsumexp as the base: a fourth product. `E c` and `E^T h` are cuBLAS's, which wants a number of
candidates that 8 divides: exponentials of 0 and rows of 0 fill it up.

A rival whose id is the position's own target (an accidental hit) is left out where ids are given.
With repeats, a candidate that the position's history holds has the position's repeat score added.
Nothing reads a value on the host and no atomics are used: a CUDA graph can hold it all, and the
kernels give the same bits every time.

Shape suffixes: N positions, C candidates, D width, Z sequences; R positions and K candidates of a
chunk, G runs of candidate tiles, J candidates in whole tiles.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
from torch import Tensor

from modules.kernels.softmax_walk import (
    exponentials_kernel,
    factor_kernel,
    finish_kernel,
    logsumexp_kernel,
    place_kernel,
    scale_rows_kernel,
    target_kernel,
)
from modules.products import triton_precision
from modules.repeats import WHOLE_TILES

DTYPES = (torch.bfloat16, torch.float32)
MULTIPROCESSORS = 132  # of an H100
KEPT_SHARE = 0.05  # of the device's memory, for exponentials from the forward to the backward
CHUNK_BYTES = 512 * 2**20  # of one chunk's exponentials
CHUNK_CANDIDATES = 16_384  # at least, where there are as many: dc's product has to fill the card
ALIGNED = 8  # candidates of a chunk: 16 bytes of bf16, without which cuBLAS is 4 times slower
PLACE_ROWS, FACTOR_ROWS, SCALED_ROWS = 16, 128, 8  # positions of a program that does not walk


@dataclass(frozen=True)
class Launch:
    """Positions, candidates and columns of a tile; how a program runs.

    programs: as many as a multiprocessor holds at once.
    """

    rows: int
    candidates: int
    columns: int
    warps: int
    stages: int
    precision: str = "ieee"
    programs: int = 1


def choose_launch(D: int, dtype: torch.dtype) -> Launch:
    """At D 256 two programs share a multiprocessor: one's exponentials hide the other's products.

    With tiles of 64 candidates, so one program, a walk with repeats takes a third longer there.
    32 rows of fp32 keep clear of warp-group products, which Triton 3.6 miscompiles there
    (`tests/gpu/lint_sass.py`).
    """
    if dtype == torch.float32:
        return Launch(32, 64, 32, warps=4, stages=3, precision=triton_precision())
    if D > 256:
        return Launch(128, 128, 64, warps=8, stages=3)
    columns = max(triton.next_power_of_2(D), 16)
    return Launch(128, 32, columns, warps=8, stages=2, programs=2)


@cache
def runs_of(row_tiles: int, tiles: int, programs: int) -> int:
    """Into how many runs the candidate tiles are cut, so that all programs end soonest.

    programs: as many as run at once. One costs its tiles and about one more, for its positions and
    its end.
    """

    def duration(runs: int) -> int:
        waves = triton.cdiv(row_tiles * runs, programs)
        return waves * (triton.cdiv(tiles, runs) + 1)

    return min(range(1, min(tiles, programs) + 1), key=duration)


def _grid(N: int, C: int, launch: Launch) -> tuple[tuple[int, int], int]:
    """The programs, and the candidate tiles of one. No run is empty."""
    row_tiles, all_tiles = triton.cdiv(N, launch.rows), triton.cdiv(C, launch.candidates)
    runs = runs_of(row_tiles, all_tiles, MULTIPROCESSORS * launch.programs)
    tiles = triton.cdiv(all_tiles, runs)
    return (row_tiles, triton.cdiv(all_tiles, tiles)), tiles


def _padded(C: int, launch: Launch) -> int:
    """C, or as whole tiles."""
    return triton.cdiv(C, launch.candidates) * launch.candidates


@torch.library.custom_op("ssd4rec::candidate_logsumexp", mutates_args=())
def candidate_logsumexp_op(
    h_ND: Tensor, c_CD: Tensor, bias_C: Tensor, candidates_C: Tensor | None,
    targets_N: Tensor | None, place_N: Tensor | None, first_ZC: Tensor | None,
    sequence_N: Tensor | None, token_N: Tensor | None, score_N: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The logsumexp and the logit at `place_N`, fp32 [N] each; and, with `keep`, exponentials:

    their base, their sum over repeats, both [N], and themselves, [N, J].
    """
    (N, D), C = h_ND.shape, c_CD.shape[0]
    h_ND, c_CD, bias_C = h_ND.contiguous(), c_CD.contiguous(), bias_C.contiguous()
    logit_N = h_ND.new_zeros(N, dtype=torch.float32)
    launch = choose_launch(D, h_ND.dtype)
    repeats, stride = score_N is not None, 0 if first_ZC is None else first_ZC.stride(0)
    base_N, repeat_sum_N, exp_NJ = _room_for_exponentials(h_ND, C, repeats, keep, launch)
    if N == 0 or C == 0:
        return torch.full_like(logit_N, -torch.inf), logit_N, base_N, repeat_sum_N, exp_NJ
    inputs = (
        h_ND, c_CD, bias_C, candidates_C, targets_N, first_ZC, sequence_N, token_N, score_N
    )  # fmt: skip
    grid, tiles = _grid(N, C, launch)
    shape = D, launch.columns, launch.rows, launch.candidates, candidates_C is not None, repeats
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if keep:
        sum_GN, repeat_sum_GN = (logit_N.new_empty(grid[1], N) for _ in range(2))
        exponentials_kernel[grid](
            *inputs, base_N, exp_NJ, sum_GN, repeat_sum_GN, N, C, tiles, exp_NJ.stride(0), stride,
            *shape, True, launch.precision, **options,
        )  # fmt: skip
        lse_N = torch.empty_like(logit_N)
        finish_kernel[grid[:1]](
            *inputs, base_N, exp_NJ, sum_GN, repeat_sum_GN, lse_N, repeat_sum_N, N, C, grid[1],
            exp_NJ.stride(0), stride, *shape, launch.precision, **options,
        )  # fmt: skip
    else:
        lse_GN = logit_N.new_empty(grid[1], N)
        logsumexp_kernel[grid](
            *inputs, lse_GN, N, C, tiles, stride, *shape, launch.precision, **options
        )
        lse_N = lse_GN[0] if grid[1] == 1 else torch.logsumexp(lse_GN, dim=0)
    if place_N is not None:
        target_kernel[(triton.cdiv(N, PLACE_ROWS),)](
            h_ND, c_CD, bias_C, place_N, first_ZC, sequence_N, token_N, score_N, logit_N, N, C,
            stride, D, launch.columns, PLACE_ROWS, repeats, num_warps=4,
        )  # fmt: skip
    return lse_N, logit_N, base_N, repeat_sum_N, exp_NJ


def _room_for_exponentials(
    h_ND: Tensor, C: int, repeats: bool, keep: bool, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """Base, sum over repeats and exponentials that a forward keeps, or nothing."""
    N = h_ND.shape[0] if keep else 0
    base_N = h_ND.new_empty(N, dtype=torch.float32)
    repeat_sum_N = base_N.new_empty(N if repeats else 0)
    return base_N, repeat_sum_N, h_ND.new_empty(N, _padded(C, launch))


@candidate_logsumexp_op.register_fake
def _(
    h_ND: Tensor, c_CD: Tensor, bias_C: Tensor, candidates_C: Tensor | None,
    targets_N: Tensor | None, place_N: Tensor | None, first_ZC: Tensor | None,
    sequence_N: Tensor | None, token_N: Tensor | None, score_N: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (N, D), C = h_ND.shape, c_CD.shape[0]
    lse_N = h_ND.new_empty(N, dtype=torch.float32)
    launch = choose_launch(D, h_ND.dtype)
    kept = _room_for_exponentials(h_ND, C, score_N is not None, keep, launch)
    return lse_N, torch.empty_like(lse_N), *kept


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

    Writes into exp_NJ at the targets' places, and puts back what was there. Sums over chunks are
    fp32.
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
    scaled_ND = _scaled(h_ND, factor_N, h_ND.dtype, launch)
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
    return _scaled(dh_ND, factor_N, h_ND.dtype, launch), dc_CD[:C], dscore_N


def _scaled(x_ND: Tensor, factor_N: Tensor, dtype: torch.dtype, launch: Launch) -> Tensor:
    """Rows times their factors."""
    (N, D), out_ND = x_ND.shape, torch.empty_like(x_ND, dtype=dtype)
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
    grid, tiles = _grid(R, K, launch)
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


def _setup_context(ctx, inputs, output) -> None:
    lse_N, logit_N, base_N, repeat_sum_N, exp_NJ = output
    ctx.mark_non_differentiable(base_N, repeat_sum_N, exp_NJ)
    ctx.set_materialize_grads(False)  # of those, which would be filled with zeros
    ctx.save_for_backward(*inputs[:-1], lse_N, logit_N, base_N, repeat_sum_N, exp_NJ)


def _backward(ctx, dlse_N, dtarget_N, *_):
    saved = ctx.saved_tensors
    zeros_N = torch.zeros_like(saved[10])
    dh_ND, dc_CD, dscore_N = candidate_logsumexp_backward_op(
        zeros_N if dlse_N is None else dlse_N, zeros_N if dtarget_N is None else dtarget_N,
        *saved,
    )  # fmt: skip
    no_ids = (None,) * 7
    return dh_ND, dc_CD, *no_ids, dscore_N if saved[9] is not None else None, None


candidate_logsumexp_op.register_autograd(_backward, setup_context=_setup_context)


def candidate_logsumexp_triton(
    h_ND: Tensor, c_CD: Tensor, bias_C: Tensor, candidates_C: Tensor | None = None,
    targets_N: Tensor | None = None, place_N: Tensor | None = None,
    first_ZC: Tensor | None = None, sequence_N: Tensor | None = None,
    token_N: Tensor | None = None, score_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(log sum_c exp(logit_c), the logit at `place_N`), fp32 [N]; differentiable once.

    logit_c = h . c + bias_c, plus score_N where `first_ZC[sequence_N, c] <= token_N`.

    Args:
        h_ND, c_CD: one dtype, bf16 or fp32.
        bias_C: fp32; -inf leaves a candidate out.
        candidates_C, targets_N: int64 ids, both or neither: a candidate that is the position's own
            target is left out of the sum.
        place_N: int64, the target's place among the candidates; elsewhere, or not given, the
            second answer is 0.
        first_ZC, sequence_N, token_N, score_N: int32, int64, int32 and fp32, all or none;
            0 <= sequence_N < Z. Rows of first_ZC stand in memory at a multiple of WHOLE_TILES.

    Raises:
        ValueError: a shape or dtype that the kernels do not have.
    """
    if h_ND.dtype not in DTYPES or c_CD.dtype != h_ND.dtype or bias_C.dtype != torch.float32:
        raise ValueError(
            f"h and c must share one dtype of {DTYPES} and the bias be fp32, not "
            f"{h_ND.dtype}, {c_CD.dtype}, {bias_C.dtype}"
        )
    if c_CD.shape[1] != h_ND.shape[1] or bias_C.shape != c_CD.shape[:1]:
        raise ValueError(
            f"h [N, D] needs c [C, D] and bias [C], not {tuple(h_ND.shape)}, "
            f"{tuple(c_CD.shape)}, {tuple(bias_C.shape)}"
        )
    if (candidates_C is None) != (targets_N is None):
        raise ValueError("hits need both the candidates' and the targets' ids")
    wanted = ((candidates_C, bias_C), (targets_N, h_ND), (place_N, h_ND))
    for ids, like in wanted:
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != like.shape[:1]):
            raise ValueError(f"ids must be int64 [{like.shape[0]}], not {ids.dtype} {ids.shape}")
    dense = [None if ids is None else ids.contiguous() for ids, _ in wanted]
    repeats = [first_ZC, sequence_N, token_N, score_N]
    if score_N is not None:
        _check_repeats(h_ND.shape[0], c_CD.shape[0], first_ZC, sequence_N, token_N, score_N)
        repeats[1:] = [one.contiguous() for one in repeats[1:]]  # type: ignore[union-attr]
    elif any(one is not None for one in repeats):
        raise ValueError("repeats need first, sequences, tokens and scores, all or none")
    keep = _keeps_exponentials(h_ND, c_CD, score_N)
    return candidate_logsumexp_op(h_ND, c_CD, bias_C, *dense, *repeats, keep)[:2]


def _keeps_exponentials(h_ND: Tensor, c_CD: Tensor, score_N: Tensor | None) -> bool:
    """Whether there will be a backward, and they fit."""
    wanted = any(one is not None and one.requires_grad for one in (h_ND, c_CD, score_N))
    columns = _padded(c_CD.shape[0], choose_launch(h_ND.shape[1], h_ND.dtype))
    needed = h_ND.element_size() * h_ND.shape[0] * columns
    return torch.is_grad_enabled() and wanted and needed <= KEPT_SHARE * _memory(h_ND.device)


def _memory(device: torch.device) -> int:
    """Bytes of a device; as of a large one where Triton's interpreter runs."""
    if device.type != "cuda":
        return 80 * 2**30
    return torch.cuda.get_device_properties(device).total_memory


def _check_repeats(
    N: int, C: int, first_ZC: Tensor | None, sequence_N: Tensor | None, token_N: Tensor | None,
    score_N: Tensor,
) -> None:  # fmt: skip
    if first_ZC is None or sequence_N is None or token_N is None:
        raise ValueError("repeats need first, sequences, tokens and scores, all or none")
    kinds = [one.dtype for one in (first_ZC, sequence_N, token_N, score_N)]
    shapes = {one.shape for one in (sequence_N, token_N, score_N)}
    if kinds != [torch.int32, torch.int64, torch.int32, torch.float32] or shapes != {(N,)}:
        raise ValueError(f"repeats need int32, int64, int32, fp32 [{N}], not {kinds}, {shapes}")
    strides = first_ZC.stride()
    if first_ZC.shape[1] != C or (C and (strides[1] != 1 or strides[0] % WHOLE_TILES)):
        raise ValueError(
            f"first [Z, {C}] needs rows at a multiple of {WHOLE_TILES}, not {first_ZC.shape} with "
            f"strides {strides}"
        )
