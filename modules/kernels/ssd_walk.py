"""Carrying the state from chunk to chunk, in both directions.

Forward, the state of a head after chunk l is  `h_l = exp(Σ a) h_{l-1} + Σ_j B_j ⊗ w_j x_j`  with
`a_j = dt_j A`, `c_j = Σ_{k≤j} a_k` inside the chunk and `w_j = dt_j exp(c_last - c_j)`.
Backward, the gradient at the *start* of chunk l is `g_{l-1} = exp(Σ a) g_l + Σ_i C_i ⊗ w_i dy_i`
with `w_i = exp(c_i)`. The two are one recurrence, `state = decay · state + Kᵀ (w ∘ V)`, read from
opposite ends: one kernel serves both.

A program walks one *segment* for a tile of W columns of the flattened (head, channel) axis, with
its [N, W] state in registers, and writes the state wherever a chunk needs one: at chunk boundaries
inside sequences only. Short sequences therefore store little (none of at most CHUNK tokens stores
or even reads anything here). A sequence longer than a segment takes three launches, all of them on
grids that shapes give: (1) every segment from zero, keeping only the end (`LOCAL`); (2) the ends
combined in order; (3) every segment again from its true start. Sequences of one segment skip 1, 2.

The trade-off: storing chunk states costs `N / CHUNK` times the bytes of x, written once and read by
the outputs, those of the forward once more by the gradients. In return the kernels that make
outputs and gradients are free of order, and one of their programs sees all heads of its chunk, so
that C·Bᵀ is made once and dB, dC are summed in registers: no atomics, the same bits every time.
Where `ssd_scan` walks forward itself, this kernel gives it the segments' starts (`LOCAL`) alone.

Shape suffixes: Q tokens of a chunk, N state, W columns of a tile (G heads of P channels, or a part
of one head), H heads, B sequences. States are laid out [slot, H, N, P].
"""

import triton
import triton.language as tl

from modules.kernels.ssd_table import piece_row


@triton.jit
def spread_heads(value_G, W: tl.constexpr):
    """[G] -> [W]: each head's value over its channels."""
    G: tl.constexpr = value_G.shape[0]
    wide = tl.broadcast_to(value_G[:, None], [G, W // G])
    return tl.reshape(wide, [W])


@triton.jit
def spread_heads_rows(value_QG, W: tl.constexpr):
    """[Q, G] -> [Q, W]: each head's value over its channels."""
    Q: tl.constexpr = value_QG.shape[0]
    G: tl.constexpr = value_QG.shape[1]
    wide = tl.broadcast_to(value_QG[:, :, None], [Q, G, W // G])
    return tl.reshape(wide, [Q, W])


@triton.jit(do_not_specialize=["sequences", "segments", "tokens"])
def walk_kernel(
    key_ptr, value_ptr, dt_ptr, c_ptr, offsets_ptr, table_ptr, chunk_slot_ptr, state_ptr,
    boundary_ptr, boundary_decay_ptr, end_ptr, sequences, segments, tokens,
    key_stride: tl.constexpr, value_stride: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, SEGMENT_CHUNKS: tl.constexpr,
    REVERSE: tl.constexpr, LOCAL: tl.constexpr, HAS_END: tl.constexpr, PRECISION: tl.constexpr,
    MIRROR: tl.constexpr,
):  # fmt: skip
    """Walk one segment. `end` is the sequence's last state: written (forward) or read (reverse)."""
    G: tl.constexpr = W // P if W > P else 1
    STEP: tl.constexpr = -1 if MIRROR else 1
    TILES: tl.constexpr = (H * P + W - 1) // W  # of one segment side by side: the same rows
    tile, segment = tl.program_id(0) % TILES, tl.program_id(0) // TILES
    sequence, index, count, segment_slot = piece_row(table_ptr, segment, segments)
    if sequence < 0 or sequence >= sequences:
        return
    if LOCAL:  # the walk's last segment has no successor
        if REVERSE and index == 0:
            return
        if not REVERSE and index == count - 1:
            return
    begin = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    chunks = ((end - begin + CHUNK - 1) // CHUNK).to(tl.int32)
    slot = tl.load(chunk_slot_ptr + sequence).to(tl.int64)
    low = index * SEGMENT_CHUNKS
    high = tl.minimum(low + SEGMENT_CHUNKS, chunks)
    if REVERSE:  # nobody asks for the gradient before the first chunk,
        low = tl.maximum(low, 0 if LOCAL else 1)
    elif not HAS_END:  # nor for the state after the last
        high = tl.minimum(high, chunks - 1)

    n_N = tl.arange(0, N)
    w_W = tile * W + tl.arange(0, W)
    inside_W = w_W < H * P
    head_G = tile * W // P + tl.arange(0, G)
    head_row = (tile * W // P).to(tl.int64) * tokens
    head_row_G = head_G.to(tl.int64) * tokens
    q_Q = tl.arange(0, CHUNK)
    state_offset_NW = n_N[:, None] * P + (w_W // P * (N * P) + w_W % P)[None, :]
    end_offset_NW = n_N[:, None] + (w_W * N)[None, :]
    state_size = H * N * P

    state_NW = tl.zeros([N, W], tl.float32)
    log_decay_G = tl.zeros([G], tl.float32)
    if not LOCAL:
        if REVERSE:
            if index < count - 1:
                boundary = boundary_ptr + segment_slot.to(tl.int64) * state_size
                state_NW = tl.load(boundary + state_offset_NW, mask=inside_W[None, :], other=0.0)
            elif HAS_END:
                last = end_ptr + sequence.to(tl.int64) * state_size
                state_NW = tl.load(last + end_offset_NW, mask=inside_W[None, :], other=0.0)
        elif index > 0:
            boundary = boundary_ptr + (segment_slot - 1).to(tl.int64) * state_size
            state_NW = tl.load(boundary + state_offset_NW, mask=inside_W[None, :], other=0.0)

    for step in range(0, high - low):
        chunk = low + step
        if REVERSE:
            chunk = high - 1 - step
        start = begin + chunk * CHUNK
        here_Q = q_Q < end - start
        row = start
        if MIRROR:
            row = begin + end - 1 - start
        key_QN = tl.load(
            key_ptr + row * key_stride + q_Q[:, None] * (STEP * key_stride) + n_N[None, :],
            mask=here_Q[:, None], other=0.0,
        )  # fmt: skip
        value_QW = tl.load(
            value_ptr + row * value_stride + q_Q[:, None] * (STEP * value_stride) + w_W[None, :],
            mask=here_Q[:, None] & inside_W[None, :], other=0.0,
        )  # fmt: skip
        last_row = start + tl.minimum(end - start, CHUNK) - 1
        if G == 1:  # one head: plain vectors
            c_Q = tl.load(c_ptr + head_row + start + q_Q, mask=here_Q, other=0.0)
            last = tl.load(c_ptr + head_row + last_row)
            if REVERSE:
                weight_Q = tl.exp2(c_Q)
            else:
                dt_Q = tl.load(dt_ptr + head_row + start + q_Q, mask=here_Q, other=0.0)
                weight_Q = dt_Q * tl.exp2(last - c_Q)
            weight_QW = weight_Q[:, None]
            state_NW *= tl.exp2(last)
            log_decay_G += last
        else:
            offset_QG = head_row_G[None, :] + start + q_Q[:, None]
            mask_QG = here_Q[:, None] & (head_G < H)[None, :]
            c_QG = tl.load(c_ptr + offset_QG, mask=mask_QG, other=0.0)
            last_G = tl.load(c_ptr + head_row_G + last_row, mask=head_G < H, other=0.0)
            if REVERSE:
                weight_QG = tl.exp2(c_QG)
            else:
                dt_QG = tl.load(dt_ptr + offset_QG, mask=mask_QG, other=0.0)
                weight_QG = dt_QG * tl.exp2(last_G[None, :] - c_QG)
            weight_QW = spread_heads_rows(weight_QG, W)
            state_NW *= spread_heads(tl.exp2(last_G), W)[None, :]
            log_decay_G += last_G
        weighted_QW = (value_QW * weight_QW).to(value_QW.dtype)
        state_NW = tl.dot(tl.trans(key_QN), weighted_QW, state_NW, input_precision=PRECISION)
        if not LOCAL:
            stored = slot + chunk
            if REVERSE:
                stored = slot + chunk - 1
            if chunk < chunks - 1 or REVERSE:
                tl.store(
                    state_ptr + stored * state_size + state_offset_NW,
                    state_NW.to(state_ptr.dtype.element_ty), mask=inside_W[None, :],
                )  # fmt: skip

    if LOCAL:
        kept = segment_slot
        if REVERSE:
            kept = segment_slot - 1
        boundary = boundary_ptr + kept.to(tl.int64) * state_size
        tl.store(boundary + state_offset_NW, state_NW, mask=inside_W[None, :])
        tl.store(boundary_decay_ptr + kept * H + head_G, log_decay_G, mask=head_G < H)
    elif HAS_END and not REVERSE and index == count - 1:
        last = end_ptr + sequence.to(tl.int64) * state_size
        tl.store(last + end_offset_NW, state_NW, mask=inside_W[None, :])


@triton.jit(do_not_specialize=["sequences"])
def combine_segments_kernel(
    boundary_ptr, boundary_decay_ptr, segment_first_ptr, segment_slot_ptr, end_ptr, sequences,
    H: tl.constexpr, N: tl.constexpr, P: tl.constexpr, W: tl.constexpr, REVERSE: tl.constexpr,
    HAS_END: tl.constexpr,
):  # fmt: skip
    """Turn every segment's own end state into the true state at that boundary, in place."""
    G: tl.constexpr = W // P if W > P else 1
    sequence = tl.program_id(0)
    first = tl.load(segment_first_ptr + sequence)
    boundaries = tl.load(segment_first_ptr + sequence + 1) - first - 1
    if boundaries <= 0:
        return
    slot = tl.load(segment_slot_ptr + sequence)
    n_N = tl.arange(0, N)
    w_W = tl.program_id(1) * W + tl.arange(0, W)
    inside_W = w_W < H * P
    head_G = tl.program_id(1) * W // P + tl.arange(0, G)
    offset_NW = n_N[:, None] * P + (w_W // P * (N * P) + w_W % P)[None, :]
    state_size = H * N * P
    state_NW = tl.zeros([N, W], tl.float32)
    if REVERSE and HAS_END:
        last = end_ptr + sequence.to(tl.int64) * state_size
        offset_end_NW = n_N[:, None] + (w_W * N)[None, :]
        state_NW = tl.load(last + offset_end_NW, mask=inside_W[None, :], other=0.0)
    for step in range(0, boundaries):
        here = slot + step
        if REVERSE:
            here = slot + boundaries - 1 - step
        boundary = boundary_ptr + here.to(tl.int64) * state_size
        own_NW = tl.load(boundary + offset_NW, mask=inside_W[None, :], other=0.0)
        log_decay_G = tl.load(boundary_decay_ptr + here * H + head_G, mask=head_G < H, other=0.0)
        if G == 1:
            state_NW = state_NW * tl.exp2(tl.sum(log_decay_G)) + own_NW
        else:
            state_NW = state_NW * spread_heads(tl.exp2(log_decay_G), W)[None, :] + own_NW
        tl.store(boundary + offset_NW, state_NW, mask=inside_W[None, :])
