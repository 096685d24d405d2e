"""Depthwise causal convolution + SiLU over packed histories, one pass forward, one backward.

  `z_t = bias + Σ_{d<K} weight[K-1-d] x_{t-d} [d ≤ position_t]`,  `y_t = z_t σ(z_t)`,

where `position_t` is the token's place in its own sequence: nothing crosses a sequence start.

Bound by bytes: x in and y out, so that no element is read or computed twice. A program is one warp
that owns some columns and walks a run of tokens in order; the last inputs stay in its registers. A
group of tokens is loaded before the first of them is used: one warp has to keep many loads under
way, and a load cannot be moved before an earlier store. The places, which decide what a token sees,
are loaded a group ahead, as are the inputs in the forward pass; backward has no registers for more.

Backward keeps nothing but x. With `dz_t = dy_t σ(z_t) (1 + z_t (1 - σ(z_t)))`,

  `dx_t = Σ_{d<K} weight[K-1-d] dz_{t+d} [d ≤ position_{t+d}]`,

so the walk carries the sums of the last tokens too, and ends REACH tokens behind its run. Weight
and bias gradients leave as one partial sum a run: no atomics, the same bits every time.

The reversed direction is the same walk from the batch's last token to its first: rows are given by
the last one and a negative stride, places in the order of the walk.

The kernels always have 4 taps; the ones beyond K read zeros. Strides are compile-time constants:
otherwise one that is no multiple of 16, as that of in_proj's output, would cost the wide loads.

Shape suffixes: T tokens, E channels, K taps, W columns of a program, R runs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.kernels.partial_sums import partial_sums

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNEL_TAPS = (1, 2, 3, 4)
REACH = max(KERNEL_TAPS) - 1
COLUMNS, GROUP = 128, 8
# Programs (warps) that an H100's 132 multiprocessors hold at once, by their 96, 168 and (adding
# to dx) 177 registers a thread: all start and end together.
FORWARD_PROGRAMS, BACKWARD_PROGRAMS, ADDING_PROGRAMS = 132 * 20, 132 * 12, 132 * 11
SHORTEST_RUN = 64  # tokens; what a walk reads twice stays below a tenth


@triton.jit
def load_tap(weight_ptr, column_W, BACK: tl.constexpr, E: tl.constexpr, K: tl.constexpr):
    """The weights of the input BACK tokens ago, fp32, 0 where there is no such tap."""
    mask_W = (column_W < E) & (BACK < K)
    return tl.load(weight_ptr + column_W * K + (K - 1 - BACK), mask=mask_W, other=0.0).to(
        tl.float32
    )


@triton.jit
def load_row(ptr, token, column_W, tokens, stride: tl.constexpr, E: tl.constexpr):
    """One token's columns, 0 outside the batch."""
    mask_W = (column_W < E) & (token >= 0) & (token < tokens)
    return tl.load(ptr + token.to(tl.int64) * stride + column_W, mask=mask_W, other=0.0)


@triton.jit
def load_rows(
    ptr, start, column_W, tokens, stride: tl.constexpr, E: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """`load_row` of GROUP tokens: a tuple, all under way at once."""
    rows = ()  # type: tuple
    for i in tl.static_range(GROUP):
        rows += (load_row(ptr, start + i, column_W, tokens, stride, E),)
    return rows


@triton.jit
def load_places(position_ptr, start, tokens, GROUP: tl.constexpr):
    """GROUP tokens' places in their sequences."""
    places = ()  # type: tuple
    for i in tl.static_range(GROUP):
        place = tl.load(position_ptr + start + i, mask=start + i < tokens, other=0)
        places += (place.to(tl.int32),)
    return places


@triton.jit
def reaching(x_W, place, BACK: tl.constexpr, K: tl.constexpr):
    """x where a token at `place` of its sequence reaches BACK tokens back, else 0, be x NaN.

    The sign of BACK - 1 - place as a mask: a select would move its predicate for every column.
    """
    if BACK >= K:
        return tl.zeros_like(x_W)
    mask = (BACK - 1 - place) >> 31
    return (x_W.to(tl.int32, bitcast=True) & mask).to(tl.float32, bitcast=True)


@triton.jit
def sigmoid(z_W):
    """1 / (1 + exp(-z)) within 3e-7, of the two instructions that need no care for subnormals."""
    root_W = tl.rsqrt(1 + tl.exp2(z_W * -1.4426950408889634))
    return root_W * root_W


@triton.jit(do_not_specialize=["tokens", "groups"])
def conv_kernel(
    x_ptr, weight_ptr, bias_ptr, position_ptr, y_ptr, tokens, groups, x_stride: tl.constexpr,
    y_stride: tl.constexpr, E: tl.constexpr, K: tl.constexpr, W: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """y of `groups` times GROUP tokens and W channels."""
    column_W = tl.program_id(1) * W + tl.arange(0, W)
    bias_W = tl.load(bias_ptr + column_W, mask=column_W < E, other=0.0).to(tl.float32)
    tap0_W = load_tap(weight_ptr, column_W, 0, E, K)
    tap1_W = load_tap(weight_ptr, column_W, 1, E, K)
    tap2_W = load_tap(weight_ptr, column_W, 2, E, K)
    tap3_W = load_tap(weight_ptr, column_W, 3, E, K)
    first = tl.program_id(0) * groups * GROUP
    end = tl.minimum(first + groups * GROUP, tokens)
    x1_W = load_row(x_ptr, first - 1, column_W, tokens, x_stride, E).to(tl.float32)
    x2_W = load_row(x_ptr, first - 2, column_W, tokens, x_stride, E).to(tl.float32)
    x3_W = load_row(x_ptr, first - 3, column_W, tokens, x_stride, E).to(tl.float32)
    places = load_places(position_ptr, first, end, GROUP)
    x_rows = load_rows(x_ptr, first, column_W, end, x_stride, E, GROUP)
    for group in range(groups):
        start = first + group * GROUP
        next_places = load_places(position_ptr, start + GROUP, end, GROUP)
        next_x_rows = load_rows(x_ptr, start + GROUP, column_W, end, x_stride, E, GROUP)
        for i in tl.static_range(GROUP):
            x_W, place = x_rows[i].to(tl.float32), places[i]
            z_W = bias_W + tap0_W * x_W
            z_W += tap1_W * reaching(x1_W, place, 1, K)
            z_W += tap2_W * reaching(x2_W, place, 2, K)
            z_W += tap3_W * reaching(x3_W, place, 3, K)
            y_W = z_W * sigmoid(z_W)
            y_ptrs = y_ptr + (start + i).to(tl.int64) * y_stride + column_W
            mask_W = (column_W < E) & (start + i < end)
            tl.store(y_ptrs, y_W.to(y_ptr.dtype.element_ty), mask=mask_W)
            x3_W, x2_W, x1_W = x2_W, x1_W, x_W
        places, x_rows = next_places, next_x_rows


@triton.jit(do_not_specialize=["tokens", "groups"])
def conv_gradient_kernel(
    x_ptr, weight_ptr, bias_ptr, position_ptr, dy_ptr, dx_ptr, dweight_ptr, dbias_ptr, tokens,
    groups, x_stride: tl.constexpr, dy_stride: tl.constexpr, dx_stride: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, W: tl.constexpr, GROUP: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dx of a run, and its share of the gradients of weight [E, K] and bias [E].

    The walk is `groups` times GROUP tokens long; the last three belong to the next run. ADD: dx is
    added to what is there.
    """
    column_W = tl.program_id(1) * W + tl.arange(0, W)
    inside_W = column_W < E
    bias_W = tl.load(bias_ptr + column_W, mask=inside_W, other=0.0).to(tl.float32)
    tap0_W = load_tap(weight_ptr, column_W, 0, E, K)
    tap1_W = load_tap(weight_ptr, column_W, 1, E, K)
    tap2_W = load_tap(weight_ptr, column_W, 2, E, K)
    tap3_W = load_tap(weight_ptr, column_W, 3, E, K)
    run = groups * GROUP - 3
    first = tl.program_id(0) * run
    x1_W = load_row(x_ptr, first - 1, column_W, tokens, x_stride, E).to(tl.float32)
    x2_W = load_row(x_ptr, first - 2, column_W, tokens, x_stride, E).to(tl.float32)
    x3_W = load_row(x_ptr, first - 3, column_W, tokens, x_stride, E).to(tl.float32)
    dx1_W = tl.zeros([W], tl.float32)  # what is summed up so far for 1, 2, 3 tokens ago
    dx2_W = tl.zeros([W], tl.float32)
    dx3_W = tl.zeros([W], tl.float32)
    dbias_W = tl.zeros([W], tl.float32)
    dtap0_W = tl.zeros([W], tl.float32)
    dtap1_W = tl.zeros([W], tl.float32)
    dtap2_W = tl.zeros([W], tl.float32)
    dtap3_W = tl.zeros([W], tl.float32)
    places = load_places(position_ptr, first, tokens, GROUP)
    for group in range(groups):
        start = first + group * GROUP
        next_places = load_places(position_ptr, start + GROUP, tokens, GROUP)
        x_rows = load_rows(x_ptr, start, column_W, tokens, x_stride, E, GROUP)
        dy_rows = load_rows(dy_ptr, start, column_W, tokens, dy_stride, E, GROUP)
        if ADD:
            there_rows = load_rows(dx_ptr, start - 3, column_W, tokens, dx_stride, E, GROUP)
        for i in tl.static_range(GROUP):
            x_W, place = x_rows[i].to(tl.float32), places[i]
            seen1_W = reaching(x1_W, place, 1, K)
            seen2_W = reaching(x2_W, place, 2, K)
            seen3_W = reaching(x3_W, place, 3, K)
            z_W = bias_W + tap0_W * x_W + tap1_W * seen1_W + tap2_W * seen2_W + tap3_W * seen3_W
            gate_W = sigmoid(z_W)
            dz_W = dy_rows[i].to(tl.float32) * gate_W * (1 + z_W * (1 - gate_W))

            dx3_W += tap3_W * reaching(dz_W, place, 3, K)  # complete
            if ADD:
                dx3_W += there_rows[i].to(tl.float32)
            done = start + i - 3
            dx_ptrs = dx_ptr + done.to(tl.int64) * dx_stride + column_W
            mask_W = inside_W & (done < tokens)
            if i < 3:
                mask_W = mask_W & (group > 0)
            tl.store(dx_ptrs, dx3_W.to(dx_ptr.dtype.element_ty), mask=mask_W)
            dx3_W = dx2_W + tap2_W * reaching(dz_W, place, 2, K)
            dx2_W = dx1_W + tap1_W * reaching(dz_W, place, 1, K)
            dx1_W = tap0_W * dz_W

            if i >= GROUP - 3:
                dz_W = tl.where(group < groups - 1, dz_W, 0.0)
            dbias_W += dz_W
            dtap0_W += dz_W * x_W
            dtap1_W += dz_W * seen1_W
            dtap2_W += dz_W * seen2_W
            dtap3_W += dz_W * seen3_W
            x3_W, x2_W, x1_W = x2_W, x1_W, x_W
        places = next_places
    tl.store(dbias_ptr + tl.program_id(0) * E + column_W, dbias_W, mask=inside_W)
    dweight_ptrs = dweight_ptr + tl.program_id(0) * (E * K) + column_W * K + (K - 1)
    tl.store(dweight_ptrs, dtap0_W, mask=inside_W)
    if K > 1:
        tl.store(dweight_ptrs - 1, dtap1_W, mask=inside_W)
    if K > 2:
        tl.store(dweight_ptrs - 2, dtap2_W, mask=inside_W)
    if K > 3:
        tl.store(dweight_ptrs - 3, dtap3_W, mask=inside_W)


def groups_of_walk(tokens: int, E: int, programs: int, behind: int) -> int:
    """Groups that a program walks when at most `programs` share the work, no run too short.

    A walk goes on for `behind` tokens after its run.
    """
    runs = max(programs // triton.cdiv(E, COLUMNS), 1)
    return triton.cdiv(max(triton.cdiv(tokens, runs), SHORTEST_RUN) + behind, GROUP)


def unit_columns(x_TE: Tensor) -> Tensor:
    """x with adjacent columns; the stride between tokens stays as it is."""
    return x_TE if x_TE.stride(-1) == 1 else x_TE.contiguous()


def walked(x_TE: Tensor, mirror: bool) -> tuple[Tensor, int]:
    """The row where a walk over all tokens begins, and the stride to the next."""
    return (x_TE[-1:], -x_TE.stride(0)) if mirror else (x_TE, x_TE.stride(0))


def convolve(
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, place_T: Tensor, mirror: bool = False
) -> Tensor:
    """SiLU(conv(x)), contiguous; `mirror` walks from the last token to the first.

    place_T: the tokens' places in their sequences, in the order of the walk.
    """
    (T, E), K = x_TE.shape, weight_EK.shape[1]
    x_TE, weight_EK, bias_E = unit_columns(x_TE), weight_EK.contiguous(), bias_E.contiguous()
    y_TE = torch.empty(T, E, dtype=x_TE.dtype, device=x_TE.device)
    groups = groups_of_walk(T, E, FORWARD_PROGRAMS, 0)
    if T:
        x_first, x_stride = walked(x_TE, mirror)
        y_first, y_stride = walked(y_TE, mirror)
        conv_kernel[(triton.cdiv(T, groups * GROUP), triton.cdiv(E, COLUMNS))](
            x_first, weight_EK, bias_E, place_T, y_first, T, groups, x_stride, y_stride, E, K,
            COLUMNS, GROUP, num_warps=1,
        )  # fmt: skip
    return y_TE


@torch.library.custom_op("ssd4rec::causal_conv", mutates_args=())
def causal_conv_op(x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor) -> Tensor:
    return convolve(x_TE, weight_EK, bias_E, position_T)


@causal_conv_op.register_fake
def _(x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor) -> Tensor:
    return torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)


def conv_gradients(
    dy_TE: Tensor, x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, place_T: Tensor,
    dx_TE: Tensor, mirror: bool = False, add: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes or adds to dx, whose rows may be slices of wider ones; returns dweight and dbias."""
    (T, E), K = x_TE.shape, weight_EK.shape[1]
    x_TE, dy_TE = unit_columns(x_TE), unit_columns(dy_TE)
    weight_EK, bias_E = weight_EK.contiguous(), bias_E.contiguous()
    programs = ADDING_PROGRAMS if add else BACKWARD_PROGRAMS
    groups = groups_of_walk(T, E, programs, REACH)
    runs = triton.cdiv(T, groups * GROUP - REACH)
    dweight_REK = x_TE.new_empty(runs, E, K, dtype=torch.float32)
    dbias_RE = x_TE.new_empty(runs, E, dtype=torch.float32)
    if T:
        x_first, x_stride = walked(x_TE, mirror)
        dy_first, dy_stride = walked(dy_TE, mirror)
        dx_first, dx_stride = walked(dx_TE, mirror)
        conv_gradient_kernel[(runs, triton.cdiv(E, COLUMNS))](
            x_first, weight_EK, bias_E, place_T, dy_first, dx_first, dweight_REK, dbias_RE, T,
            groups, x_stride, dy_stride, dx_stride, E, K, COLUMNS, GROUP, add, num_warps=1,
        )  # fmt: skip
    dweight_EK = partial_sums(dweight_REK.flatten(1).unsqueeze(0)).view(E, K)
    dbias_E = partial_sums(dbias_RE.unsqueeze(0))[0]
    return dweight_EK.to(weight_EK.dtype), dbias_E.to(bias_E.dtype)


@torch.library.custom_op("ssd4rec::causal_conv_backward", mutates_args=())
def causal_conv_backward_op(
    dy_TE: Tensor, x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias."""
    dx_TE = torch.empty(x_TE.shape, dtype=x_TE.dtype, device=x_TE.device)
    return dx_TE, *conv_gradients(dy_TE, x_TE, weight_EK, bias_E, position_T, dx_TE)


@causal_conv_backward_op.register_fake
def _(
    dy_TE: Tensor, x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
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
    x_TE: Tensor, weight_EK: Tensor, bias_E: Tensor, position_T: Tensor
) -> Tensor:
    """SiLU(conv(x)) that never crosses a sequence start, in the dtype of x.

    Args:
        x_TE: bf16, fp16 or fp32; columns adjacent, any stride between tokens.
        weight_EK, bias_E: any float dtype; sums are fp32. The last tap meets the token itself.
        position_T: int64, each token's place in its own sequence (`modules.encoder.positions`).

    Raises:
        ValueError: shapes that do not fit, or taps or a dtype that the kernel does not have.
    """
    (T, E), K = x_TE.shape, weight_EK.shape[1]
    if K not in KERNEL_TAPS:
        raise ValueError(f"a convolution of {K} taps has no kernel, only {KERNEL_TAPS}")
    if x_TE.dtype not in DTYPES or position_T.dtype != torch.int64:
        raise ValueError(
            f"x must be one of {DTYPES}, positions int64: {x_TE.dtype}, {position_T.dtype}"
        )
    if position_T.shape != (T,) or not position_T.is_contiguous():
        raise ValueError(f"{T} tokens need as many positions, not {tuple(position_T.shape)}")
    if weight_EK.shape[0] != E or bias_E.shape != (E,):
        raise ValueError(
            f"{E} channels need weight [{E}, K] and bias [{E}], "
            f"not {tuple(weight_EK.shape)} and {tuple(bias_E.shape)}"
        )
    return causal_conv_op(x_TE, weight_EK, bias_E, position_T)
