"""States and outputs in one pass: what `ssd_walk` carries and `ssd_forward` makes.

A program walks one segment of one head with its state on the chip and makes each chunk's outputs on
the way, so x is read once; where a sequence has several segments, once more for their starts. The
heads of a segment run side by side, so that their rows of x, and B and C, which each of them reads,
meet in L2. S = C Bᵀ is made for each head anew. That pays where heads are wide: on an H100 one pass
takes 0.53 ms where two take 0.64 (P 64, N 64, 512 channels, 262,144 tokens, mean length 200), and
at P 16 1.24 ms where two take 0.68.

Shape suffixes: Q tokens of a chunk (i rows, j columns), N state, P channels of a head, H heads.
"""

import triton
import triton.language as tl

from modules.kernels.ssd_table import piece_row


@triton.jit(do_not_specialize=["sequences", "segments", "tokens"])
def scan_kernel(
    x_ptr, dt_ptr, c_ptr, B_ptr, C_ptr, D_ptr, offsets_ptr, table_ptr, chunk_slot_ptr, state_ptr,
    boundary_ptr, end_ptr, y_ptr, sequences, segments, tokens, x_stride: tl.constexpr,
    B_stride: tl.constexpr, C_stride: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, CHUNK: tl.constexpr, SEGMENT_CHUNKS: tl.constexpr, HAS_END: tl.constexpr,
    PRECISION: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """One program: one head and one segment. `end`, where wanted, is the sequence's last state."""
    STEP: tl.constexpr = -1 if MIRROR else 1
    head, segment = tl.program_id(0) % H, tl.program_id(0) // H
    sequence, index, count, segment_slot = piece_row(table_ptr, segment, segments)
    if sequence < 0:
        return
    begin = tl.load(offsets_ptr + sequence)
    end = tokens.to(tl.int64)
    if sequence < sequences:
        end = tl.load(offsets_ptr + sequence + 1)
    chunks = ((end - begin + CHUNK - 1) // CHUNK).to(tl.int32)
    low = index * SEGMENT_CHUNKS
    high = tl.minimum(low + SEGMENT_CHUNKS, chunks)
    q_Q = tl.arange(0, CHUNK)
    n_N = tl.arange(0, N)
    p_P = tl.arange(0, P)
    y_QP_offset = q_Q[:, None] * (STEP * H * P) + head * P + p_P[None, :]
    if sequence == sequences:  # the padding
        for chunk in range(low, high):
            start = begin + chunk * CHUNK
            row = start
            if MIRROR:
                row = begin + end - 1 - start
            zero_QP = tl.zeros([CHUNK, P], y_ptr.dtype.element_ty)
            mask_Q = q_Q < end - start
            tl.store(y_ptr + row * (H * P) + y_QP_offset, zero_QP, mask=mask_Q[:, None])
        return

    x_QP_offset = q_Q[:, None] * (STEP * x_stride) + head * P + p_P[None, :]
    B_QN_offset = q_Q[:, None] * (STEP * B_stride) + n_N[None, :]
    C_QN_offset = q_Q[:, None] * (STEP * C_stride) + n_N[None, :]
    state_NP_offset = head * (N * P) + n_N[:, None] * P + p_P[None, :]
    state_size = H * N * P
    head_row = head.to(tl.int64) * tokens
    slot = tl.load(chunk_slot_ptr + sequence).to(tl.int64)
    D = tl.load(D_ptr + head)
    state_NP = tl.zeros([N, P], tl.float32)
    if index > 0:
        boundary = boundary_ptr + (segment_slot - 1).to(tl.int64) * state_size
        state_NP = tl.load(boundary + state_NP_offset)
    for chunk in range(low, high):
        start = begin + chunk * CHUNK
        row = start
        if MIRROR:
            row = begin + end - 1 - start
        here_Q = q_Q < end - start
        x_QP = tl.load(x_ptr + row * x_stride + x_QP_offset, mask=here_Q[:, None], other=0.0)
        B_QN = tl.load(B_ptr + row * B_stride + B_QN_offset, mask=here_Q[:, None], other=0.0)
        C_QN = tl.load(C_ptr + row * C_stride + C_QN_offset, mask=here_Q[:, None], other=0.0)
        dt_Q = tl.load(dt_ptr + head_row + start + q_Q, mask=here_Q, other=0.0)
        c_Q = tl.load(c_ptr + head_row + start + q_Q, mask=here_Q, other=0.0)
        last = tl.load(c_ptr + head_row + start + tl.minimum(end - start, CHUNK) - 1)

        S_QQ = tl.dot(C_QN, tl.trans(B_QN), input_precision=PRECISION)
        S_QQ *= tl.exp2(tl.minimum(c_Q[:, None] - c_Q[None, :], 0.0)) * dt_Q[None, :]
        mixed_QQ = tl.where(q_Q[:, None] >= q_Q[None, :], S_QQ, 0.0).to(x_QP.dtype)
        y_QP = tl.dot(C_QN, state_NP.to(C_QN.dtype), input_precision=PRECISION)
        y_QP *= tl.exp2(c_Q)[:, None]
        y_QP = tl.dot(mixed_QQ, x_QP, y_QP, input_precision=PRECISION)
        y_QP += D * x_QP
        y_QP_ptr = y_ptr + row * (H * P) + y_QP_offset
        tl.store(y_QP_ptr, y_QP.to(y_ptr.dtype.element_ty), mask=here_Q[:, None])

        weighted_QP = (x_QP * (dt_Q * tl.exp2(last - c_Q))[:, None]).to(x_QP.dtype)
        state_NP *= tl.exp2(last)
        state_NP = tl.dot(tl.trans(B_QN), weighted_QP, state_NP, input_precision=PRECISION)
        if chunk < chunks - 1:
            state_NP_ptr = state_ptr + (slot + chunk) * state_size + state_NP_offset
            tl.store(state_NP_ptr, state_NP.to(state_ptr.dtype.element_ty))
    if HAS_END and index == count - 1:
        last_end = end_ptr + (sequence.to(tl.int64) * H + head) * (N * P)
        tl.store(last_end + p_P[None, :] * N + n_N[:, None], state_NP)
