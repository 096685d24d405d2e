"""The outputs of each sequence's last token alone, and their gradients.

With r the last token of a sequence, `ℓ_j = Σ_{k=j+1..r} dt_k A` and `s_j = C_r·B_j`, one head at a
time,

  y_r  = Σ_j s_j exp(ℓ_j) dt_j x_j + D x_r
  dx_j = s_j exp(ℓ_j) dt_j dy + [j = r] D dy
  dB_j = Σ_heads exp(ℓ_j) dt_j (x_j·dy) C_r            dC_r = the same sum over heads and j of B_j

One query a sequence is no product of matrices: a weighted sum of the rows of x, bound by the bytes
of x and B, backward by those of their gradients too. A program takes a chunk (`ssd_table`) and
leaves a partial sum; a second kernel adds each sequence's. ℓ is summed from r backwards, so its
rounding is small where the weights are not: c of the chunk's end less c_j, plus what `carry_kernel`
found for the chunks behind. No sum has an order of chance.

Of the sums in `ssd_backward` only `o_j = dt_j s_j exp(ℓ_j) (x_j·dy)` is left, which is at once all
that leaves j: `da_k = Σ_{j<k} o_j` over the whole sequence and `ddt_k = o_k / dt_k + A da_k`.

Shape suffixes: Q tokens of a chunk, H heads (G of them at once) of P channels, W = G P columns,
N state, B sequences, Z chunks, E = H P, I chunks at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.kernels.ssd import Launch, Sums, Table
from modules.kernels.ssd_table import chunk_tokens, piece_row
from modules.kernels.ssd_walk import spread_heads_rows

COLUMNS = 128  # of x at once
BLOCK = 16  # chunks that a walk over a sequence's chunks reads at once


@triton.jit
def last_row(offsets_ptr, sequence, MIRROR: tl.constexpr):
    """The row of a sequence's last token in the order of the walk."""
    return tl.load(offsets_ptr + sequence + (0 if MIRROR else 1)) - (0 if MIRROR else 1)


@triton.jit(do_not_specialize=["tokens"])
def carry_kernel(
    c_ptr, total_ptr, offsets_ptr, first_ptr, carry_ptr, tokens, H: tl.constexpr,
    HEADS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, BEHIND: tl.constexpr,
):  # fmt: skip
    """For each chunk of a sequence the sum over the others behind it, or in front of it.

    BEHIND: of the chunks' log decays, the last of c. In front: of `total`.
    """
    sequence = tl.program_id(0)
    first = tl.load(first_ptr + sequence)
    count = tl.load(first_ptr + sequence + 1) - first
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    h_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    carry_H = tl.zeros([HEADS], tl.float32)
    for base in range(0, count, BLOCK):
        place_I = base + tl.arange(0, BLOCK)  # in the order of the sum
        mask_IH = ((place_I > 0) & (place_I < count))[:, None] & (h_H < H)[None, :]
        if BEHIND:
            chunk_I = count - 1 - place_I
            last_I = tl.minimum(begin + (chunk_I + 2).to(tl.int64) * CHUNK, end) - 1
            ptrs = c_ptr + h_H.to(tl.int64)[None, :] * tokens + last_I[:, None]
        else:
            chunk_I = place_I
            ptrs = total_ptr + (first + chunk_I - 1)[:, None] * H + h_H[None, :]
        value_IH = tl.load(ptrs, mask=mask_IH, other=0.0)  # of the neighbour: an exclusive sum
        sum_IH = carry_H[None, :] + tl.cumsum(value_IH, 0)
        inside_IH = (place_I < count)[:, None] & (h_H < H)[None, :]
        tl.store(carry_ptr + (first + chunk_I)[:, None] * H + h_H[None, :], sum_IH, mask=inside_IH)
        carry_H += tl.sum(value_IH, 0)


@triton.jit
def load_tokens(ptr, first, stride: tl.constexpr, STEP: tl.constexpr, here_Q, column_N):
    """Columns of a chunk's tokens."""
    q_Q = tl.arange(0, here_Q.shape[0])
    ptrs = ptr + first * stride + (q_Q[:, None] * (STEP * stride) + column_N[None, :])
    return tl.load(ptrs, mask=here_Q[:, None], other=0.0)


@triton.jit
def load_decay(dt_ptr, c_ptr, carry_ptr, piece, start, length, h_G, tokens, H: tl.constexpr,
               CHUNK: tl.constexpr):  # fmt: skip
    """dt and exp(ℓ) of a chunk's tokens, [Q, G], 0 behind it."""
    q_Q = tl.arange(0, CHUNK)
    row_G = h_G.to(tl.int64) * tokens + start
    mask_QG = (q_Q < length)[:, None] & (h_G < H)[None, :]
    dt_QG = tl.load(dt_ptr + row_G[None, :] + q_Q[:, None], mask=mask_QG, other=0.0)
    c_QG = tl.load(c_ptr + row_G[None, :] + q_Q[:, None], mask=mask_QG, other=0.0)
    behind_G = tl.load(c_ptr + row_G + length - 1, mask=h_G < H, other=0.0)
    behind_G += tl.load(carry_ptr + piece * H + h_G, mask=h_G < H, other=0.0)
    return dt_QG, tl.where(mask_QG, tl.exp2(behind_G[None, :] - c_QG), 0.0)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def last_output_kernel(
    x_ptr, dt_ptr, c_ptr, carry_ptr, B_ptr, C_ptr, offsets_ptr, table_ptr, partial_ptr, sequences,
    chunks, tokens, stride: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, CHUNK: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """A chunk's part of its sequence's y."""
    piece = tl.program_id(0)
    sequence, index, _, _ = piece_row(table_ptr, piece, chunks)
    if sequence < 0 or sequence == sequences:
        return
    start, end, first = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -1 if MIRROR else 1
    n_N, g_G, w_W = tl.arange(0, N), tl.arange(0, G), tl.arange(0, G * P)
    length = tl.minimum(end - start, CHUNK)
    here_Q = tl.arange(0, CHUNK) < length
    offset_QW = tl.arange(0, CHUNK)[:, None] * (STEP * stride) + w_W[None, :]
    C_N = tl.load(C_ptr + last_row(offsets_ptr, sequence, MIRROR) * stride + n_N).to(tl.float32)
    B_QN = load_tokens(B_ptr, first, stride, STEP, here_Q, n_N)
    s_Q = tl.sum(B_QN * C_N[None, :], 1)
    for head in range(0, H, G):
        dt_QG, decay_QG = load_decay(
            dt_ptr, c_ptr, carry_ptr, piece, start, length, head + g_G, tokens, H, CHUNK
        )  # fmt: skip
        inside_W = head * P + w_W < H * P
        x_ptrs = x_ptr + first * stride + head * P + offset_QW
        x_QW = tl.load(x_ptrs, mask=here_Q[:, None] & inside_W[None, :], other=0.0)
        weight_QG = s_Q[:, None] * decay_QG * dt_QG
        y_GP = tl.sum(tl.reshape(x_QW, [CHUNK, G, P]) * weight_QG[:, :, None], 0)
        y_ptrs = partial_ptr + piece * (H * P) + head * P + w_W
        tl.store(y_ptrs, tl.reshape(y_GP, [G * P]), mask=inside_W)


@triton.jit
def last_sum_kernel(
    partial_ptr, x_ptr, D_ptr, offsets_ptr, first_ptr, out_ptr, stride: tl.constexpr,
    out_stride: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    BLOCK: tl.constexpr, MIRROR: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """Adds a sequence's partial sums over its chunks: y with D x, else dC at the last token."""
    sequence = tl.program_id(0)
    w_W = tl.program_id(1) * W + tl.arange(0, W)
    first = tl.load(first_ptr + sequence)
    count = tl.load(first_ptr + sequence + 1) - first
    sum_IW = tl.zeros([BLOCK, W], tl.float32)
    for base in range(0, count, BLOCK):
        i_I = base + tl.arange(0, BLOCK)
        ptrs = partial_ptr + (first + i_I)[:, None] * WIDTH + w_W[None, :]
        sum_IW += tl.load(ptrs, mask=(i_I < count)[:, None] & (w_W < WIDTH)[None, :], other=0.0)
    sum_W = tl.sum(sum_IW, 0)
    row = last_row(offsets_ptr, sequence, MIRROR)
    mask_W = (w_W < WIDTH) & (count > 0)
    if OUTPUT:
        x_W = tl.load(x_ptr + row * stride + w_W, mask=mask_W, other=0.0).to(tl.float32)
        sum_W += x_W * tl.load(D_ptr + w_W // P, mask=mask_W, other=0.0)
        out_ptrs = out_ptr + sequence.to(tl.int64) * out_stride + w_W
        tl.store(out_ptrs, sum_W.to(out_ptr.dtype.element_ty), mask=w_W < WIDTH)
    else:
        out_ptrs = out_ptr + row * out_stride + w_W
        tl.store(out_ptrs, sum_W.to(out_ptr.dtype.element_ty), mask=mask_W)


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def last_gradient_kernel(
    x_ptr, dt_ptr, c_ptr, carry_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, offsets_ptr, table_ptr, dx_ptr,
    dB_ptr, dC_ptr, o_ptr, total_ptr, dC_partial_ptr, dD_ptr, sequences, chunks, tokens,
    stride: tl.constexpr, dstride: tl.constexpr, H: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """dx, dB, dC = 0 and o of a chunk, Σ_j o_j, a partial dC, dD where it is the last one."""
    piece = tl.program_id(0)
    sequence, index, count, _ = piece_row(table_ptr, piece, chunks)
    n_N, g_G, w_W, q_Q = (
        tl.arange(0, N), tl.arange(0, G), tl.arange(0, G * P), tl.arange(0, CHUNK)
    )  # fmt: skip
    if sequence < 0 or sequence == sequences:
        for head in range(0, H, G):
            tl.store(dD_ptr + piece * H + head + g_G, tl.zeros([G], tl.float32), head + g_G < H)
    if sequence < 0:
        return
    start, end, first = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -1 if MIRROR else 1
    length = tl.minimum(end - start, CHUNK)
    here_Q = q_Q < length
    zero_QN = tl.zeros([CHUNK, N], dB_ptr.dtype.element_ty)
    offset_QN = q_Q[:, None] * (STEP * dstride) + n_N[None, :]
    doffset_QW = q_Q[:, None] * (STEP * dstride) + w_W[None, :]
    dx_ptr += first * dstride
    dB_ptr += first * dstride
    tl.store(dC_ptr + first * dstride + offset_QN, zero_QN, mask=here_Q[:, None])
    if sequence == sequences:
        tl.store(dB_ptr + offset_QN, zero_QN, mask=here_Q[:, None])
        for head in range(0, H, G):
            zero_QW = tl.zeros([CHUNK, G * P], dx_ptr.dtype.element_ty)
            here_QW = here_Q[:, None] & (head * P + w_W < H * P)[None, :]
            tl.store(dx_ptr + head * P + doffset_QW, zero_QW, mask=here_QW)
        return

    C_N = tl.load(C_ptr + last_row(offsets_ptr, sequence, MIRROR) * stride + n_N).to(tl.float32)
    B_QN = load_tokens(B_ptr, first, stride, STEP, here_Q, n_N)
    s_Q = tl.sum(B_QN * C_N[None, :], 1)
    ds_Q = tl.zeros([CHUNK], tl.float32)
    read_Q = (q_Q == length - 1) & (index == count - 1)
    offset_QW = q_Q[:, None] * (STEP * stride) + w_W[None, :]
    for head in tl.range(0, H, G, disable_licm=True):
        dt_QG, decay_QG = load_decay(
            dt_ptr, c_ptr, carry_ptr, piece, start, length, head + g_G, tokens, H, CHUNK
        )  # fmt: skip
        inside_G, inside_W = head + g_G < H, head * P + w_W < H * P
        here_QW = here_Q[:, None] & inside_W[None, :]
        x_QW = tl.load(x_ptr + first * stride + head * P + offset_QW, mask=here_QW, other=0.0)
        dy_ptrs = dy_ptr + sequence.to(tl.int64) * (H * P) + head * P + w_W
        dy_W = tl.load(dy_ptrs, mask=inside_W, other=0.0).to(tl.float32)
        D_G = tl.load(D_ptr + head + g_G, mask=inside_G, other=0.0)

        along_QG = tl.sum(tl.reshape(x_QW * dy_W[None, :], [CHUNK, G, P]), 2)
        moved_QG = dt_QG * decay_QG * along_QG
        ds_Q += tl.sum(moved_QG, 1)
        o_QG = s_Q[:, None] * moved_QG
        row_G = (head + g_G).to(tl.int64) * tokens + start
        o_ptrs = o_ptr + row_G[None, :] + q_Q[:, None]
        tl.store(o_ptrs, o_QG, mask=here_Q[:, None] & inside_G[None, :])
        tl.store(total_ptr + piece * H + head + g_G, tl.sum(o_QG, 0), mask=inside_G)
        dD_G = tl.sum(tl.where(read_Q[:, None], along_QG, 0.0), 0)
        tl.store(dD_ptr + piece * H + head + g_G, dD_G, mask=inside_G)

        weight_QG = s_Q[:, None] * decay_QG * dt_QG
        weight_QG += tl.where(read_Q[:, None], D_G[None, :], 0.0)
        dx_QW = (spread_heads_rows(weight_QG, G * P) * dy_W[None, :]).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + head * P + doffset_QW, dx_QW, mask=here_QW)
    dB_QN = ds_Q[:, None] * C_N[None, :]
    tl.store(dB_ptr + offset_QN, dB_QN.to(dB_ptr.dtype.element_ty), mask=here_Q[:, None])
    B_QN = load_tokens(B_ptr, first, stride, STEP, here_Q, n_N)  # again: registers are scarce
    tl.store(dC_partial_ptr + piece * N + n_N, tl.sum(ds_Q[:, None] * B_QN, 0))


def heads_at_once(H: int, P: int) -> int:
    return max(1, min(COLUMNS // P, triton.next_power_of_2(H)))


def carry(
    c_HT: Tensor, offsets_B1: Tensor, table: Table, launch: Launch, total_ZH: Tensor | None = None
) -> Tensor:
    """`carry_kernel`, [Z, H]: of `total_ZH` in front of each chunk, else of c behind it."""
    H, T = c_HT.shape
    heads = min(triton.next_power_of_2(H), 32)
    carry_ZH = c_HT.new_empty(table.chunks_4Z.shape[1], H)
    carry_kernel[(offsets_B1.numel() - 1, triton.cdiv(H, heads))](
        c_HT, total_ZH, offsets_B1, table.first_chunk_B2, carry_ZH, T, H, heads, launch.chunk,
        BLOCK, total_ZH is None, num_warps=1,
    )  # fmt: skip
    return carry_ZH


def sum_chunks(
    partial_ZW: Tensor, offsets_B1: Tensor, table: Table, out: Tensor, mirror: bool,
    x_THP: Tensor | None = None, D_H: Tensor | None = None,
) -> None:  # fmt: skip
    """`last_sum_kernel`: y [B, E] where there is x, else dC [T, N] at the last tokens' rows."""
    width, P, stride = partial_ZW.shape[1], 1, 0
    if x_THP is not None:
        P, stride = x_THP.shape[2], x_THP.stride(0)
    columns = min(triton.next_power_of_2(width), COLUMNS)
    last_sum_kernel[(offsets_B1.numel() - 1, triton.cdiv(width, columns))](
        partial_ZW, x_THP, D_H, offsets_B1, table.first_chunk_B2, out, stride, out.stride(0), width,
        P, columns, BLOCK, mirror, x_THP is not None, num_warps=4,
    )  # fmt: skip


def last_outputs(
    x_THP: Tensor, dt_HT: Tensor, c_HT: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, table: Table, launch: Launch, mirror: bool,
) -> Tensor:  # fmt: skip
    """y [B, E] of each sequence's last token in the order of the walk, 0 for an empty one.

    x, B and C are slices of one tensor.
    """
    (T, H, P), N, chunks = x_THP.shape, B_TN.shape[1], table.chunks_4Z.shape[1]
    carry_ZH = carry(c_HT, offsets_B1, table, launch)
    partial_ZE = dt_HT.new_empty(chunks, H * P)
    last_output_kernel[(chunks,)](
        x_THP, dt_HT, c_HT, carry_ZH, B_TN, C_TN, offsets_B1, table.chunks_4Z, partial_ZE,
        offsets_B1.numel() - 1, chunks, T, x_THP.stride(0), H, heads_at_once(H, P), N, P,
        launch.chunk, mirror, num_warps=4,
    )  # fmt: skip
    y_BE = x_THP.new_empty(offsets_B1.numel() - 1, H * P)
    sum_chunks(partial_ZE, offsets_B1, table, y_BE, mirror, x_THP, D_H)
    return y_BE


def last_gradients(
    dy_BE: Tensor, x_THP: Tensor, dt_HT: Tensor, c_HT: Tensor, B_TN: Tensor, C_TN: Tensor,
    D_H: Tensor, offsets_B1: Tensor, table: Table, launch: Launch, dx_THP: Tensor, dB_TN: Tensor,
    dC_TN: Tensor, dD_ZH: Tensor, mirror: bool,
) -> Sums:  # fmt: skip
    """Writes dx, dB and dC, slices of one tensor as x, B and C are, and a partial dD a chunk."""
    (T, H, P), N, chunks = x_THP.shape, B_TN.shape[1], table.chunks_4Z.shape[1]
    carry_ZH = carry(c_HT, offsets_B1, table, launch)
    o_HT, total_ZH = torch.empty_like(dt_HT), torch.empty_like(carry_ZH)
    dC_ZN = dt_HT.new_empty(chunks, N)
    last_gradient_kernel[(chunks,)](
        x_THP, dt_HT, c_HT, carry_ZH, B_TN, C_TN, D_H, dy_BE, offsets_B1, table.chunks_4Z, dx_THP,
        dB_TN, dC_TN, o_HT, total_ZH, dC_ZN, dD_ZH, offsets_B1.numel() - 1, chunks, T,
        x_THP.stride(0), dx_THP.stride(0), H, heads_at_once(H, P), N, P, launch.chunk, mirror,
        num_warps=8, maxnreg=128,
    )  # fmt: skip
    sum_chunks(dC_ZN, offsets_B1, table, dC_TN, mirror)
    return Sums(None, o_HT, carry(c_HT, offsets_B1, table, launch, total_ZH))
