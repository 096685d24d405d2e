"""`ssd_triton`: the state space duality of packed histories on our own Triton kernels.

For a head with decay A < 0 and tokens i, j of one sequence,
  `y_i = Σ_{j≤i} (C_i·B_j) exp(Σ_{k=j+1..i} dt_k A) dt_j x_j + D x_i`   (Dao & Gu 2024, section 6).

Forward: cut the batch into chunks (`ssd_table`), carry the state from chunk to chunk (`ssd_walk`),
make each chunk's outputs (`ssd_forward`), or both in one pass (`ssd_scan`). Backward: the same
table again, the states that the forward kept (N / chunk times the bytes of x; to make them anew is
a third of the carrying), the gradient of the state carried from the end (`ssd_walk` reversed), each
chunk's gradients (`ssd_backward`). Lengths are read on the device only: nothing here waits for the
GPU, every grid and every scratch size follows from shapes and the whole can be captured in a CUDA
graph. Sums have a fixed order: same inputs, same bits.

Launch options come from a small table, not from a search, so a fresh process compiles each kernel
once.

With `mirror` the functions below the table work on the reversed sequences: in x, B, C, dt, y and
their gradients a token keeps its row, the sums run from a sequence's last token to its first.

Shape suffixes: T tokens, H heads, P channels of a head, N state, B sequences, B1 = B + 1 offsets,
Z chunks or segments.
"""

from dataclasses import dataclass
from typing import Literal, overload

import torch
import triton
from torch import Tensor

from modules.kernels.ssd_backward import decay_gradient_kernel, gradient_kernel
from modules.kernels.ssd_forward import output_kernel
from modules.kernels.ssd_scan import scan_kernel
from modules.kernels.ssd_table import count_pieces_kernel, decay_kernel, fill_table_kernel
from modules.kernels.ssd_walk import combine_segments_kernel, walk_kernel
from modules.products import triton_precision

SIZES = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """How the kernels run for one (head dim, state size, dtype)."""

    chunk: int  # tokens
    segment_chunks: int  # a longer sequence is walked by several programs
    tile: int  # columns of the (head, channel) axis that a walking program carries
    walk_warps: int
    walk_stages: int
    output_warps: int  # of what makes the outputs, in one pass too
    output_stages: int
    gradient_warps: int
    gradient_stages: int
    one_pass: bool = False  # forward: see `ssd_scan`
    precision: str = "ieee"  # of fp32 products: tf32x3 | tf32; ieee where numbers are bf16


def choose_launch(P: int, N: int, dtype: torch.dtype) -> Launch:
    """The launch options for a head dim, a state size and a dtype, measured on an H100.

    Narrow heads make outputs on two warps, that is with plain instead of warp-group products. For
    16 channels that is also faster; above all it keeps clear of a miscompilation by the ptxas 12.8
    of Triton 3.6, which left descriptors of such products undefined (an illegal shared address at
    P 16 with three or more heads). `tests/gpu/lint_sass.py` finds it without a GPU. The gradients
    of P 32 at N 128 have two stages for the same reason: with three or one, a single head reads an
    illegal address.
    """
    if dtype == torch.float32:
        return _fp32_launch(P, N)
    one_pass = P == 64 and N == 64  # timed, and the walk's options for the backward
    return Launch(
        chunk=64,
        segment_chunks=16,
        tile=128 if N <= 64 and not one_pass else 64,
        walk_warps=4,
        walk_stages=3,
        output_warps=2 if P <= 32 or N <= 16 else 4,
        output_stages=2 if one_pass else 3,
        gradient_warps=4,
        gradient_stages=1 if P > 32 else 2 if N == 128 else 3,
        one_pass=one_pass,
    )


def _fp32_launch(P: int, N: int) -> Launch:
    """Tiles are twice as large as in bf16: shorter chunks keep them on the chip.

    What does not fit into registers is spilled, at up to 30 times the time. Three products for one
    need more of them, so more warps or a chunk of 16. The chunk, and with it the shape of the
    states, is the same for both kinds of product.
    """
    narrow = P <= 64 and N <= 64
    exact = triton_precision() == "tf32x3"
    if exact:
        gradient_warps = 8 if not narrow else 4 if P > 16 else 2
    else:
        gradient_warps = 8 if P == 128 else 4 if P == 64 or N == 128 else 2
    chunk = 16 if P == 128 and N <= 32 else 32
    return Launch(
        chunk=chunk,
        segment_chunks=1024 // chunk,
        tile=64,
        walk_warps=4 if exact else 2,
        walk_stages=1 if exact and N <= 64 else 2,
        output_warps=2 if P <= 64 and (narrow or not exact) else 4,
        output_stages=3 if P <= 32 and (narrow or not exact) else 2,
        gradient_warps=gradient_warps,
        gradient_stages=2 if exact and narrow and P <= 32 else 1,
        precision=triton_precision(),
    )


@dataclass(frozen=True)
class Table:
    """Chunks and segments of a packed batch (see `ssd_table`), all on the device."""

    first_B2: Tensor  # of the segments
    first_chunk_B2: Tensor
    segment_slot_B2: Tensor
    chunk_slot_B2: Tensor
    chunks_4Z: Tensor
    segments_4Z: Tensor
    chunk_slots: int
    segment_slots: int


def make_table(offsets_B1: Tensor, tokens: int, launch: Launch) -> Table:
    """Cut `tokens` packed tokens at `offsets_B1`. Two tiny launches, no synchronisation."""
    sequences = offsets_B1.numel() - 1
    segment = launch.chunk * launch.segment_chunks
    chunks = triton.cdiv(tokens, launch.chunk) + sequences + 1
    segments = triton.cdiv(tokens, segment) + sequences + 1
    empty = offsets_B1.new_empty
    first_2B2 = empty(2, sequences + 2, dtype=torch.int32)
    slot_2B2 = torch.empty_like(first_2B2)
    chunks_4Z = empty(4, chunks, dtype=torch.int32)
    segments_4Z = empty(4, segments, dtype=torch.int32)
    count_pieces_kernel[(2,)](
        offsets_B1, first_2B2, slot_2B2, sequences, tokens, launch.chunk, segment, BLOCK=1024
    )
    fill_table_kernel[(triton.cdiv(chunks, 256), 2)](
        first_2B2, slot_2B2, chunks_4Z, segments_4Z, sequences, (sequences + 1).bit_length(),
        chunks, segments, BLOCK=256,
    )  # fmt: skip
    return Table(
        first_2B2[1], first_2B2[0], slot_2B2[1], slot_2B2[0], chunks_4Z, segments_4Z,
        chunk_slots(tokens, launch), max(tokens // segment, 1),
    )  # fmt: skip


def chunk_slots(tokens: int, launch: Launch) -> int:
    """States that a batch of so many tokens may have to keep."""
    return tokens // launch.chunk


@dataclass(frozen=True)
class Walk:
    """The chunk states of one direction, to be carried. key, value: B and x, or C and dy.

    `end_BHPN`, the states of the sequences' ends, is written (forward) or read.
    """

    key_TN: Tensor
    value_THP: Tensor
    dt_HT: Tensor
    c_HT: Tensor
    offsets_B1: Tensor
    table: Table
    launch: Launch
    reverse: bool
    end_BHPN: Tensor | None
    mirror: bool

    def states(self) -> Tensor:
        """States at chunk boundaries: `[slot, H, N, P]`."""
        state_SHNP = self.empty_states()
        self._run(state_SHNP, *self.boundaries(), local=False)
        return state_SHNP

    def empty_states(self) -> Tensor:
        (_, H, P), N = self.value_THP.shape, self.key_TN.shape[1]
        return self.value_THP.new_empty(self.table.chunk_slots, H, N, P)

    def boundaries(self) -> tuple[Tensor, Tensor]:
        """States where a sequence's segments meet, and decays from one to the next, fp32.

        Unwritten where no sequence can be longer than a segment.
        """
        (T, H, P), N = self.value_THP.shape, self.key_TN.shape[1]
        launch, table = self.launch, self.table
        state_SHNP = self.value_THP.new_empty(table.segment_slots, H, N, P, dtype=torch.float32)
        decay_SH = state_SHNP.new_empty(table.segment_slots, H)
        if launch.chunk * launch.segment_chunks < T:
            sequences = self.offsets_B1.numel() - 1
            self._run(None, state_SHNP, decay_SH, local=True)
            combine_segments_kernel[(sequences, triton.cdiv(H * P, launch.tile))](
                state_SHNP, decay_SH, table.first_B2, table.segment_slot_B2, self.end_BHPN,
                sequences, H, N, P, launch.tile, self.reverse, self.end_BHPN is not None,
                num_warps=4,
            )  # fmt: skip
        return state_SHNP, decay_SH

    def _run(
        self, state_SHNP: Tensor | None, boundary_SHNP: Tensor, decay_SH: Tensor, local: bool
    ) -> None:
        (T, H, P), N = self.value_THP.shape, self.key_TN.shape[1]
        launch, table, segments = self.launch, self.table, self.table.segments_4Z.shape[1]
        walk_kernel[(triton.cdiv(H * P, launch.tile) * segments,)](
            self.key_TN, self.value_THP, self.dt_HT, self.c_HT, self.offsets_B1,
            table.segments_4Z, table.chunk_slot_B2, state_SHNP, boundary_SHNP, decay_SH,
            self.end_BHPN, self.offsets_B1.numel() - 1, segments, T, self.key_TN.stride(0),
            self.value_THP.stride(0), H, N, P, launch.tile, launch.chunk, launch.segment_chunks,
            self.reverse, local, self.end_BHPN is not None and not local, launch.precision,
            self.mirror, num_warps=launch.walk_warps, num_stages=launch.walk_stages,
        )  # fmt: skip


def decays(
    dt_TH: Tensor, A_H: Tensor, offsets_B1: Tensor, table: Table, launch: Launch,
    bias_H: Tensor | None = None, mirror: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dt and the running log2 decay inside each chunk, one row of tokens per head.

    With a bias dt is softplus(dt_TH + bias) and A is -exp(A_H).
    """
    T, H = dt_TH.shape
    chunks = table.chunks_4Z.shape[1]
    dt_HT, c_HT = dt_TH.new_empty(2, H, T, dtype=torch.float32)
    heads = min(triton.next_power_of_2(H), 16)
    decay_kernel[(chunks, triton.cdiv(H, heads))](
        dt_TH, bias_H, A_H, offsets_B1, table.chunks_4Z, dt_HT, c_HT, offsets_B1.numel() - 1,
        chunks, T, dt_TH.stride(0), H, heads, launch.chunk, bias_H is not None, mirror, num_warps=4,
    )  # fmt: skip
    return dt_HT, c_HT


def head_groups(chunks: int, H: int, limit: int) -> int:
    """Into how many programs a chunk's heads are split, so that few chunks still fill the card."""
    return min(max(1, triton.cdiv(512, chunks)), H, limit)


def rows(x: Tensor) -> Tensor:
    """x with contiguous trailing dimensions; the stride between tokens stays as it is."""
    inner = x[0] if x.shape[0] else x
    return x if inner.is_contiguous() else x.contiguous()


def scan(
    x_THP: Tensor, dt_HT: Tensor, c_HT: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, table: Table, launch: Launch, end_BHPN: Tensor | None = None,
    mirror: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_THP, contiguous, and the chunks' states, for `scan_gradients`; writes `end_BHPN`."""
    T, H, P = x_THP.shape
    N, sequences, chunks = B_TN.shape[1], offsets_B1.numel() - 1, table.chunks_4Z.shape[1]
    y_THP = torch.empty(T, H, P, dtype=x_THP.dtype, device=x_THP.device)
    walk = Walk(B_TN, x_THP, dt_HT, c_HT, offsets_B1, table, launch, False, end_BHPN, mirror)
    if launch.one_pass:
        state_SHNP, segments = walk.empty_states(), table.segments_4Z.shape[1]
        boundary_SHNP, _ = walk.boundaries()
        scan_kernel[(H * segments,)](
            x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table.segments_4Z,
            table.chunk_slot_B2, state_SHNP, boundary_SHNP, end_BHPN, y_THP, sequences, segments,
            T, x_THP.stride(0), B_TN.stride(0), C_TN.stride(0), H, N, P, launch.chunk,
            launch.segment_chunks, end_BHPN is not None, launch.precision, mirror,
            num_warps=launch.output_warps, num_stages=launch.output_stages,
        )  # fmt: skip
        return y_THP, state_SHNP
    state_SHNP, groups = walk.states(), head_groups(chunks, H, limit=H)
    output_kernel[(chunks, groups)](
        x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table.chunks_4Z, state_SHNP, y_THP,
        sequences, chunks, T, x_THP.stride(0), B_TN.stride(0), C_TN.stride(0), H,
        triton.cdiv(H, groups), N, P, launch.chunk, launch.precision, mirror,
        num_warps=launch.output_warps, num_stages=launch.output_stages,
    )  # fmt: skip
    return y_THP, state_SHNP


@dataclass(frozen=True)
class Sums:
    """What the gradient of dt is made of: q, o, r in two parts, <h, g> (see `ssd_backward`).

    For the last outputs alone o and the sums of what leaves the chunks before (see `ssd_last`).
    """

    qors_4HT: Tensor | None
    o_HT: Tensor
    through_ZH: Tensor


def scan_gradients(
    dy_THP: Tensor, state_SHNP: Tensor, x_THP: Tensor, dt_HT: Tensor, c_HT: Tensor, B_TN: Tensor,
    C_TN: Tensor, D_H: Tensor, offsets_B1: Tensor, table: Table, launch: Launch, dx_THP: Tensor,
    dB_TN: Tensor, dC_TN: Tensor, dD_ZH: Tensor, dend_BHPN: Tensor | None = None,
    mirror: bool = False,
) -> Sums:  # fmt: skip
    """Writes dx, dB and dC, which may be slices of one tensor, and a partial dD a chunk.

    state_SHNP: what `scan` kept.
    """
    T, H, P = x_THP.shape
    N, sequences, chunks = B_TN.shape[1], offsets_B1.numel() - 1, table.chunks_4Z.shape[1]
    groups = head_groups(chunks, H, limit=4)
    dB_GTN, dC_GTN = dB_TN, dC_TN
    if groups > 1:
        dBC_GTK = B_TN.new_empty(groups, T, 2 * N, dtype=torch.float32)
        dB_GTN, dC_GTN = dBC_GTK.split(N, dim=2)
    qors_4HT = dt_HT.new_empty(4, H, T)
    sums = Sums(qors_4HT, qors_4HT[1], dt_HT.new_empty(chunks, H))
    dstate_SHNP = Walk(
        C_TN, dy_THP, dt_HT, c_HT, offsets_B1, table, launch, True, dend_BHPN, mirror
    ).states()
    gradient_kernel[(chunks, groups)](
        x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table.chunks_4Z, state_SHNP, dstate_SHNP,
        dend_BHPN, dy_THP, dx_THP, *qors_4HT, sums.through_ZH, dB_GTN, dC_GTN, dD_ZH,
        sequences, chunks, T, x_THP.stride(0), B_TN.stride(0), C_TN.stride(0), dy_THP.stride(0),
        dx_THP.stride(0), dB_GTN.stride(-2), H, triton.cdiv(H, groups), N, P, launch.chunk,
        dend_BHPN is not None, launch.precision, mirror, num_warps=launch.gradient_warps,
        num_stages=launch.gradient_stages,
    )  # fmt: skip
    if groups > 1:
        dB_sum_TN, dC_sum_TN = dBC_GTK.sum(0).split(N, dim=1)
        dB_TN.copy_(dB_sum_TN)
        dC_TN.copy_(dC_sum_TN)
    return sums


def decay_gradients(
    sums: Sums, dt_HT: Tensor, A_H: Tensor, offsets_B1: Tensor, table: Table, launch: Launch,
    ddt_TH: Tensor, dA_ZH: Tensor, raw_TH: Tensor | None = None, bias_H: Tensor | None = None,
    dbias_ZH: Tensor | None = None, mirror: bool = False, add: bool = False,
) -> None:  # fmt: skip
    """Writes ddt, or adds to it, and writes a partial dA a chunk.

    Where dt came from `raw_TH` and a bias, the gradients are of that, of A's logarithm and of the
    bias.
    """
    H, T = dt_HT.shape
    chunks, heads = table.chunks_4Z.shape[1], min(triton.next_power_of_2(H), 16)
    qors = (None, sums.o_HT, None, None) if sums.qors_4HT is None else sums.qors_4HT
    decay_gradient_kernel[(chunks, triton.cdiv(H, heads))](
        dt_HT, A_H, *qors, sums.through_ZH, offsets_B1, table.chunks_4Z, ddt_TH, dA_ZH, raw_TH,
        bias_H, dbias_ZH, offsets_B1.numel() - 1, chunks, T, ddt_TH.stride(0),
        0 if raw_TH is None else raw_TH.stride(0), H, heads, launch.chunk, raw_TH is not None,
        sums.qors_4HT is None, mirror, add, num_warps=4,
    )  # fmt: skip


@torch.library.custom_op("ssd4rec::ssd", mutates_args=())
def ssd_op(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, final_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y_THP, the states after each sequence's last token (an empty tensor if not wanted), and for
    the backward those of the chunks."""
    T, H, P = x_THP.shape
    N, sequences = B_TN.shape[1], offsets_B1.numel() - 1
    x_THP, B_TN, C_TN = rows(x_THP), rows(B_TN), rows(C_TN)
    dt_TH = dt_TH.contiguous()
    end_BHPN = x_THP.new_zeros(sequences, H, P, N, dtype=torch.float32) if final_states else None
    launch = choose_launch(P, N, x_THP.dtype)
    if T == 0:
        y_THP = x_THP.new_empty(T, H, P)
        state_SHNP = x_THP.new_empty(chunk_slots(T, launch), H, N, P)
    else:
        table = make_table(offsets_B1, T, launch)
        dt_HT, c_HT = decays(dt_TH, A_H, offsets_B1, table, launch)
        y_THP, state_SHNP = scan(
            x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table, launch, end_BHPN
        )
    if end_BHPN is None:
        end_BHPN = x_THP.new_empty(0, dtype=torch.float32)
    return y_THP, end_BHPN, state_SHNP


@ssd_op.register_fake
def _(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, final_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (T, H, P), N = x_THP.shape, B_TN.shape[1]
    y_THP = torch.empty(T, H, P, dtype=x_THP.dtype, device=x_THP.device)
    shape = (offsets_B1.shape[0] - 1, H, P, N) if final_states else (0,)
    slots = chunk_slots(T, choose_launch(P, N, x_THP.dtype))
    end_BHPN = x_THP.new_empty(shape, dtype=torch.float32)
    return y_THP, end_BHPN, x_THP.new_empty(slots, H, N, P)


@torch.library.custom_op("ssd4rec::ssd_backward", mutates_args=())
def ssd_backward_op(
    dy_THP: Tensor, dend_BHPN: Tensor | None, state_SHNP: Tensor, x_THP: Tensor, dt_TH: Tensor,
    A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor, offsets_B1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, dt, A, B, C, D, contiguous."""
    (T, H, P), N = x_THP.shape, B_TN.shape[1]
    x_THP, B_TN, C_TN, dy_THP = rows(x_THP), rows(B_TN), rows(C_TN), rows(dy_THP)
    dt_TH = dt_TH.contiguous()
    if dend_BHPN is not None:
        dend_BHPN = dend_BHPN.contiguous()
    launch = choose_launch(P, N, x_THP.dtype)
    dx_THP = torch.empty(T, H, P, dtype=x_THP.dtype, device=x_THP.device)
    ddt_TH = torch.empty_like(dt_TH)
    if T == 0:
        empty_TN = B_TN.new_empty(T, N)
        return dx_THP, ddt_TH, torch.zeros_like(A_H), empty_TN, empty_TN.clone(), D_H.new_zeros(H)
    table = make_table(offsets_B1, T, launch)
    dt_HT, c_HT = decays(dt_TH, A_H, offsets_B1, table, launch)
    dB_TN, dC_TN = B_TN.new_empty(T, N), C_TN.new_empty(T, N)
    dA_dD_2ZH = dt_TH.new_empty(2, table.chunks_4Z.shape[1], H)
    sums = scan_gradients(
        dy_THP, state_SHNP, x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table, launch, dx_THP,
        dB_TN, dC_TN, dA_dD_2ZH[1], dend_BHPN,
    )  # fmt: skip
    decay_gradients(sums, dt_HT, A_H, offsets_B1, table, launch, ddt_TH, dA_dD_2ZH[0])
    dA_H, dD_H = dA_dD_2ZH.sum(1).unbind(0)
    return dx_THP, ddt_TH, dA_H.clone(), dB_TN, dC_TN, dD_H.clone()


@ssd_backward_op.register_fake
def _(
    dy_THP: Tensor, dend_BHPN: Tensor | None, state_SHNP: Tensor, x_THP: Tensor, dt_TH: Tensor,
    A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor, offsets_B1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx_THP, ddt_TH, dA_H, dB_TN, dC_TN, dD_H = (
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        for like in (x_THP, dt_TH, A_H, B_TN, C_TN, D_H)
    )
    return dx_THP, ddt_TH, dA_H, dB_TN, dC_TN, dD_H


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.final_states = inputs
    state_SHNP = output[2]
    ctx.mark_non_differentiable(state_SHNP)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(state_SHNP, *tensors)


def _backward(ctx, dy_THP, dend_BHPN, _):
    tensors = ctx.saved_tensors
    if dy_THP is None:
        dy_THP = torch.zeros_like(tensors[1])
    if not ctx.final_states:
        dend_BHPN = None
    return *ssd_backward_op(dy_THP, dend_BHPN, *tensors), None, None


ssd_op.register_autograd(_backward, setup_context=_setup_context)


@overload
def ssd_triton(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, *, final_states: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def ssd_triton(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, *, final_states: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def ssd_triton(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor, *, final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs y_THP of every packed sequence, and with `final_states` also its last state.

    Args:
        x_THP: bf16 or fp32, P in {16, 32, 64, 128}; the heads of a token adjacent in memory, any
            stride between tokens (a slice of a wider tensor is read in place).
        dt_TH: fp32, positive (softplus already applied).
        A_H, D_H: fp32, A negative.
        B_TN, C_TN: dtype of x, N in {16, 32, 64, 128}, one group shared by all heads.
        offsets_B1: int64, `[0, …]`, sequence b is `[offsets_b, offsets_{b+1})`; unused sequences
            are empty and last. Tokens from offsets[-1] on are padding: y and all gradients are 0.

    Returns:
        y_THP in the dtype of x; with `final_states`, `(y_THP, state_BHPN)`, the states in fp32 (0
        for an empty sequence). Both are differentiable with respect to x, dt, A, B, C, D, once.

    Raises:
        ValueError: a shape or dtype that the kernels do not have.
    """
    _check(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1)
    y_THP, state_BHPN, _ = ssd_op(x_THP, dt_TH, A_H, B_TN, C_TN, D_H, offsets_B1, final_states)
    return (y_THP, state_BHPN) if final_states else y_THP


def _check(
    x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TN: Tensor, C_TN: Tensor, D_H: Tensor,
    offsets_B1: Tensor,
) -> None:  # fmt: skip
    T, H, P = x_THP.shape
    N = B_TN.shape[-1]
    if P not in SIZES or N not in SIZES:
        raise ValueError(f"ssd kernels have head dims and state sizes {SIZES}, not P={P}, N={N}")
    if x_THP.dtype not in DTYPES or {B_TN.dtype, C_TN.dtype} != {x_THP.dtype}:
        raise ValueError(
            f"x, B, C must share one dtype of {DTYPES}, not "
            f"{x_THP.dtype}, {B_TN.dtype}, {C_TN.dtype}"
        )
    if {dt_TH.dtype, A_H.dtype, D_H.dtype} != {torch.float32}:
        raise ValueError(f"dt, A, D must be fp32, not {dt_TH.dtype}, {A_H.dtype}, {D_H.dtype}")
    if offsets_B1.dtype != torch.int64 or not offsets_B1.is_contiguous():
        raise ValueError(f"offsets must be contiguous int64, not {offsets_B1.dtype}")
    shapes = {"dt": dt_TH.shape, "A": A_H.shape, "B": B_TN.shape, "C": C_TN.shape, "D": D_H.shape}
    wanted = {"dt": (T, H), "A": (H,), "B": (T, N), "C": (T, N), "D": (H,)}
    for name, shape in shapes.items():
        if tuple(shape) != wanted[name]:
            raise ValueError(f"{name} must have shape {wanted[name]}, not {tuple(shape)}")
