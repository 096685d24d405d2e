"""Where the chunks are: sequences of unknown lengths, cut on the device.

A packed batch holds sequences `[offsets_b, offsets_{b+1})`. The SSD kernels work on *chunks* of at
most `CHUNK` tokens and on *segments* of `CHUNK · k` tokens, both aligned to sequence starts, so no
chunk holds two sequences and nothing can leak. How many there are depends on the lengths, which
live on the device only. The host knows a bound: `Σ ⌈L_b / size⌉ ≤ T / size + B`, plus one run of
pieces over the padding behind the last sequence. Grids have that many programs, and each reads its
row of the table; rows past the real count say so and their programs leave at once.

A piece that is not the first of its sequence starts from a state that must be stored. There are
`Σ (⌈L_b / size⌉ - 1) ≤ T / size` of those, whatever B is: `slot` numbers them without holes.

The reversed direction (MIRROR) has the same table: a sequence's chunks then begin at its last
token, and their rows go down. What the kernels keep of one head, [H, T], always has the order of
the walk.

Shape suffixes: B sequences, Z pieces (chunks or segments).
"""

import triton
import triton.language as tl

LEAST_DT = tl.constexpr(1e-30)


@triton.jit
def piece_row(table_ptr, piece, pieces):
    """Row `piece` of a table: (sequence or -1, index in the sequence, pieces of it, its slot)."""
    sequence = tl.load(table_ptr + piece)
    index = tl.load(table_ptr + pieces + piece)
    count = tl.load(table_ptr + 2 * pieces + piece)
    slot = tl.load(table_ptr + 3 * pieces + piece)
    return sequence, index, count, slot


@triton.jit
def chunk_tokens(
    offsets_ptr, sequence, sequences, tokens, index, CHUNK: tl.constexpr, MIRROR: tl.constexpr
):  # fmt: skip
    """(start, end) of a chunk and its sequence in the order of the walk, and its first row."""
    begin = tl.load(offsets_ptr + sequence)
    end = tokens.to(tl.int64)
    if sequence < sequences:
        end = tl.load(offsets_ptr + sequence + 1)
    start = begin + index * CHUNK
    row = start
    if MIRROR:
        row = begin + end - 1 - start
    return start, end, row


@triton.jit(do_not_specialize=["sequences", "tokens"])
def count_pieces_kernel(
    offsets_ptr, first_ptr, slot_ptr, sequences, tokens, CHUNK: tl.constexpr,
    SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Exclusive prefix sums over sequences of the pieces and of the stored states.

    Program 0 counts chunks, program 1 segments. "Sequence" number `sequences` is the padding
    `[offsets[-1], tokens)`; entry `sequences + 1` is the total.
    """
    size = tl.where(tl.program_id(0) == 0, CHUNK, SEGMENT)
    row = tl.program_id(0) * (sequences + 2)
    pieces_before = 0
    slots_before = 0
    for base in range(0, sequences + 2, BLOCK):
        b = base + tl.arange(0, BLOCK)
        begin = tl.load(offsets_ptr + b, mask=b <= sequences, other=tokens)
        end = tl.load(offsets_ptr + b + 1, mask=b < sequences, other=tokens)
        pieces = ((end - begin + size - 1) // size).to(tl.int32)
        pieces = tl.where(b <= sequences, pieces, 0)
        slots = tl.maximum(pieces - 1, 0)
        inside = b < sequences + 2
        first = pieces_before + tl.cumsum(pieces) - pieces
        tl.store(first_ptr + row + b, first, mask=inside)
        tl.store(slot_ptr + row + b, slots_before + tl.cumsum(slots) - slots, mask=inside)
        pieces_before += tl.sum(pieces)
        slots_before += tl.sum(slots)


@triton.jit(do_not_specialize=["sequences", "steps", "chunks", "segments"])
def fill_table_kernel(
    first_ptr, slot_ptr, chunk_table_ptr, segment_table_ptr, sequences, steps, chunks, segments,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each piece finds its sequence by bisection of the prefix sums and writes its table row."""
    is_segment = tl.program_id(1) == 1
    pieces = tl.where(is_segment, segments, chunks)
    row = tl.program_id(1) * (sequences + 2)
    z = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)  # the largest b in [0, sequences] with first_b <= z
    high = tl.zeros([BLOCK], tl.int32) + sequences + 1
    for _ in range(steps):
        middle = (low + high) // 2
        right = tl.load(first_ptr + row + middle) <= z
        wide = high - low > 1
        low = tl.where(right & wide, middle, low)
        high = tl.where(right | (high - low <= 1), high, middle)
    first = tl.load(first_ptr + row + low)
    count = tl.load(first_ptr + row + low + 1) - first
    slot = tl.load(slot_ptr + row + low) + z - first
    total = tl.load(first_ptr + row + sequences + 1)
    sequence = tl.where(z < total, low, -1)
    mask = z < pieces
    table_ptr = segment_table_ptr if is_segment else chunk_table_ptr
    tl.store(table_ptr + z, sequence, mask=mask)
    tl.store(table_ptr + pieces + z, z - first, mask=mask)
    tl.store(table_ptr + 2 * pieces + z, count, mask=mask)
    tl.store(table_ptr + 3 * pieces + z, slot, mask=mask)


@triton.jit
def softplus(v):
    """log(1 + exp(v)) within some 1e-6 of itself, however small: dt starts at 1e-3."""
    u = tl.exp(-tl.abs(v))
    s = u / (2 + u)  # log(1 + u) = 2 atanh(s), s at most 1/3
    t = s * s
    tail = 1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13)))
    return tl.maximum(v, 0.0) + 2 * s * (1 + t * (1 / 3 + t * (1 / 5 + t * tail)))


@triton.jit(do_not_specialize=["sequences", "chunks", "tokens"])
def decay_kernel(
    dt_ptr, bias_ptr, A_ptr, offsets_ptr, table_ptr, dt_out_ptr, c_ptr, sequences, chunks, tokens,
    dt_stride: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, CHUNK: tl.constexpr,
    RAW: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """`c_i = log2(e) Σ_{k≤i} dt_k A` inside the chunk, for HEADS heads: exp2(c_i - c_j) decays.

    c and a copy of dt leave as [H, T]: the later kernels read the tokens of one head at a time.
    A dt of 0 leaves as LEAST_DT, which adds next to nothing to any sum but can be divided by.
    RAW: dt is softplus(what is read + bias) and A is -exp(what is read).
    """
    sequence, index, _, _ = piece_row(table_ptr, tl.program_id(0), chunks)
    if sequence < 0 or sequence == sequences:
        return
    start, end, row = chunk_tokens(
        offsets_ptr, sequence, sequences, tokens, index, CHUNK, MIRROR
    )  # fmt: skip
    STEP: tl.constexpr = -dt_stride if MIRROR else dt_stride
    q_Q = tl.arange(0, CHUNK)
    head_G = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    mask_QG = (q_Q < end - start)[:, None] & (head_G < H)[None, :]
    A_G = tl.load(A_ptr + head_G, mask=head_G < H, other=0.0)
    dt_ptrs = dt_ptr + row * dt_stride + q_Q[:, None] * STEP + head_G[None, :]
    dt_QG = tl.load(dt_ptrs, mask=mask_QG, other=0.0).to(tl.float32)
    if RAW:
        A_G = -tl.exp(A_G)
        bias_G = tl.load(bias_ptr + head_G, mask=head_G < H, other=0.0)
        dt_QG = softplus(dt_QG + bias_G[None, :])
    decay_QG = dt_QG * (A_G * 1.4426950408889634)[None, :]
    dt_QG = tl.where(dt_QG == 0.0, LEAST_DT, dt_QG)
    offset_QG = head_G.to(tl.int64)[None, :] * tokens + start + q_Q[:, None]
    tl.store(dt_out_ptr + offset_QG, dt_QG, mask=mask_QG)
    tl.store(c_ptr + offset_QG, tl.cumsum(decay_QG, 0), mask=mask_QG)
