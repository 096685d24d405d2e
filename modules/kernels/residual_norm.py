"""LayerNorm with what stands around it, in one pass each way, on Triton.

    behind a sublayer:      out = dropout(LN(a + a_bias + x))
    behind the embedding:   out = LN(dropout(a))
    LN(s) = w * (s - mean(s)) / sqrt(var(s) + eps) + bias         (over D)

Masks are drawn again in the backward (`kernels.dropout`); so are the sums, means and variances.
a and x receive one gradient, one tensor. a_bias is that of the product that made a: here it and its
gradient cost no pass of their own. It, dw and dbias leave as one partial sum a program in a fixed
order: same inputs, same bits.

Shape suffixes: T tokens, D width, R rows of a tile, G programs, P parameters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.kernels.dropout import draw_seed, keep_scale, threshold_of
from modules.kernels.gated_norm import (
    BACKWARD_WARPS,
    DTYPES,
    FORWARD_WARPS,
    MAX_WIDTH,
    load_tile,
    tile_shape,
)
from modules.kernels.partial_sums import partial_sums

WARPS = 132 * 16  # of the backward; with 24 a multiprocessor it took a tenth longer


@triton.jit
def standardised(s_RD, mask_RD, eps, D: tl.constexpr):
    """(s - mean) / sqrt(var + eps), 0 outside the mask, and 1 / sqrt(var + eps)."""
    mean_R = tl.sum(s_RD, 1) / D
    s_RD = tl.where(mask_RD, s_RD - mean_R[:, None], 0.0)
    scale_R = 1.0 / tl.sqrt(tl.sum(s_RD * s_RD, 1) / D + eps)
    return s_RD * scale_R[:, None], scale_R


@triton.jit(do_not_specialize=["rows", "threshold"])
def residual_norm_kernel(
    a_ptr, x_ptr, a_bias_ptr, w_ptr, bias_ptr, seed_ptr, out_ptr, rows, threshold, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, SUM: tl.constexpr,
    BIAS: tl.constexpr, DROP: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    if DROP:
        seed = tl.load(seed_ptr)  # first: what it starts is the longest
    t_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.arange(0, BLOCK_D)
    mask_RD = (t_R < rows)[:, None] & (d_D < D)[None, :]
    w_D = tl.load(w_ptr + d_D, mask=d_D < D, other=0.0)
    bias_D = tl.load(bias_ptr + d_D, mask=d_D < D, other=0.0)
    s_RD = load_tile(a_ptr, t_R, D, d_D, mask_RD)
    if SUM:
        s_RD += load_tile(x_ptr, t_R, D, d_D, mask_RD)
    if BIAS:
        s_RD += tl.load(a_bias_ptr + d_D, mask=d_D < D, other=0.0)[None, :]
    if DROP:
        keep_RD = keep_scale(seed, t_R, threshold, BLOCK_D)
        if BEFORE:
            s_RD *= keep_RD
    n_RD, _ = standardised(s_RD, mask_RD, eps, D)
    out_RD = n_RD * w_D[None, :] + bias_D[None, :]
    if DROP and not BEFORE:
        out_RD *= keep_RD
    out_ptrs = out_ptr + t_R.to(tl.int64)[:, None] * D + d_D[None, :]
    tl.store(out_ptrs, out_RD.to(out_ptr.dtype.element_ty), mask=mask_RD)


@triton.jit(do_not_specialize=["rows", "steps", "threshold"])
def residual_norm_backward_kernel(
    dout_ptr, a_ptr, x_ptr, a_bias_ptr, w_ptr, seed_ptr, ds_ptr, partial_ptr, rows, steps,
    threshold, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    SUM: tl.constexpr, BIAS: tl.constexpr, DROP: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Program g takes the tiles g, g + programs, …; its sums for dw, dbias, da_bias: [P, G, D]."""
    d_D = tl.arange(0, BLOCK_D)
    w_D = tl.load(w_ptr + d_D, mask=d_D < D, other=0.0)
    if BIAS:
        a_bias_D = tl.load(a_bias_ptr + d_D, mask=d_D < D, other=0.0)
        da_bias_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dw_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dbias_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    if DROP:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        t_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_RD = (t_R < rows)[:, None] & (d_D < D)[None, :]
        s_RD = load_tile(a_ptr, t_R, D, d_D, mask_RD)
        if SUM:
            s_RD += load_tile(x_ptr, t_R, D, d_D, mask_RD)
        if BIAS:
            s_RD += a_bias_D[None, :]
        dout_RD = load_tile(dout_ptr, t_R, D, d_D, mask_RD)
        if DROP:
            keep_RD = keep_scale(seed, t_R, threshold, BLOCK_D)
            if BEFORE:
                s_RD *= keep_RD
            else:
                dout_RD *= keep_RD
        n_RD, scale_R = standardised(s_RD, mask_RD, eps, D)
        dw_RD += dout_RD * n_RD
        dbias_RD += dout_RD
        dn_RD = dout_RD * w_D[None, :]
        mean_R = tl.sum(dn_RD, 1) / D
        along_R = tl.sum(dn_RD * n_RD, 1) / D
        ds_RD = (dn_RD - mean_R[:, None] - n_RD * along_R[:, None]) * scale_R[:, None]
        if DROP and BEFORE:
            ds_RD *= keep_RD
        if BIAS:
            da_bias_RD += ds_RD
        ds_ptrs = ds_ptr + t_R.to(tl.int64)[:, None] * D + d_D[None, :]
        tl.store(ds_ptrs, ds_RD.to(ds_ptr.dtype.element_ty), mask=mask_RD)
    sums = tl.num_programs(0) * D
    partial_ptrs = partial_ptr + tl.program_id(0) * D + d_D
    tl.store(partial_ptrs, tl.sum(dw_RD, 0), mask=d_D < D)
    tl.store(partial_ptrs + sums, tl.sum(dbias_RD, 0), mask=d_D < D)
    if BIAS:
        tl.store(partial_ptrs + 2 * sums, tl.sum(da_bias_RD, 0), mask=d_D < D)


@torch.library.custom_op("ssd4rec::residual_norm", mutates_args=())
def residual_norm_op(
    a_TD: Tensor, x_TD: Tensor | None, a_bias_D: Tensor | None, w_D: Tensor, bias_D: Tensor,
    seed: Tensor | None, threshold: int, before: bool, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    T, D = a_TD.shape
    a_TD, x_TD = a_TD.contiguous(), None if x_TD is None else x_TD.contiguous()
    out_TD = torch.empty_like(a_TD, dtype=dtype)
    block_R, block_D, warps = tile_shape(D, FORWARD_WARPS)
    if T:
        residual_norm_kernel[(triton.cdiv(T, block_R),)](
            a_TD, x_TD, a_bias_D, w_D, bias_D, seed, out_TD, T, threshold, eps, D, block_D,
            block_R, x_TD is not None, a_bias_D is not None, seed is not None, before,
            num_warps=warps,
        )  # fmt: skip
    return out_TD


@residual_norm_op.register_fake
def _(
    a_TD: Tensor, x_TD: Tensor | None, a_bias_D: Tensor | None, w_D: Tensor, bias_D: Tensor,
    seed: Tensor | None, threshold: int, before: bool, eps: float, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a_TD.new_empty(a_TD.shape, dtype=dtype)


@torch.library.custom_op("ssd4rec::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    dout_TD: Tensor, a_TD: Tensor, x_TD: Tensor | None, a_bias_D: Tensor | None, w_D: Tensor,
    seed: Tensor | None, threshold: int, before: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradient of a (and of x), and [P, D] those of w, bias and, if it is there, a_bias."""
    T, D = a_TD.shape
    dout_TD, a_TD = dout_TD.contiguous(), a_TD.contiguous()
    x_TD = None if x_TD is None else x_TD.contiguous()
    ds_TD = torch.empty_like(a_TD)
    P = 2 if a_bias_D is None else 3
    if T == 0:
        return ds_TD, w_D.new_zeros(P, D)
    block_R, block_D, warps = tile_shape(D, BACKWARD_WARPS)
    tiles = triton.cdiv(T, block_R)
    programs = min(tiles, WARPS // warps)
    partial_PGD = w_D.new_empty(P, programs, D)
    residual_norm_backward_kernel[(programs,)](
        dout_TD, a_TD, x_TD, a_bias_D, w_D, seed, ds_TD, partial_PGD, T,
        triton.cdiv(tiles, programs), threshold, eps, D, block_D, block_R, x_TD is not None,
        a_bias_D is not None, seed is not None, before, num_warps=warps,
    )  # fmt: skip
    return ds_TD, partial_sums(partial_PGD)


@residual_norm_backward_op.register_fake
def _(
    dout_TD: Tensor, a_TD: Tensor, x_TD: Tensor | None, a_bias_D: Tensor | None, w_D: Tensor,
    seed: Tensor | None, threshold: int, before: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return a_TD.new_empty(a_TD.shape), w_D.new_empty(2 if a_bias_D is None else 3, len(w_D))


def _setup_context(ctx, inputs, output) -> None:
    a_TD, x_TD, a_bias_D, w_D, _, seed, ctx.threshold, ctx.before, ctx.eps, _ = inputs
    ctx.save_for_backward(a_TD, x_TD, a_bias_D, w_D, seed)


def _backward(ctx, dout_TD):
    ds_TD, sums_PD = residual_norm_backward_op(
        dout_TD, *ctx.saved_tensors, ctx.threshold, ctx.before, ctx.eps
    )
    dw_D, dbias_D, *da_bias_D = sums_PD.unbind()
    dx_TD = None if ctx.saved_tensors[1] is None else ds_TD
    return ds_TD, dx_TD, da_bias_D[0] if da_bias_D else None, dw_D, dbias_D, *[None] * 5


residual_norm_op.register_autograd(_backward, setup_context=_setup_context)


def residual_norm_triton(
    a_TD: Tensor, x_TD: Tensor | None, w_D: Tensor, bias_D: Tensor, eps: float, rate: float,
    dtype: torch.dtype, *, a_bias_D: Tensor | None = None, dropout_first: bool = False,
    seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formulas above, [T, D] in `dtype`; differentiable to a, x, w and both biases, once.

    Args:
        a_TD, x_TD: bf16 or fp32, one dtype, up to 8,192 columns; x_TD None for no sum.
        w_D, bias_D, a_bias_D: fp32; a_bias None for none.
        rate: dropout, 0 for none; behind LN, or with `dropout_first` in front of it.
        seed: int64 [1] on the device; drawn from torch's generator when None.

    Raises:
        ValueError: a shape or dtype that the kernels do not have, or a rate outside [0, 1).
    """
    if a_TD.dtype not in DTYPES or dtype not in DTYPES or w_D.dtype != torch.float32:
        raise ValueError(
            f"a and the output must be of {DTYPES}, w fp32, not {a_TD.dtype}, {dtype}, {w_D.dtype}"
        )
    if x_TD is not None and (x_TD.dtype != a_TD.dtype or x_TD.shape != a_TD.shape):
        raise ValueError(
            f"x must be as a, {tuple(a_TD.shape)} {a_TD.dtype}, not "
            f"{tuple(x_TD.shape)} {x_TD.dtype}"
        )
    if w_D.shape != a_TD.shape[1:] or bias_D.shape != w_D.shape or a_TD.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"a must be [T, D], w and bias [D], D at most {MAX_WIDTH}, not "
            f"{tuple(a_TD.shape)}, {tuple(w_D.shape)}, {tuple(bias_D.shape)}"
        )
    if a_bias_D is not None and (a_bias_D.shape != w_D.shape or a_bias_D.dtype != w_D.dtype):
        raise ValueError(
            f"a_bias must be fp32 {tuple(w_D.shape)}, not {a_bias_D.dtype} {tuple(a_bias_D.shape)}"
        )
    threshold = threshold_of(rate)
    if threshold == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(a_TD.device)
    return residual_norm_op(
        a_TD, x_TD, a_bias_D, w_D, bias_D, seed, threshold, dropout_first, eps, dtype
    )
