"""All gradients of one chunk, all heads in one program.

Given dy, the state h at the chunk's start and the gradient g of the state at its end, with
`c_i = Σ_{k≤i} dt_k A`, S = C Bᵀ, `L_ij = [i ≥ j] exp(c_i - c_j)`, `M_ij = dy_i · x_j`,
`w_j = exp(c_last - c_j)` and one head at a time:

  dx_j = dt_j (Σ_i S_ij L_ij dy_i + w_j B_j g) + D dy_j
  dB_j = Σ_heads (Σ_i M_ij L_ij dt_j C_i + w_j dt_j x_j gᵀ)      (the sum over i after the heads:
  dC_i = Σ_heads (Σ_j M_ij L_ij dt_j B_j + exp(c_i) dy_i hᵀ)      C and B are shared)

A decay a_k touches every pair j < k ≤ i, be j or i inside the chunk or not. With the pair's weight
`W_ij = S_ij L_ij M_ij dt_j`, `r_i = Σ_j W_ij + exp(c_i) C_i h dy_i` (what reaches i), `q_j =
Σ_i W_ij` and `o_j = dt_j w_j B_j g x_j` (what leaves j for later chunks),

  da_k = Σ_{i≥k} (r_i - q_i) + Σ_{j<k} o_j + exp(c_last) <h, g>

Row and column sums come from the same fp32 W, so what should cancel does; the last term restarts
the sum in every chunk, so no rounding error travels along a long sequence. (The usual shortcut
`C·dC - B·dB`, summed from the sequence's end, does both.) Then `ddt_k = (q_k + o_k) / dt_k +
A da_k` and `dA = Σ dt_k da_k`: a second, small kernel for all heads at once. dA and dD leave as one
partial sum a chunk. D stands on the diagonal of what dy is multiplied by, and is rounded with it.

Products are laid out [j, i] from the start: the tile that dx and dB multiply from the left is then
the one that dCᵀ multiplies from the right, and no result of a product goes transposed into another,
which Triton 3.6 miscompiles on Hopper (flash-linear-attention #640).

Shape suffixes: Q tokens of the chunk, N state, P channels of a head, H heads.
"""

import triton
import triton.language as tl

from modules.kernels.ssd_table import chunk_tokens, piece_row


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def gradient_kernel(
    x_ptr, dt_ptr, c_ptr, B_ptr, C_ptr, D_ptr, offsets_ptr, table_ptr, state_ptr, dstate_ptr,
    dend_ptr, dy_ptr, dx_ptr, q_ptr, o_ptr, r_ptr, s_ptr, through_ptr, dB_ptr, dC_ptr, dD_ptr,
    sequences, chunks, tokens, x_stride: tl.constexpr, B_stride: tl.constexpr,
    C_stride: tl.constexpr, dy_stride: tl.constexpr, dx_stride: tl.constexpr,
    dBC_stride: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, CHUNK: tl.constexpr, HAS_END: tl.constexpr, PRECISION: tl.constexpr,
    MIRROR: tl.constexpr,
):  # fmt: skip
    """One program: one chunk, heads `[program_id(1) · HEADS, … + HEADS)`, one dB, dC partial."""
    piece = tl.program_id(0)
    sequence, index, count, slot = piece_row(table_ptr, piece, chunks)
    first_head = tl.program_id(1) * HEADS
    last_head = tl.minimum(first_head + HEADS, H)
    if sequence < 0 or sequence == sequences:
        for head in range(first_head, last_head):
            tl.store(dD_ptr + piece * H + head, 0.0)
    if sequence < 0:
        return
    start, end, first = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -1 if MIRROR else 1
    row = tokens.to(tl.int64)  # of one head in dt, c and what is summed up for ddt
    t_Q = tl.arange(0, CHUNK)
    n_N = tl.arange(0, N)
    p_P = tl.arange(0, P)
    here_Q = t_Q < end - start
    first_row = (tl.program_id(1) * tokens + first) * dBC_stride
    token_row_QN = first_row + t_Q[:, None] * (STEP * dBC_stride) + n_N[None, :]
    dx_QP_offset = t_Q[:, None] * (STEP * dx_stride) + p_P[None, :]
    if sequence == sequences:
        for head in range(first_head, last_head):
            zero_QP = tl.zeros([CHUNK, P], dx_ptr.dtype.element_ty)
            dx_base = dx_ptr + first * dx_stride + head * P
            tl.store(dx_base + dx_QP_offset, zero_QP, mask=here_Q[:, None])
        zero_QN = tl.zeros([CHUNK, N], dB_ptr.dtype.element_ty)
        tl.store(dB_ptr + token_row_QN, zero_QN, mask=here_Q[:, None])
        tl.store(dC_ptr + token_row_QN, zero_QN, mask=here_Q[:, None])
        return

    B_QN_ptr = B_ptr + first * B_stride + t_Q[:, None] * (STEP * B_stride) + n_N[None, :]
    C_QN_ptr = C_ptr + first * C_stride + t_Q[:, None] * (STEP * C_stride) + n_N[None, :]
    B_QN = tl.load(B_QN_ptr, mask=here_Q[:, None], other=0.0)
    C_QN = tl.load(C_QN_ptr, mask=here_Q[:, None], other=0.0)
    S_JI = tl.dot(B_QN, tl.trans(C_QN), input_precision=PRECISION)
    S_JI = tl.where(t_Q[:, None] <= t_Q[None, :], S_JI, 0.0).to(B_QN.dtype)
    mixed_JI = tl.zeros([CHUNK, CHUNK], tl.float32)  # Σ_heads M L dt
    dB_QN = tl.zeros([CHUNK, N], tl.float32)

    length = tl.minimum(end - start, CHUNK)
    x_QP_offset = t_Q[:, None] * (STEP * x_stride) + p_P[None, :]
    dy_QP_offset = t_Q[:, None] * (STEP * dy_stride) + p_P[None, :]
    state_NP_offset = n_N[:, None] * P + p_P[None, :]
    state_base = state_ptr + (slot - 1).to(tl.int64) * (H * N * P)
    dstate_base = dstate_ptr + slot.to(tl.int64) * (H * N * P)
    for head in tl.range(first_head, last_head, disable_licm=True):
        token_row = head * row + start
        x_base = x_ptr + first * x_stride + head * P
        x_QP = tl.load(
            x_base + x_QP_offset, mask=here_Q[:, None], other=0.0, eviction_policy="evict_first"
        )
        dy_base = dy_ptr + first * dy_stride + head * P
        dy_QP = tl.load(
            dy_base + dy_QP_offset, mask=here_Q[:, None], other=0.0, eviction_policy="evict_last"
        )
        g_base = dstate_base + head * (N * P)
        g_NP = tl.load(
            g_base + state_NP_offset, mask=index < count - 1, other=0.0,
            eviction_policy="evict_last",
        )  # fmt: skip
        if HAS_END:
            dend_base = dend_ptr + (sequence.to(tl.int64) * H + head) * (N * P)
            dend_ptrs = dend_base + (p_P[None, :] * N + n_N[:, None])
            g_NP += tl.load(dend_ptrs, mask=index == count - 1, other=0.0).to(g_NP.dtype)
        dt_Q = tl.load(dt_ptr + token_row + t_Q, mask=here_Q, other=0.0)
        c_Q = tl.load(c_ptr + token_row + t_Q, mask=here_Q, other=0.0)
        last = tl.load(c_ptr + token_row + length - 1)

        M_JI = tl.dot(x_QP, tl.trans(dy_QP), input_precision=PRECISION)
        diagonal_JI = tl.where(t_Q[:, None] == t_Q[None, :], M_JI, 0.0)
        tl.store(dD_ptr + piece * H + head, tl.sum(diagonal_JI))
        L_JI = tl.exp2(tl.minimum(c_Q[None, :] - c_Q[:, None], 0.0)) * dt_Q[:, None]
        SL_JI = S_JI * L_JI
        W_JI = SL_JI * M_JI
        tl.store(q_ptr + token_row + t_Q, tl.sum(W_JI, 1), mask=here_Q)
        tl.store(r_ptr + token_row + t_Q, tl.sum(W_JI, 0), mask=here_Q)
        mixed_JI += M_JI * L_JI

        weight_Q = tl.exp2(last - c_Q) * dt_Q
        dx_QP = tl.dot(B_QN, g_NP, input_precision=PRECISION) * weight_Q[:, None]
        tl.store(o_ptr + token_row + t_Q, tl.sum(dx_QP * x_QP, 1), mask=here_Q)
        SL_JI += tl.where(t_Q[:, None] == t_Q[None, :], tl.load(D_ptr + head), 0.0)
        dx_QP = tl.dot(SL_JI.to(dy_QP.dtype), dy_QP, dx_QP, input_precision=PRECISION)
        dx_base = dx_ptr + first * dx_stride + head * P
        tl.store(dx_base + dx_QP_offset, dx_QP.to(dx_ptr.dtype.element_ty), mask=here_Q[:, None])
        if PRECISION == "ieee" or P <= 16:  # bf16: x goes from shared memory into the product
            xg_QN = tl.dot(x_QP, tl.trans(g_NP), input_precision=PRECISION)
            dB_QN += xg_QN * weight_Q[:, None]
        else:  # from registers, where one tile less is worth more
            weighted_QP = x_QP * weight_Q[:, None]
            dB_QN = tl.dot(weighted_QP, tl.trans(g_NP), dB_QN, input_precision=PRECISION)

    mixed_JI = tl.where(t_Q[:, None] <= t_Q[None, :], mixed_JI, 0.0).to(B_QN.dtype)
    dB_QN = tl.dot(mixed_JI, C_QN, dB_QN, input_precision=PRECISION)
    tl.store(dB_ptr + token_row_QN, dB_QN.to(dB_ptr.dtype.element_ty), mask=here_Q[:, None])
    dC_QN = tl.trans(tl.dot(tl.trans(B_QN), mixed_JI, input_precision=PRECISION))

    if index > 0:  # the state that came in; from the last head, whose dy and g are still in L2
        for step in tl.range(first_head, last_head, disable_licm=True):
            head = first_head + last_head - 1 - step
            dy_base = dy_ptr + first * dy_stride + head * P
            dy_QP = tl.load(
                dy_base + dy_QP_offset, mask=here_Q[:, None], other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            h_base = state_base + head * (N * P)
            h_NP = tl.load(h_base + state_NP_offset, eviction_policy="evict_first")
            g_base = dstate_base + head * (N * P)
            g_NP = tl.load(
                g_base + state_NP_offset, mask=index < count - 1, other=0.0,
                eviction_policy="evict_first",
            )  # fmt: skip
            if HAS_END:
                dend_base = dend_ptr + (sequence.to(tl.int64) * H + head) * (N * P)
                dend_ptrs = dend_base + (p_P[None, :] * N + n_N[:, None])
                g_NP += tl.load(dend_ptrs, mask=index == count - 1, other=0.0).to(g_NP.dtype)
            token_row = head * row + start
            c_Q = tl.load(c_ptr + token_row + t_Q, mask=here_Q, other=0.0)
            last = tl.load(c_ptr + token_row + length - 1)
            through = tl.exp2(last) * tl.sum(h_NP.to(tl.float32) * g_NP.to(tl.float32))
            tl.store(through_ptr + piece * H + head, through)
            dC_head_QN = tl.dot(dy_QP, tl.trans(h_NP), input_precision=PRECISION)
            dC_head_QN *= tl.exp2(c_Q)[:, None]
            dC_QN += dC_head_QN
            tl.store(s_ptr + token_row + t_Q, tl.sum(dC_head_QN * C_QN, 1), mask=here_Q)
    tl.store(dC_ptr + token_row_QN, dC_QN.to(dC_ptr.dtype.element_ty), mask=here_Q[:, None])


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def decay_gradient_kernel(
    dt_ptr, A_ptr, q_ptr, o_ptr, r_ptr, s_ptr, through_ptr, offsets_ptr, table_ptr, ddt_ptr, dA_ptr,
    raw_ptr, bias_ptr, dbias_ptr, sequences, chunks, tokens, ddt_stride: tl.constexpr,
    raw_stride: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    RAW: tl.constexpr, LAST: tl.constexpr, MIRROR: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """ddt and a partial dA of one chunk from q, o, r and <h, g> (see the top of the file).

    RAW (see `decay_kernel`): the gradients of what was read there, and a partial dbias.
    LAST: there are no q and r (see `ssd_last`). ADD: the gradients are added to what is there.
    """
    piece = tl.program_id(0)
    sequence, index, _, _ = piece_row(table_ptr, piece, chunks)
    t_Q = tl.arange(0, CHUNK)
    head_G = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside_G = head_G < H
    if sequence < 0 or sequence == sequences:
        zero_G = tl.zeros([HEADS], tl.float32)
        tl.store(dA_ptr + piece * H + head_G, zero_G, mask=inside_G)
        if RAW:
            tl.store(dbias_ptr + piece * H + head_G, zero_G, mask=inside_G)
    if sequence < 0:
        return
    start, end, first = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -1 if MIRROR else 1
    ddt_ptrs = ddt_ptr + first * ddt_stride + t_Q[:, None] * (STEP * ddt_stride) + head_G[None, :]
    offset_QG = head_G.to(tl.int64)[None, :] * tokens + start + t_Q[:, None]
    mask_QG = (t_Q < end - start)[:, None] & inside_G[None, :]
    if sequence == sequences:
        if not ADD:
            tl.store(ddt_ptrs, tl.zeros([CHUNK, HEADS], ddt_ptr.dtype.element_ty), mask=mask_QG)
        return
    dt_QG = tl.load(dt_ptr + offset_QG, mask=mask_QG, other=0.0)
    o_QG = tl.load(o_ptr + offset_QG, mask=mask_QG, other=0.0)
    entered = index > 0
    if not LAST:
        q_QG = tl.load(q_ptr + offset_QG, mask=mask_QG, other=0.0)
        r_QG = tl.load(r_ptr + offset_QG, mask=mask_QG, other=0.0)
        r_QG += tl.load(s_ptr + offset_QG, mask=mask_QG & entered, other=0.0)
    through_ptrs = through_ptr + piece * H + head_G
    through_G = tl.load(through_ptrs, mask=inside_G & entered, other=0.0)
    A_G = tl.load(A_ptr + head_G, mask=inside_G, other=0.0)
    if RAW:
        A_G = -tl.exp(A_G)
    da_QG = tl.cumsum(o_QG, 0) - o_QG
    if not LAST:
        da_QG = tl.cumsum(r_QG - q_QG, 0, reverse=True) + da_QG
        o_QG += q_QG  # all that leaves a token
    da_QG += through_G[None, :]
    dA_G = tl.sum(dt_QG * da_QG, 0)
    ddt_QG = o_QG / tl.where(mask_QG, dt_QG, 1.0) + A_G[None, :] * da_QG
    if RAW:
        row_QG = t_Q[:, None] * (STEP * raw_stride) + head_G[None, :]
        raw_ptrs = raw_ptr + first * raw_stride + row_QG
        raw_QG = tl.load(raw_ptrs, mask=mask_QG, other=0.0).to(tl.float32)
        bias_G = tl.load(bias_ptr + head_G, mask=inside_G, other=0.0)
        ddt_QG = tl.where(mask_QG, ddt_QG * tl.sigmoid(raw_QG + bias_G[None, :]), 0.0)
        tl.store(dbias_ptr + piece * H + head_G, tl.sum(ddt_QG, 0), mask=inside_G)
        dA_G *= A_G
    if ADD:
        ddt_QG += tl.load(ddt_ptrs, mask=mask_QG, other=0.0).to(tl.float32)
    tl.store(ddt_ptrs, ddt_QG.to(ddt_ptr.dtype.element_ty), mask=mask_QG)
    tl.store(dA_ptr + piece * H + head_G, dA_G, mask=inside_G)
