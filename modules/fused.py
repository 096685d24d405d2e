"""The encoder's small operations: the reference in PyTorch, and on CUDA one Triton kernel each.

Legend: T tokens, E inner width, D model width, F = 4 D, O columns of a product, S rows read in each
of G groups.

A reference computes in fp32 (fp64 for fp64 inputs) and rounds once, to the dtype it returns, as the
kernels do. TorchScript runs the references on every device. `project_residual` and
`project_and_read` are no kernels but products whose backward saves passes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def gated_norm_reference(y_TE: Tensor, z_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """RMSNorm(y * SiLU(z)) * weight: gate first, then normalise over E (mamba-ssm)."""
    gated = at_least_fp32(y_TE) * F.silu(at_least_fp32(z_TE))
    scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (gated * scale * weight_E).to(y_TE.dtype)


def gated_norm(y_TE: Tensor, z_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """`gated_norm_reference`, whose kernel reads z in place where it is a slice of rows."""
    if torch.jit.is_scripting() or not y_TE.is_cuda:
        return gated_norm_reference(y_TE, z_TE, weight_E, eps)
    return _gated_norm_cuda(y_TE, z_TE, weight_E, eps)


@torch.jit.unused
def _gated_norm_cuda(y_TE: Tensor, z_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    from modules.kernels.gated_norm import gated_norm_triton  # Triton is there only with a GPU

    return gated_norm_triton(y_TE, z_TE, weight_E, eps)


def gated_norm_both_reference(
    y_TE: Tensor,
    r_TE: Tensor,
    z_TE: Tensor,
    weight_E: Tensor,
    eps: float,
    beta: float,
    reversed_T: Tensor,
    restore_order: bool,
) -> Tensor:
    """N(y, z) + beta N(r, z reversed), or with `restore_order` + beta (that put back in order).

    N is `gated_norm_reference`; r is the scan of the reversed sequences, z is not reversed.
    """
    forward_TE = gated_norm_reference(y_TE, z_TE, weight_E, eps)
    if restore_order:
        r_TE = r_TE.index_select(0, reversed_T)
    else:
        z_TE = z_TE.index_select(0, reversed_T)
    return forward_TE + beta * gated_norm_reference(r_TE, z_TE, weight_E, eps)


def residual_norm_reference(
    a_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    rate: float,
    dtype: torch.dtype,
    a_bias_D: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(a + a_bias + x)) in `dtype`; `rate` 0 for no dropout."""
    total_TD = at_least_fp32(a_TD) + at_least_fp32(x_TD)
    if a_bias_D is not None:
        total_TD = total_TD + a_bias_D
    normed_TD = F.layer_norm(total_TD, [total_TD.shape[-1]], weight_D, bias_D, eps)
    return dropout(normed_TD, rate).to(dtype)


def residual_norm(
    a_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    rate: float,
    dtype: torch.dtype,
    a_bias_D: Tensor | None = None,
) -> Tensor:
    """`residual_norm_reference`; on CUDA one kernel that stores no mask."""
    if torch.jit.is_scripting() or not a_TD.is_cuda:
        return residual_norm_reference(a_TD, x_TD, weight_D, bias_D, eps, rate, dtype, a_bias_D)
    return _residual_norm_cuda(a_TD, x_TD, weight_D, bias_D, eps, rate, dtype, a_bias_D)


@torch.jit.unused
def _residual_norm_cuda(
    a_TD: Tensor,
    x_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    rate: float,
    dtype: torch.dtype,
    a_bias_D: Tensor | None,
) -> Tensor:
    from modules.kernels.residual_norm import residual_norm_triton

    return residual_norm_triton(
        a_TD, x_TD, weight_D, bias_D, eps, rate, dtype, a_bias_D=a_bias_D
    )  # fmt: skip


def input_norm(
    x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, rate: float, dtype: torch.dtype
) -> Tensor:
    """LayerNorm(dropout(x)) in `dtype`: dropout comes first, as published. Not for TorchScript."""
    if not x_TD.is_cuda:
        dropped_TD = dropout(at_least_fp32(x_TD), rate)
        return F.layer_norm(dropped_TD, [x_TD.shape[-1]], weight_D, bias_D, eps).to(dtype)
    from modules.kernels.residual_norm import residual_norm_triton

    return residual_norm_triton(
        x_TD, None, weight_D, bias_D, eps, rate, dtype, dropout_first=True
    )  # fmt: skip


def gelu_dropout_reference(x_TF: Tensor, bias_F: Tensor, rate: float) -> Tensor:
    """dropout(GELU(x + bias)), exact GELU, in the dtype of x."""
    return dropout(F.gelu(at_least_fp32(x_TF) + bias_F), rate).to(x_TF.dtype)


def gelu_dropout(x_TF: Tensor, bias_F: Tensor, rate: float) -> Tensor:
    """`gelu_dropout_reference`; on CUDA one kernel that stores no mask."""
    if torch.jit.is_scripting() or not x_TF.is_cuda:
        return gelu_dropout_reference(x_TF, bias_F, rate)
    return _gelu_dropout_cuda(x_TF, bias_F, rate)


@torch.jit.unused
def _gelu_dropout_cuda(x_TF: Tensor, bias_F: Tensor, rate: float) -> Tensor:
    from modules.kernels.gelu import gelu_dropout_triton

    return gelu_dropout_triton(x_TF, bias_F, rate)


def whole_rows(columns: int, dtype: torch.dtype, begin: int) -> int:
    """The least width, at least `columns`, whose rows begin at whole multiples of `begin` bytes."""
    step = begin // dtype.itemsize
    return -(-columns // step) * step


def project_aligned(x_TD: Tensor, weight_OD: Tensor) -> Tensor:
    """x W^T for kernels that read parts of its rows: on a GPU these begin at whole 64 bytes.

    For that W gets rows of zeros. At in_proj's 1,160 columns the product of 262,144 bf16 tokens
    takes an H100 0.29 ms in place of 0.33, and what reads the rows is quicker too.
    """
    columns = weight_OD.shape[0]
    more = whole_rows(columns, weight_OD.dtype, 64) - columns
    if not (x_TD.is_cuda and more):
        return x_TD @ weight_OD.t()
    return (x_TD @ F.pad(weight_OD, (0, 0, 0, more)).t())[:, :columns]


class _ProjectResidual(torch.autograd.Function):
    """Adds the two gradients of x inside the product that makes one of them."""

    @staticmethod
    def forward(ctx, x_TD, weight_OD, aligned):  # type: ignore[no-untyped-def]
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            weight_OD = weight_OD.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x_TD, weight_OD)
        a_TD = x_TD.to(weight_OD.dtype)
        out_TO = project_aligned(a_TD, weight_OD) if aligned else a_TD @ weight_OD.t()
        return out_TO, x_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TO, dx_TD):  # type: ignore[no-untyped-def]
        x_TD, weight_OD = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            dweight_OD = dout_TO.t() @ x_TD.to(dout_TO.dtype)
            if dx_TD.dtype == dout_TO.dtype and dx_TD.is_contiguous():
                # `residual_norm` gives one tensor as both its gradients. The other one's reader
                # is done: its branch began at this projection.
                dx_TD.addmm_(dout_TO, weight_OD)
            else:
                dx_TD = dx_TD + dout_TO @ weight_OD
        return dx_TD, dweight_OD, None


def project_residual(
    x_TD: Tensor, weight_OD: Tensor, aligned: bool = False
) -> tuple[Tensor, Tensor]:
    """(x W^T, x), where x goes on to a residual sum: take it from here, and use it once.

    aligned: in rows as `project_aligned` makes them.
    The backward then adds both gradients of x in one product, in place of the one that comes from
    the sum. So nothing may keep that: it is overwritten. Products are in autocast's dtype.
    """
    if torch.jit.is_scripting():
        return F.linear(x_TD, weight_OD), x_TD
    return _project_residual(x_TD, weight_OD, aligned)


@torch.jit.unused
def _project_residual(x_TD: Tensor, weight_OD: Tensor, aligned: bool) -> tuple[Tensor, Tensor]:
    return _ProjectResidual.apply(x_TD, weight_OD, aligned)


class _ProjectAndRead(torch.autograd.Function):
    """Adds the gradients of the rows read into the one that the product makes."""

    @staticmethod
    def forward(ctx, x_TD, weight_OD, read_GS):  # type: ignore[no-untyped-def]
        device = x_TD.device.type
        if torch.is_autocast_enabled(device):
            weight_OD = weight_OD.to(torch.get_autocast_dtype(device))
        ctx.save_for_backward(x_TD, weight_OD, read_GS)
        return project_aligned(x_TD.to(weight_OD.dtype), weight_OD), x_TD[read_GS]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TO, dread_GSD):  # type: ignore[no-untyped-def]
        x_TD, weight_OD, read_GS = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            dweight_OD = dout_TO.t() @ x_TD.to(dout_TO.dtype)
            dx_TD = (dout_TO @ weight_OD).to(x_TD.dtype)
        for read_S, dread_SD in zip(read_GS, dread_GSD, strict=True):
            dx_TD.index_add_(0, read_S, dread_SD)
        return dx_TD, dweight_OD, None


def project_and_read(x_TD: Tensor, weight_OD: Tensor, read_GS: Tensor) -> tuple[Tensor, Tensor]:
    """(x W^T, x[read] [G, S, D]); the backward adds the rows' gradients in place.

    Where no group reads a row twice (but for gradients of 0), the same bits every time.
    """
    if torch.jit.is_scripting():
        return F.linear(x_TD, weight_OD), x_TD[read_GS]
    return _project_and_read(x_TD, weight_OD, read_GS)


@torch.jit.unused
def _project_and_read(x_TD: Tensor, weight_OD: Tensor, read_GS: Tensor) -> tuple[Tensor, Tensor]:
    return _ProjectAndRead.apply(x_TD, weight_OD, read_GS)


def dropout(x: Tensor, rate: float) -> Tensor:
    """Inverted dropout; x itself at rate 0."""
    if rate == 0:
        return x
    if torch.jit.is_scripting() or x.is_cuda:
        return F.dropout(x, rate)
    return x * _keep_scale(x, rate)


@torch.jit.unused
def _keep_scale(x: Tensor, rate: float) -> Tensor:
    """0 where dropped, else 1 / (1 - rate), from 16 random bits an element as the kernels do it.

    PyTorch's Bernoulli draws take a quarter of a training step on CPU; these take a sixteenth.
    """
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    bits = words.random_(-(2**63), None).view(torch.int16)[: x.numel()].view(x.shape)
    threshold = round(rate * 65536)
    return (bits >= threshold - 32768).to(x.dtype).mul_(65536 / (65536 - threshold))


@torch.library.custom_op("ssd4rec::permute_rows", mutates_args=())
def permute_rows_op(x: Tensor, involution_T: Tensor) -> Tensor:
    return x.index_select(0, involution_T)


@permute_rows_op.register_fake
def _(x: Tensor, involution_T: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _permute_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx, dy):  # type: ignore[no-untyped-def]
    return permute_rows_op(dy, *ctx.saved_tensors), None


permute_rows_op.register_autograd(_permute_backward, setup_context=_permute_setup)


def permute_rows(x: Tensor, involution_T: Tensor) -> Tensor:
    """x[involution_T], whose gradient is the same gather: indexing's own would scatter and add."""
    if torch.jit.is_scripting():
        return x.index_select(0, involution_T)
    return _permute_rows(x, involution_T)


@torch.jit.unused
def _permute_rows(x: Tensor, involution_T: Tensor) -> Tensor:
    return permute_rows_op(x, involution_T)
