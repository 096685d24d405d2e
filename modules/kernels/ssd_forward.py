"""The outputs of one chunk, all heads in one program.

With c the chunk's running sum of `a = dt A` (inclusive), S = C Bᵀ and h the state at its start,
  `y_i = Σ_{j≤i} S_ij exp(c_i - c_j) dt_j x_j  +  exp(c_i) C_i h  +  D x_i`.
S is shared by the heads and made once. The exponent is never positive, so nothing overflows; the
cheaper factored form exp(c_i) · exp(-c_j) would overflow for fast-decaying heads.

Shape suffixes: Q tokens of the chunk (i rows, j columns), N state, P channels of a head, H heads.
"""

import triton
import triton.language as tl

from modules.kernels.ssd_table import chunk_tokens, piece_row


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def output_kernel(
    x_ptr, dt_ptr, c_ptr, B_ptr, C_ptr, D_ptr, offsets_ptr, table_ptr, state_ptr, y_ptr,
    sequences, chunks, tokens, x_stride: tl.constexpr, B_stride: tl.constexpr,
    C_stride: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """One program: one chunk, heads `[program_id(1) · HEADS, … + HEADS)`."""
    sequence, index, _, slot = piece_row(table_ptr, tl.program_id(0), chunks)
    if sequence < 0:
        return
    start, end, first = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -1 if MIRROR else 1
    row = tokens.to(tl.int64)  # of one head in dt, c and what is summed up for ddt
    q_Q = tl.arange(0, CHUNK)
    n_N = tl.arange(0, N)
    p_P = tl.arange(0, P)
    here_Q = q_Q < end - start
    first_head = tl.program_id(1) * HEADS
    last_head = tl.minimum(first_head + HEADS, H)
    y_QP_offset = q_Q[:, None] * (STEP * H * P) + p_P[None, :]
    if sequence == sequences:
        for head in range(first_head, last_head):
            zero_QP = tl.zeros([CHUNK, P], y_ptr.dtype.element_ty)
            tl.store(
                y_ptr + first * (H * P) + head * P + y_QP_offset, zero_QP, mask=here_Q[:, None]
            )
        return

    B_QN_ptr = B_ptr + first * B_stride + q_Q[:, None] * (STEP * B_stride) + n_N[None, :]
    C_QN_ptr = C_ptr + first * C_stride + q_Q[:, None] * (STEP * C_stride) + n_N[None, :]
    B_QN = tl.load(B_QN_ptr, mask=here_Q[:, None], other=0.0)
    C_QN = tl.load(C_QN_ptr, mask=here_Q[:, None], other=0.0)
    S_QQ = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
    S_QQ = tl.where(q_Q[:, None] >= q_Q[None, :], S_QQ, 0.0)
    state_base = state_ptr + (slot - 1).to(tl.int64) * (H * N * P)
    x_QP_offset = q_Q[:, None] * (STEP * x_stride) + p_P[None, :]
    for head in range(first_head, last_head):
        x_QP = tl.load(
            x_ptr + first * x_stride + head * P + x_QP_offset, mask=here_Q[:, None], other=0.0
        )
        state_NP = tl.load(
            state_base + head * (N * P) + n_N[:, None] * P + p_P[None, :], mask=index > 0, other=0.0
        )
        token_row = head * row + start
        dt_Q = tl.load(dt_ptr + token_row + q_Q, mask=here_Q, other=0.0)
        c_Q = tl.load(c_ptr + token_row + q_Q, mask=here_Q, other=0.0)
        decay_QQ = tl.exp2(tl.minimum(c_Q[:, None] - c_Q[None, :], 0.0))
        mixed_QQ = (S_QQ * decay_QQ * dt_Q[None, :]).to(x_QP.dtype)
        y_QP = tl.dot(C_QN, state_NP, input_precision=PRECISION) * tl.exp2(c_Q)[:, None]
        y_QP = tl.dot(mixed_QQ, x_QP, y_QP, input_precision=PRECISION)
        y_QP += tl.load(D_ptr + head) * x_QP
        tl.store(
            y_ptr + first * (H * P) + head * P + y_QP_offset,
            y_QP.to(y_ptr.dtype.element_ty),
            mask=here_Q[:, None],
        )
