"""The gated RMSNorm behind the scan, of one direction or of both, on Triton.

    N(y, z) = g / sqrt(mean(g^2) + eps),  g = y * SiLU(z)         (mean over E)
    one direction:   out_t = w * N(y_t, z_t)
    both:            out_t = w * (N(y_t, z_t) + beta N(r_m(t), z_m(t)))
    both, restored:  out_t = w * (N(y_t, z_t) + beta N(r_t, z_t))

r_t is what the scan of the reversed sequences gives when it meets token t, and m (`mirror_T`) the
permutation that reverses each sequence, its own inverse. Since out_proj is linear, adding here lets
one projection serve both directions; and since z is read through m, neither is it projected nor
gathered twice.

The backward keeps nothing: g and its norm are made again. Its programs walk the rows of *z*, where
both directions meet, so dz is written once, without atomics. dw leaves as one partial sum a program
in a fixed order: same inputs, same bits.

Shape suffixes: T tokens, E channels, R rows of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modules.kernels.conv import sigmoid
from modules.kernels.partial_sums import partial_sums

DTYPES = (torch.bfloat16, torch.float32)
# Warps of the backward that an H100's 132 multiprocessors hold at once, by 168 registers a thread.
WARPS = 132 * 12
TILE = 512  # elements of a warp
# Of a program. A backward's works through many tiles: with one it has whole rows, and never waits.
FORWARD_WARPS, BACKWARD_WARPS = 4, 1
MAX_WIDTH = 8192


@triton.jit
def gated_gradient(y_RE, z_RE, dout_RE, w_E, eps, E: tl.constexpr):
    """dy, dz and the row's terms of dw of out = w * N(y, z)."""
    sigmoid_RE = sigmoid(z_RE)
    silu_RE = z_RE * sigmoid_RE
    g_RE = y_RE * silu_RE
    scale_R = tl.rsqrt(tl.sum(g_RE * g_RE, 1) / E + eps)
    n_RE = g_RE * scale_R[:, None]
    dn_RE = dout_RE * w_E[None, :]
    along_R = tl.sum(dn_RE * n_RE, 1) / E
    dg_RE = (dn_RE - n_RE * along_R[:, None]) * scale_R[:, None]
    dz_RE = dg_RE * y_RE * sigmoid_RE * (1.0 + z_RE * (1.0 - sigmoid_RE))
    return dg_RE * silu_RE, dz_RE, dout_RE * n_RE


@triton.jit
def normalised_gate(y_RE, z_RE, eps, E: tl.constexpr):
    g_RE = y_RE * z_RE * sigmoid(z_RE)
    return g_RE * tl.rsqrt(tl.sum(g_RE * g_RE, 1) / E + eps)[:, None]


@triton.jit
def load_tile(ptr, t_R, stride, e_E, mask_RE):
    """Rows t of a matrix, fp32."""
    ptrs = ptr + t_R.to(tl.int64)[:, None] * stride + e_E[None, :]
    return tl.load(ptrs, mask=mask_RE, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def gated_norm_kernel(
    y_ptr, z_ptr, w_ptr, r_ptr, mirror_ptr, out_ptr, rows, beta, eps, z_stride: tl.constexpr,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BOTH: tl.constexpr,
    RESTORE: tl.constexpr,
):  # fmt: skip
    t_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    e_E = tl.arange(0, BLOCK_E)
    mask_RE = (t_R < rows)[:, None] & (e_E < E)[None, :]
    w_E = tl.load(w_ptr + e_E, mask=e_E < E, other=0.0)
    y_RE = load_tile(y_ptr, t_R, E, e_E, mask_RE)
    z_RE = load_tile(z_ptr, t_R, z_stride, e_E, mask_RE)
    out_RE = normalised_gate(y_RE, z_RE, eps, E)
    if BOTH:
        read_R = t_R.to(tl.int64)
        if not RESTORE:
            read_R = tl.load(mirror_ptr + t_R, mask=t_R < rows, other=0)
            z_RE = load_tile(z_ptr, read_R, z_stride, e_E, mask_RE)
        r_RE = load_tile(r_ptr, read_R, E, e_E, mask_RE)
        out_RE += beta * normalised_gate(r_RE, z_RE, eps, E)
    out_RE *= w_E[None, :]
    out_ptrs = out_ptr + t_R.to(tl.int64)[:, None] * E + e_E[None, :]
    tl.store(out_ptrs, out_RE.to(out_ptr.dtype.element_ty), mask=mask_RE)


@triton.jit(do_not_specialize=["rows", "steps"])
def gated_norm_backward_kernel(
    dout_ptr, y_ptr, z_ptr, w_ptr, r_ptr, mirror_ptr, dy_ptr, dz_ptr, dr_ptr, dw_ptr, rows, steps,
    beta, eps, z_stride: tl.constexpr, dz_stride: tl.constexpr, E: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BOTH: tl.constexpr, RESTORE: tl.constexpr,
):  # fmt: skip
    """Program p takes the tiles p, p + programs, … of z's rows."""
    e_E = tl.arange(0, BLOCK_E)
    w_E = tl.load(w_ptr + e_E, mask=e_E < E, other=0.0)
    dw_RE = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for step in range(steps):
        tile = step * tl.num_programs(0) + tl.program_id(0)
        t_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask_RE = (t_R < rows)[:, None] & (e_E < E)[None, :]
        own_RE = t_R.to(tl.int64)[:, None] * E + e_E[None, :]
        z_RE = load_tile(z_ptr, t_R, z_stride, e_E, mask_RE)
        y_RE = load_tile(y_ptr, t_R, E, e_E, mask_RE)
        dout_RE = load_tile(dout_ptr, t_R, E, e_E, mask_RE)
        dy_RE, dz_RE, dw_terms_RE = gated_gradient(y_RE, z_RE, dout_RE, w_E, eps, E)
        tl.store(dy_ptr + own_RE, dy_RE.to(dy_ptr.dtype.element_ty), mask=mask_RE)
        dw_RE += dw_terms_RE
        if BOTH:
            r_RE = load_tile(r_ptr, t_R, E, e_E, mask_RE)
            if not RESTORE:
                mirror_R = tl.load(mirror_ptr + t_R, mask=t_R < rows, other=0)
                dout_RE = load_tile(dout_ptr, mirror_R, E, e_E, mask_RE)
            dr_RE, dz_too_RE, dw_terms_RE = gated_gradient(
                r_RE, z_RE, dout_RE * beta, w_E, eps, E
            )  # fmt: skip
            tl.store(dr_ptr + own_RE, dr_RE.to(dr_ptr.dtype.element_ty), mask=mask_RE)
            dz_RE += dz_too_RE
            dw_RE += dw_terms_RE
        dz_ptrs = dz_ptr + t_R.to(tl.int64)[:, None] * dz_stride + e_E[None, :]
        tl.store(dz_ptrs, dz_RE.to(dz_ptr.dtype.element_ty), mask=mask_RE)
    dw_E = tl.sum(dw_RE, 0)
    tl.store(dw_ptr + tl.program_id(0) * E + e_E, dw_E, mask=e_E < E)


def tile_shape(width: int, warps: int) -> tuple[int, int, int]:
    """(rows, columns, warps) of a tile of whole rows. Wide rows take more warps."""
    columns = max(triton.next_power_of_2(width), 8)
    return max(1, TILE * warps // columns), columns, max(warps, columns // TILE)


@torch.library.custom_op("ssd4rec::gated_norm", mutates_args=())
def gated_norm_op(
    y_TE: Tensor, z_TE: Tensor, w_E: Tensor, r_TE: Tensor | None, mirror_T: Tensor | None,
    beta: float, restore: bool, eps: float,
) -> Tensor:  # fmt: skip
    T, E = y_TE.shape
    y_TE, r_TE = y_TE.contiguous(), None if r_TE is None else r_TE.contiguous()
    out_TE = torch.empty_like(y_TE)
    block_R, block_E, warps = tile_shape(E, FORWARD_WARPS)
    if T:
        gated_norm_kernel[(triton.cdiv(T, block_R),)](
            y_TE, z_TE, w_E, r_TE, mirror_T, out_TE, T, beta, eps, z_TE.stride(0), E, block_E,
            block_R, r_TE is not None, restore, num_warps=warps,
        )  # fmt: skip
    return out_TE


@gated_norm_op.register_fake
def _(
    y_TE: Tensor, z_TE: Tensor, w_E: Tensor, r_TE: Tensor | None, mirror_T: Tensor | None,
    beta: float, restore: bool, eps: float,
) -> Tensor:  # fmt: skip
    return y_TE.new_empty(y_TE.shape)


def gated_norm_gradients(
    dout_TE: Tensor, y_TE: Tensor, z_TE: Tensor, w_E: Tensor, r_TE: Tensor | None,
    mirror_T: Tensor | None, beta: float, restore: bool, eps: float, dz_TE: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Writes dz, whose rows may be slices of wider ones; dy, dw and dr (empty without r)."""
    T, E = y_TE.shape
    dout_TE, y_TE = dout_TE.contiguous(), y_TE.contiguous()
    dy_TE = torch.empty_like(y_TE)
    if r_TE is not None:
        r_TE = r_TE.contiguous()
        dr_TE = torch.empty_like(r_TE)
    else:
        dr_TE = y_TE.new_empty(0)
    if T == 0:
        return dy_TE, torch.zeros_like(w_E), dr_TE
    block_R, block_E, warps = tile_shape(E, BACKWARD_WARPS)
    tiles = triton.cdiv(T, block_R)
    programs = min(tiles, WARPS // warps)
    dw_GE = w_E.new_empty(programs, E)
    gated_norm_backward_kernel[(programs,)](
        dout_TE, y_TE, z_TE, w_E, r_TE, mirror_T, dy_TE, dz_TE, dr_TE, dw_GE, T,
        triton.cdiv(tiles, programs), beta, eps, z_TE.stride(0), dz_TE.stride(0), E, block_E,
        block_R, r_TE is not None, restore, num_warps=warps,
    )  # fmt: skip
    return dy_TE, partial_sums(dw_GE.unsqueeze(0))[0], dr_TE


@torch.library.custom_op("ssd4rec::gated_norm_backward", mutates_args=())
def gated_norm_backward_op(
    dout_TE: Tensor, y_TE: Tensor, z_TE: Tensor, w_E: Tensor, r_TE: Tensor | None,
    mirror_T: Tensor | None, beta: float, restore: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dy, dz, dw and dr (empty without r)."""
    dz_TE = y_TE.new_empty(y_TE.shape)
    dy_TE, dw_E, dr_TE = gated_norm_gradients(
        dout_TE, y_TE, z_TE, w_E, r_TE, mirror_T, beta, restore, eps, dz_TE
    )
    return dy_TE, dz_TE, dw_E, dr_TE


@gated_norm_backward_op.register_fake
def _(
    dout_TE: Tensor, y_TE: Tensor, z_TE: Tensor, w_E: Tensor, r_TE: Tensor | None,
    mirror_T: Tensor | None, beta: float, restore: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = y_TE.shape if r_TE is not None else (0,)
    return (
        y_TE.new_empty(y_TE.shape), y_TE.new_empty(y_TE.shape), w_E.new_empty(w_E.shape),
        y_TE.new_empty(shape),
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.beta, ctx.restore, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout_TE):
    tensors = ctx.saved_tensors
    dy_TE, dz_TE, dw_E, dr_TE = gated_norm_backward_op(
        dout_TE, *tensors, ctx.beta, ctx.restore, ctx.eps
    )
    return dy_TE, dz_TE, dw_E, None if tensors[3] is None else dr_TE, None, None, None, None


gated_norm_op.register_autograd(_backward, setup_context=_setup_context)


def gated_norm_triton(y_TE: Tensor, z_TE: Tensor, w_E: Tensor, eps: float) -> Tensor:
    """The formula for one direction, [T, E] in the dtype of y; differentiable, once.

    Args:
        y_TE: bf16 or fp32, up to 8,192 channels.
        z_TE: dtype of y, channels adjacent, any stride between rows (a slice is read in place).
        w_E: fp32.

    Raises:
        ValueError: a shape or dtype that the kernels do not have.
    """
    if y_TE.dtype not in DTYPES or z_TE.dtype != y_TE.dtype or w_E.dtype != torch.float32:
        raise ValueError(
            f"y and z must share one dtype of {DTYPES} and w be fp32, not "
            f"{y_TE.dtype}, {z_TE.dtype}, {w_E.dtype}"
        )
    if z_TE.shape != y_TE.shape or w_E.shape != y_TE.shape[1:] or y_TE.shape[1] > MAX_WIDTH:
        raise ValueError(
            f"y and z must be [T, E], w [E], E at most {MAX_WIDTH}, not "
            f"{tuple(y_TE.shape)}, {tuple(z_TE.shape)}, {tuple(w_E.shape)}"
        )
    if z_TE.stride(1) != 1:
        z_TE = z_TE.contiguous()
    return gated_norm_op(y_TE, z_TE, w_E, None, None, 0.0, False, eps)
