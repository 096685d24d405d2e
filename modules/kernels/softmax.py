"""log sum_c exp(h_n . c_c + bias_c) in one pass, and its gradients, on Triton.

Both ways work on exponentials against a base that each position has, `E_nc = exp(logit_nc - b_n)`,
rounded to the dtype of h (`softmax_walk`). What a gradient still lacks is one factor a position,
`f_n = exp(b_n - lse_n) dlse_n`, which may stand before the products as well as behind them, and
the target's part, which goes into E at its place:

  dh = f * (E c),   dc = E^T (f * h),   with E_n,place + dtarget_n / f_n at the target's place

With `keep` the forward keeps E: its base is then the largest logit of the first tile, and three
products do, as many as the definition has. A position whose logsumexp is far from that, beyond what
exponents hold, gets its own exponentials with the logsumexp as the base. Without `keep` the forward
sums alone, and the backward makes E anew chunk by chunk, with the logsumexp as the base: a fourth
product. `E c` and `E^T h` are cuBLAS's, which wants a number of candidates that 8 divides:
exponentials of 0 and rows of 0 fill it up.

A rival whose id is the position's own target (an accidental hit) is left out where ids are given.
With repeats, a candidate that the position's history holds has the position's repeat score added.
Nothing reads a value on the host and no atomics are used: a CUDA graph can hold it all, and the
kernels give the same bits every time.

Shape suffixes: N positions, C candidates, D width, Z sequences; R positions and K candidates of a
chunk, G runs of candidate tiles, J candidates in whole tiles.
"""

import torch
import triton
from torch import Tensor

from modules.kernels.softmax_backward import candidate_logsumexp_backward_op
from modules.kernels.softmax_launch import Launch, choose_launch, grid_of, padded
from modules.kernels.softmax_rows import target_kernel
from modules.kernels.softmax_walk import exponentials_kernel, finish_kernel, logsumexp_kernel
from modules.repeats import WHOLE_TILES

DTYPES = (torch.bfloat16, torch.float32)
TARGET_ROWS = 16  # positions of a program that does not walk


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
    grid, tiles = grid_of(N, C, launch)
    shape = D, launch.columns, launch.rows, launch.candidates, candidates_C is not None, repeats
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    if keep:
        sum_GN = logit_N.new_empty(grid[1], N)
        repeat_sum_GN = torch.empty_like(sum_GN) if repeats else None
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
        target_kernel[(triton.cdiv(N, TARGET_ROWS),)](
            h_ND, c_CD, bias_C, place_N, first_ZC, sequence_N, token_N, score_N, logit_N, N, C,
            stride, D, launch.columns, TARGET_ROWS, repeats, num_warps=4,
        )  # fmt: skip
    return lse_N, logit_N, base_N, repeat_sum_N, exp_NJ


def _room_for_exponentials(
    h_ND: Tensor, C: int, repeats: bool, keep: bool, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """Base, sum over repeats and exponentials that a forward keeps, or nothing."""
    N = h_ND.shape[0] if keep else 0
    base_N = h_ND.new_empty(N, dtype=torch.float32)
    repeat_sum_N = base_N.new_empty(N if repeats else 0)
    return base_N, repeat_sum_N, h_ND.new_empty(N, padded(C, launch))


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


def _setup_context(ctx, inputs, output) -> None:
    lse_N, logit_N, base_N, repeat_sum_N, exp_NJ = output
    ctx.mark_non_differentiable(base_N, repeat_sum_N, exp_NJ)
    ctx.set_materialize_grads(False)  # of those, which would be filled with zeros
    ctx.save_for_backward(*inputs[:-1], lse_N, logit_N, base_N, repeat_sum_N, exp_NJ)


def _backward(ctx, dlse_N, dtarget_N, *_):
    saved = ctx.saved_tensors
    given = [torch.zeros_like(saved[10]) if one is None else one for one in (dlse_N, dtarget_N)]
    dh_ND, dc_CD, dscore_N = candidate_logsumexp_backward_op(*given, *saved)
    no_ids = (None,) * 7
    return dh_ND, dc_CD, *no_ids, dscore_N if saved[9] is not None else None, None


candidate_logsumexp_op.register_autograd(_backward, setup_context=_setup_context)


def candidate_logsumexp_triton(
    h_ND: Tensor, c_CD: Tensor, bias_C: Tensor, candidates_C: Tensor | None = None,
    targets_N: Tensor | None = None, place_N: Tensor | None = None,
    first_ZC: Tensor | None = None, sequence_N: Tensor | None = None,
    token_N: Tensor | None = None, score_N: Tensor | None = None, *, keep: bool = False,
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
        keep: the exponentials, N C numbers of the dtype, for the backward.

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
    return candidate_logsumexp_op(h_ND, c_CD, bias_C, *dense, *repeats, keep)[:2]


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
