"""The middle of the feed-forward, dropout(GELU(x + bias)), in one pass each way, on Triton.

x is the first product without its bias: the bias is added here, where its gradient, a sum over all
tokens of a tensor four times as wide as the model, costs no pass of its own. Masks are drawn again
in the backward (`kernels.dropout`).

GELU is the exact one, v Phi(v), Phi the normal distribution: max(v, 0) - |v| (1 - Phi(|v|)). The
tail 1 - Phi(u) is taken as 2 to the power of a polynomial, right within 6e-8, the rounding of fp32:
a general erf takes three times the instructions, and these kernels were bound by them. The
polynomial is the minimax fit of u (1 - Phi(u)) on [0, 5.9]; it falls for all u.

Shape suffixes: T tokens, F columns, R rows of a tile, G programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.kernels.dropout import draw_seed, keep_scale, threshold_of
from modules.kernels.gated_norm import DTYPES, load_tile
from modules.kernels.partial_sums import partial_sums

COLUMNS = 512  # of a tile
ROWS = 4
PROGRAMS = 792  # of the backward: six a multiprocessor of an H100, whose registers hold seven


@triton.jit
def upper_tail(u):
    """1 - Phi(u), u >= 0."""
    power = -1.96608603e-6 * u + 2.89214222e-5
    power = power * u - 1.36167079e-4
    power = power * u - 2.58908823e-4
    power = power * u + 7.22507799e-3
    power = power * u - 5.26106815e-2
    power = power * u - 4.59168796e-1
    power = power * u - 1.15111035
    return tl.exp2(power * u - 0.999999888)


@triton.jit(do_not_specialize=["rows", "threshold"])
def gelu_dropout_kernel(
    x_ptr, bias_ptr, seed_ptr, out_ptr, rows, threshold, F: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    if DROP:
        seed = tl.load(seed_ptr)  # first: what it starts is the longest
    t_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_RF = (t_R < rows)[:, None] & (f_F < F)[None, :]
    bias_F = tl.load(bias_ptr + f_F, mask=f_F < F, other=0.0)
    v_RF = load_tile(x_ptr, t_R, F, f_F, mask_RF) + bias_F[None, :]
    u_RF = tl.abs(v_RF)
    out_RF = tl.maximum(v_RF, 0.0) - u_RF * upper_tail(u_RF)
    if DROP:
        virtual_R = t_R * tl.num_programs(1) + tl.program_id(1)  # a column tile's row of draws
        out_RF *= keep_scale(seed, virtual_R, threshold, BLOCK_F)
    out_ptrs = out_ptr + t_R.to(tl.int64)[:, None] * F + f_F[None, :]
    tl.store(out_ptrs, out_RF.to(out_ptr.dtype.element_ty), mask=mask_RF)


@triton.jit(do_not_specialize=["rows", "steps", "threshold"])
def gelu_dropout_backward_kernel(
    dout_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, dbias_ptr, rows, steps, threshold,
    F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_R: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Program (p, c) takes the row tiles p, p + programs, … of column tile c."""
    f_F = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    bias_F = tl.load(bias_ptr + f_F, mask=f_F < F, other=0.0)
    dbias_RF = tl.zeros([BLOCK_R, BLOCK_F], tl.float32)
    if DROP:
        seed = tl.load(seed_ptr)
    for step in range(steps):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        t_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_RF = (t_R < rows)[:, None] & (f_F < F)[None, :]
        v_RF = load_tile(x_ptr, t_R, F, f_F, mask_RF) + bias_F[None, :]
        dv_RF = load_tile(dout_ptr, t_R, F, f_F, mask_RF)
        if DROP:
            virtual_R = t_R * tl.num_programs(1) + tl.program_id(1)
            dv_RF *= keep_scale(seed, virtual_R, threshold, BLOCK_F)
        tail_RF = upper_tail(tl.abs(v_RF))
        below_RF = tl.where(v_RF < 0.0, tail_RF, 1.0 - tail_RF)
        density_RF = tl.exp2(v_RF * v_RF * -0.7213475204444817 - 1.3257480647361595)
        dv_RF *= below_RF + v_RF * density_RF
        dbias_RF += dv_RF
        dx_ptrs = dx_ptr + t_R.to(tl.int64)[:, None] * F + f_F[None, :]
        tl.store(dx_ptrs, dv_RF.to(dx_ptr.dtype.element_ty), mask=mask_RF)
    tl.store(dbias_ptr + tl.program_id(0) * F + f_F, tl.sum(dbias_RF, 0), mask=f_F < F)


def _tile(F: int) -> tuple[int, int]:
    """(columns of a tile, column tiles)."""
    columns = min(max(triton.next_power_of_2(F), 8), COLUMNS)
    return columns, triton.cdiv(F, columns)


@torch.library.custom_op("ssd4rec::gelu_dropout", mutates_args=())
def gelu_dropout_op(x_TF: Tensor, bias_F: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    T, F = x_TF.shape
    x_TF = x_TF.contiguous()
    out_TF = torch.empty_like(x_TF)
    block_F, tiles_F = _tile(F)
    if T:
        gelu_dropout_kernel[(triton.cdiv(T, ROWS), tiles_F)](
            x_TF, bias_F, seed, out_TF, T, threshold, F, block_F, ROWS, seed is not None,
            num_warps=4,
        )  # fmt: skip
    return out_TF


@gelu_dropout_op.register_fake
def _(x_TF: Tensor, bias_F: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    return x_TF.new_empty(x_TF.shape)


@torch.library.custom_op("ssd4rec::gelu_dropout_backward", mutates_args=())
def gelu_dropout_backward_op(
    dout_TF: Tensor, x_TF: Tensor, bias_F: Tensor, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    """The gradients of x and bias."""
    T, F = x_TF.shape
    dout_TF, x_TF = dout_TF.contiguous(), x_TF.contiguous()
    dx_TF = torch.empty_like(x_TF)
    if T == 0:
        return dx_TF, torch.zeros_like(bias_F)
    block_F, tiles_F = _tile(F)
    tiles_T = triton.cdiv(T, ROWS)
    programs = min(tiles_T, max(1, PROGRAMS // tiles_F))
    dbias_GF = bias_F.new_empty(programs, F)
    gelu_dropout_backward_kernel[(programs, tiles_F)](
        dout_TF, x_TF, bias_F, seed, dx_TF, dbias_GF, T, triton.cdiv(tiles_T, programs), threshold,
        F, block_F, ROWS, seed is not None, num_warps=4,
    )  # fmt: skip
    return dx_TF, partial_sums(dbias_GF[None])[0]


@gelu_dropout_backward_op.register_fake
def _(
    dout_TF: Tensor, x_TF: Tensor, bias_F: Tensor, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    return x_TF.new_empty(x_TF.shape), bias_F.new_empty(bias_F.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.threshold = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_TF):
    return *gelu_dropout_backward_op(dout_TF, *ctx.saved_tensors, ctx.threshold), None, None


gelu_dropout_op.register_autograd(_backward, setup_context=_setup_context)


def gelu_dropout_triton(
    x_TF: Tensor, bias_F: Tensor, rate: float, *, seed: Tensor | None = None
) -> Tensor:
    """dropout(GELU(x + bias)) in the dtype of x; differentiable to x and bias, once.

    Args:
        x_TF: bf16 or fp32. bias_F: fp32.
        rate: dropout, 0 for none.
        seed: int64 [1] on the device; drawn from torch's generator when None.

    Raises:
        ValueError: a shape or dtype that the kernels do not have, or a rate outside [0, 1).
    """
    if x_TF.dtype not in DTYPES or bias_F.dtype != torch.float32:
        raise ValueError(f"x must be of {DTYPES}, bias fp32, not {x_TF.dtype}, {bias_F.dtype}")
    if bias_F.shape != x_TF.shape[1:]:
        raise ValueError(
            f"x must be [T, F], bias [F], not {tuple(x_TF.shape)}, {tuple(bias_F.shape)}"
        )
    threshold = threshold_of(rate)
    if threshold == 0:
        seed = None
    elif seed is None:
        seed = draw_seed(x_TF.device)
    return gelu_dropout_op(x_TF, bias_F, seed, threshold)
