"""Depthwise causal convolution + SiLU over packed histories, one pass forward, one backward.

  `z_t = bias + Σ_{d<K} weight[K-1-d] x_{t-d} [t-d lies in t's sequence]`,  `y_t = z_t σ(z_t)`.

Bound by bytes: x in and y out. The K shifted reads of a tile come from the cache. A flag at every
sequence start says how far back a token may look; it is set on the device, so nothing waits for
the GPU. Padding behind the last sequence counts as a sequence of its own.

Backward keeps nothing but x: `dz_t = dy_t σ(z_t) (1 + z_t (1 - σ(z_t)))` is made anew for the K
tokens that `dx_t = Σ_d weight[K-1-d] dz_{t+d} [same sequence]` needs. That is K times the
arithmetic, which is free here, instead of one more tensor written and read. Weight and bias
gradients leave as one partial sum for each run of tokens: no atomics, the same bits every time.

Shape suffixes: T tokens, E channels, K taps, R rows of a tile, W columns of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_TAPS = (1, 2, 3, 4)
ROWS, COLUMNS, ROWS_A_PROGRAM = 8, 128, 256


@triton.jit(do_not_specialize=["tokens"])
def reach_kernel(flag_ptr, reach_ptr, tokens, K: tl.constexpr, BLOCK: tl.constexpr):
    """How many tokens back a token may look, at most K - 1, from the flags of sequence starts."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reach = tl.zeros([BLOCK], tl.int32)
    open_ = row < tokens
    for back in tl.static_range(K - 1):
        flag = tl.load(flag_ptr + row - back, mask=open_ & (row >= back), other=1)
        open_ = open_ & (flag == 0)
        reach += open_.to(tl.int32)
    tl.store(reach_ptr + row, reach.to(tl.uint8), mask=row < tokens)


@triton.jit
def load_rows(
    ptr, row_R, column_W, tokens, stride, SHIFT: tl.constexpr, E: tl.constexpr
):  # fmt: skip
    """Rows `row + SHIFT` in fp32, 0 outside the batch."""
    at_R = row_R + SHIFT
    mask_RW = ((at_R >= 0) & (at_R < tokens))[:, None] & (column_W < E)[None, :]
    pointers = ptr + at_R.to(tl.int64)[:, None] * stride + column_W[None, :]
    return tl.load(pointers, mask=mask_RW, other=0.0).to(tl.float32)


@triton.jit
def preactivation(
    x_ptr, weight_ptr, bias_W, row_R, reach_R, column_W, tokens, x_stride, SHIFT: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """z of the rows `row + SHIFT`, which may look back `reach`."""
    z_RW = tl.zeros([R, W], tl.float32) + bias_W[None, :]
    for distance in tl.static_range(K):
        tap_ptrs = weight_ptr + column_W * K + (K - 1 - distance)
        tap_W = tl.load(tap_ptrs, mask=column_W < E, other=0.0).to(tl.float32)
        x_RW = load_rows(x_ptr, row_R, column_W, tokens, x_stride, SHIFT - distance, E)
        z_RW += tap_W[None, :] * tl.where((reach_R >= distance)[:, None], x_RW, 0.0)
    return z_RW


@triton.jit(do_not_specialize=["tokens"])
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, reach_ptr, y_ptr, tokens, x_stride, E: tl.constexpr,
    K: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """y of a tile of R tokens and W channels."""
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    column_W = tl.program_id(1) * W + tl.arange(0, W)
    bias_W = tl.load(bias_ptr + column_W, mask=column_W < E, other=0.0).to(tl.float32)
    reach_R = tl.load(reach_ptr + row_R, mask=row_R < tokens, other=0)
    z_RW = preactivation(
        x_ptr, weight_ptr, bias_W, row_R, reach_R, column_W, tokens, x_stride, 0, E, K, R, W
    )
    y_RW = z_RW * tl.sigmoid(z_RW)
    mask_RW = (row_R < tokens)[:, None] & (column_W < E)[None, :]
    y_ptrs = y_ptr + row_R.to(tl.int64)[:, None] * E + column_W[None, :]
    tl.store(y_ptrs, y_RW.to(y_ptr.dtype.element_ty), mask=mask_RW)


@triton.jit(do_not_specialize=["tokens"])
def conv_gradient_kernel(
    x_ptr, weight_ptr, bias_ptr, reach_ptr, dy_ptr, dx_ptr, partial_ptr, tokens, x_stride,
    dy_stride, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dx of ROWS tokens; their share of the K tap gradients and the bias gradient, [K + 1, E].

    A lane sums its own rows' shares in registers; lanes meet once, at the end.
    """
    column_W = tl.program_id(1) * W + tl.arange(0, W)
    inside_W = column_W < E
    bias_W = tl.load(bias_ptr + column_W, mask=inside_W, other=0.0).to(tl.float32)
    dbias_RW = tl.zeros([R, W], tl.float32)
    back0_RW = tl.zeros([R, W], tl.float32)  # of the tap that looks 0 tokens back, then 1, 2, 3
    back1_RW = tl.zeros([R, W], tl.float32)
    back2_RW = tl.zeros([R, W], tl.float32)
    back3_RW = tl.zeros([R, W], tl.float32)
    for tile in range(0, ROWS // R):
        row_R = tl.program_id(0) * ROWS + tile * R + tl.arange(0, R)
        dx_RW = tl.zeros([R, W], tl.float32)
        for ahead in tl.static_range(K):
            later_R = row_R + ahead
            reach_R = tl.load(reach_ptr + later_R, mask=later_R < tokens, other=0)
            z_RW = preactivation(
                x_ptr, weight_ptr, bias_W, row_R, reach_R, column_W, tokens, x_stride, ahead, E, K,
                R, W,
            )  # fmt: skip
            dy_RW = load_rows(dy_ptr, row_R, column_W, tokens, dy_stride, ahead, E)
            gate_RW = tl.sigmoid(z_RW)
            dz_RW = dy_RW * gate_RW * (1 + z_RW * (1 - gate_RW))
            tap_ptrs = weight_ptr + column_W * K + (K - 1 - ahead)
            tap_W = tl.load(tap_ptrs, mask=inside_W, other=0.0).to(tl.float32)
            dx_RW += tl.where((reach_R >= ahead)[:, None], tap_W[None, :] * dz_RW, 0.0)
            if ahead == 0:
                dbias_RW += dz_RW
                for distance in tl.static_range(K):
                    x_RW = load_rows(x_ptr, row_R, column_W, tokens, x_stride, -distance, E)
                    share_RW = tl.where((reach_R >= distance)[:, None], dz_RW * x_RW, 0.0)
                    if distance == 0:
                        back0_RW += share_RW
                    elif distance == 1:
                        back1_RW += share_RW
                    elif distance == 2:
                        back2_RW += share_RW
                    else:
                        back3_RW += share_RW
        mask_RW = (row_R < tokens)[:, None] & inside_W[None, :]
        dx_ptrs = dx_ptr + row_R.to(tl.int64)[:, None] * E + column_W[None, :]
        tl.store(dx_ptrs, dx_RW.to(dx_ptr.dtype.element_ty), mask=mask_RW)
    partial_ptrs = partial_ptr + tl.program_id(0) * (K + 1) * E + column_W
    tl.store(partial_ptrs + K * E, tl.sum(dbias_RW, 0), mask=inside_W)
    tl.store(partial_ptrs + (K - 1) * E, tl.sum(back0_RW, 0), mask=inside_W)
    if K > 1:
        tl.store(partial_ptrs + (K - 2) * E, tl.sum(back1_RW, 0), mask=inside_W)
    if K > 2:
        tl.store(partial_ptrs + (K - 3) * E, tl.sum(back2_RW, 0), mask=inside_W)
    if K > 3:
        tl.store(partial_ptrs + (K - 4) * E, tl.sum(back3_RW, 0), mask=inside_W)


def reaches(offsets_B1: Tensor, tokens: int, K: int) -> Tensor:
    """How many tokens back each token may look: its place in its sequence, at most K - 1."""
    flag_T1 = offsets_B1.new_zeros(tokens + 1, dtype=torch.uint8).index_fill_(0, offsets_B1, 1)
    reach_T = flag_T1.new_empty(tokens)
    reach_kernel[(triton.cdiv(tokens, 1024),)](flag_T1, reach_T, tokens, K, 1024)
    return reach_T


def unit_columns(x_TE: Tensor) -> Tensor:
    """x with adjacent columns; the stride between tokens stays as it is."""
    return x_TE if x_TE.stride(-1) == 1 else x_TE.contiguous()


@torch.library.custom_op("ssd4rec::causal_conv", mutates_args=())
def causal_conv_op(x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, offsets_B1: Tensor) -> Tensor:
    (T, E), K = x_TE.shape, weight_EK.shape[1]
    x_TE, weight_EK, bias_E = unit_columns(x_TE), weight_EK.contiguous(), bias_E.contiguous()
    y_TE = torch.empty(T, E, dtype=x_TE.dtype, device=x_TE.device)
    if T:
        conv_kernel[(triton.cdiv(T, ROWS), triton.cdiv(E, COLUMNS))](
            x_TE, weight_EK, bias_E, reaches(offsets_B1, T, K), y_TE, T, x_TE.stride(0), E, K,
            ROWS, COLUMNS, num_warps=4,
        )  # fmt: skip
    return y_TE


@causal_conv_op.register_fake
def _(x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, offsets_B1: Tensor) -> Tensor:
    return torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)


@torch.library.custom_op("ssd4rec::causal_conv_backward", mutates_args=())
def causal_conv_backward_op(
    dy_TE: Tensor, x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, offsets_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias."""
    (T, E), K = x_TE.shape, weight_EK.shape[1]
    x_TE, dy_TE = unit_columns(x_TE), unit_columns(dy_TE)
    weight_EK, bias_E = weight_EK.contiguous(), bias_E.contiguous()
    dx_TE = torch.empty(T, E, dtype=x_TE.dtype, device=x_TE.device)
    runs = triton.cdiv(T, ROWS_A_PROGRAM)
    partial_RKE = x_TE.new_empty(runs, K + 1, E, dtype=torch.float32)
    if T:
        conv_gradient_kernel[(runs, triton.cdiv(E, COLUMNS))](
            x_TE, weight_EK, bias_E, reaches(offsets_B1, T, K), dy_TE, dx_TE, partial_RKE, T,
            x_TE.stride(0), dy_TE.stride(0), E, K, ROWS, COLUMNS, ROWS_A_PROGRAM, num_warps=4,
        )  # fmt: skip
    total_KE = partial_RKE.sum(0)
    dweight_EK = total_KE[:K].T.contiguous().to(weight_EK.dtype)
    return dx_TE, dweight_EK, total_KE[K].to(bias_E.dtype, copy=True)


@causal_conv_backward_op.register_fake
def _(
    dy_TE: Tensor, x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, offsets_B1: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx_TE, dweight_EK, dbias_E = (
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for like in (x_TE, weight_EK, bias_E)
    )
    return dx_TE, dweight_EK, dbias_E


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_TE):
    return *causal_conv_backward_op(dy_TE, *ctx.saved_tensors), None


causal_conv_op.register_autograd(_backward, setup_context=_setup_context)


def causal_conv_triton(
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, offsets_B1: Tensor
) -> Tensor:
    """SiLU(conv(x)) that never crosses a sequence start, in the dtype of x.

    Args:
        x_TE: bf16, fp16 or fp32; columns adjacent, any stride between tokens.
        weight_EK, bias_E: any float dtype; sums are fp32. The last tap meets the token itself.
        offsets_B1: int64 sequence starts and the end of the last; padding may follow.

    Raises:
        ValueError: shapes that do not fit, or taps or a dtype that the kernel does not have.
    """
    E, K = x_TE.shape[1], weight_EK.shape[1]
    if K not in KERNEL_TAPS:
        raise ValueError(f"a convolution of {K} taps has no kernel, only {KERNEL_TAPS}")
    if x_TE.dtype not in DTYPES or offsets_B1.dtype != torch.int64:
        raise ValueError(
            f"x must be one of {DTYPES}, offsets int64: {x_TE.dtype}, {offsets_B1.dtype}"
        )
    if weight_EK.shape[0] != E or bias_E.shape != (E,):
        raise ValueError(
            f"{E} channels need weight [{E}, K] and bias [{E}], "
            f"not {tuple(weight_EK.shape)} and {tuple(bias_E.shape)}"
        )
    return causal_conv_op(x_TE, weight_EK, bias_E, offsets_B1)
