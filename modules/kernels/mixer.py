"""The middle of the Mamba-2 block, from in_proj's output to out_proj's input, as one operation.

    [z, x, B, C, dt] = proj;  (x, B, C) = SiLU(conv(x, B, C));  dt = softplus(dt + dt_bias)
    out = RMSNorm(ssd(x, dt, -exp(A_log), B, C, D) * SiLU(z)) * norm_weight

The kernels are those of `conv`, `ssd` and `gated_norm`. As one node of autograd they read slices of
proj in place and their backward passes write into slices of one dproj: split operations would each
cost a gradient that a concatenation copies, at long batches as much as the convolution. Softplus
and the exponential are made where dt is read.

For the backward it keeps proj, the convolution's output and the scan's.

Shape suffixes: T tokens, E = H P inner channels, H heads, N state, M = E + 2N columns convolved, K
taps, F = E + M + H columns of proj, Z chunks.
"""

import torch
from torch import Tensor

from modules.kernels.conv import KERNEL_TAPS, causal_conv_op, conv_gradients
from modules.kernels.gated_norm import MAX_WIDTH, gated_norm_gradients, gated_norm_op
from modules.kernels.ssd import (
    DTYPES,
    SIZES,
    choose_launch,
    decay_gradients,
    decays,
    make_table,
    scan,
    scan_gradients,
)


def parts_of_proj(proj_TF: Tensor, E: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, the convolution's input and dt: views."""
    return proj_TF[:, :E], proj_TF[:, E : E + M], proj_TF[:, E + M :]


def parts_of_convolved(xBC_TM: Tensor, E: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """x by heads, B and C: views."""
    N = (xBC_TM.shape[1] - E) // 2
    return xBC_TM[:, :E].unflatten(1, (H, E // H)), xBC_TM[:, E : E + N], xBC_TM[:, E + N :]


@torch.library.custom_op("ssd4rec::mixer_core", mutates_args=())
def mixer_core_op(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out_TE, and for the backward the outputs of convolution and scan."""
    (T, _), E, H, M = proj_TF.shape, len(norm_weight_E), len(D_H), len(conv_bias_M)
    z_TE, xBC_TM, dt_TH = parts_of_proj(proj_TF, E, M)
    xBC_TM = causal_conv_op(xBC_TM, conv_weight_MK, conv_bias_M, position_T)
    if T == 0:
        return proj_TF.new_empty(T, E), xBC_TM, proj_TF.new_empty(T, E)
    x_THP, B_TN, C_TN = parts_of_convolved(xBC_TM, E, H)
    launch = choose_launch(E // H, B_TN.shape[1], proj_TF.dtype)
    table = make_table(offsets_B1, T, launch)
    dt_HT, c_HT = decays(dt_TH, A_log_H, offsets_B1, table, launch, dt_bias_H)
    y_TE = scan(x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table, launch).flatten(1)
    out_TE = gated_norm_op(y_TE, z_TE, norm_weight_E, None, None, 0.0, False, eps)
    return out_TE, xBC_TM, y_TE


@mixer_core_op.register_fake
def _(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    T, E, M = proj_TF.shape[0], norm_weight_E.shape[0], conv_bias_M.shape[0]
    return proj_TF.new_empty(T, E), proj_TF.new_empty(T, M), proj_TF.new_empty(T, E)


@torch.library.custom_op("ssd4rec::mixer_core_backward", mutates_args=())
def mixer_core_backward_op(
    dout_TE: Tensor, xBC_TM: Tensor, y_TE: Tensor, proj_TF: Tensor, conv_weight_MK: Tensor,
    conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor,
    offsets_B1: Tensor, position_T: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to proj, conv_weight, conv_bias, (A_log, D, dt_bias) as rows, norm_weight."""
    T, E, H, M = len(proj_TF), len(norm_weight_E), len(D_H), len(conv_bias_M)
    dproj_TF = torch.empty_like(proj_TF)
    if T == 0:
        zeros = [torch.zeros_like(t) for t in (conv_weight_MK, conv_bias_M, norm_weight_E)]
        return dproj_TF, zeros[0], zeros[1], D_H.new_zeros(3, H), zeros[2]
    z_TE, conv_in_TM, raw_TH = parts_of_proj(proj_TF, E, M)
    dz_TE, dconv_in_TM, draw_TH = parts_of_proj(dproj_TF, E, M)
    dy_TE, dnorm_weight_E, _ = gated_norm_gradients(
        dout_TE, y_TE, z_TE, norm_weight_E, None, None, 0.0, False, eps, dz_TE
    )

    x_THP, B_TN, C_TN = parts_of_convolved(xBC_TM, E, H)
    dxBC_TM = torch.empty_like(xBC_TM)
    launch = choose_launch(E // H, B_TN.shape[1], proj_TF.dtype)
    table = make_table(offsets_B1, T, launch)
    dt_HT, c_HT = decays(raw_TH, A_log_H, offsets_B1, table, launch, dt_bias_H)
    dA_log_ZH, dD_ZH, dbias_ZH = partial_3ZH = dt_HT.new_empty(3, table.chunks_4Z.shape[1], H)
    sums = scan_gradients(
        dy_TE.view(x_THP.shape), None, x_THP, dt_HT, c_HT, B_TN, C_TN, D_H, offsets_B1, table,
        launch, *parts_of_convolved(dxBC_TM, E, H), dD_ZH,
    )  # fmt: skip
    decay_gradients(
        sums, dt_HT, A_log_H, offsets_B1, table, launch, draw_TH, dA_log_ZH, raw_TH, dt_bias_H,
        dbias_ZH,
    )  # fmt: skip

    dconv_weight_MK, dconv_bias_M = conv_gradients(
        dxBC_TM, conv_in_TM, conv_weight_MK, conv_bias_M, position_T, dconv_in_TM
    )
    return dproj_TF, dconv_weight_MK, dconv_bias_M, partial_3ZH.sum(1), dnorm_weight_E


@mixer_core_backward_op.register_fake
def _(
    dout_TE: Tensor, xBC_TM: Tensor, y_TE: Tensor, proj_TF: Tensor, conv_weight_MK: Tensor,
    conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor,
    offsets_B1: Tensor, position_T: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(proj_TF), torch.empty_like(conv_weight_MK), torch.empty_like(conv_bias_M),
        D_H.new_empty(3, D_H.shape[0]), torch.empty_like(norm_weight_E),
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    _, xBC_TM, y_TE = output
    ctx.mark_non_differentiable(xBC_TM, y_TE)
    ctx.set_materialize_grads(False)  # of those two, which would be filled with zeros
    ctx.save_for_backward(xBC_TM, y_TE, *tensors)


def _backward(ctx, dout_TE, _dxBC_TM, _dy_TE):
    if dout_TE is None:
        return (None,) * 10
    dproj_TF, dconv_weight_MK, dconv_bias_M, d_3H, dnorm_weight_E = mixer_core_backward_op(
        dout_TE, *ctx.saved_tensors, ctx.eps
    )
    dA_log_H, dD_H, ddt_bias_H = d_3H.unbind(0)
    return (
        dproj_TF, dconv_weight_MK, dconv_bias_M, ddt_bias_H, dA_log_H, dD_H, dnorm_weight_E, None,
        None, None,
    )  # fmt: skip


mixer_core_op.register_autograd(_backward, setup_context=_setup_context)


def mixer_core_triton(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    eps: float,
) -> Tensor:  # fmt: skip
    """out_TE of the formulas above, in the dtype of proj; differentiable to all floats, once.

    Args:
        proj_TF: bf16 or fp32; P = E / H and N in {16, 32, 64, 128}, E up to 8,192.
        conv_weight_MK, conv_bias_M: any float dtype, K up to 4. The other parameters: fp32.
        offsets_B1: int64 sequence starts and the end of the last; padding may follow, where out
            and the gradient of proj are 0.
        position_T: int64, each token's place in its own sequence, or in the padding.

    Raises:
        ValueError: a shape or dtype that the kernels do not have.
    """
    (T, F), (M, K) = proj_TF.shape, conv_weight_MK.shape
    E, H = len(norm_weight_E), len(D_H)
    P, N = E // H, (M - E) // 2
    if P not in SIZES or N not in SIZES or K not in KERNEL_TAPS or E > MAX_WIDTH:
        raise ValueError(
            f"head dims and state sizes are {SIZES}, taps {KERNEL_TAPS} and inner widths up to "
            f"{MAX_WIDTH}, not P={P}, N={N}, K={K}, E={E}"
        )
    shapes = [t.shape for t in (conv_bias_M, dt_bias_H, A_log_H, position_T)]
    if F != E + M + H or E != H * P or M != E + 2 * N or shapes != [(M,), (H,), (H,), (T,)]:
        raise ValueError(
            f"proj {(T, F)} does not fit E={E}, M={M}, H={H} and the shapes "
            f"{[tuple(shape) for shape in shapes]} of conv_bias, dt_bias, A_log and positions"
        )
    parameters = {t.dtype for t in (dt_bias_H, A_log_H, D_H, norm_weight_E)}
    if proj_TF.dtype not in DTYPES or parameters != {torch.float32}:
        raise ValueError(
            f"proj must be one of {DTYPES} and the parameters behind the convolution fp32, not "
            f"{proj_TF.dtype}, {parameters}"
        )
    for name, index in {"offsets": offsets_B1, "positions": position_T}.items():
        if index.dtype != torch.int64 or not index.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64, not {index.dtype}")
    return mixer_core_op(
        proj_TF.contiguous(), conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, norm_weight_E,
        offsets_B1, position_T, eps,
    )[0]  # fmt: skip
