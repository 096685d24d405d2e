"""The middle of the Mamba-2 block, from in_proj's output to out_proj's input, as one operation.

    [z, x, B, C, dt] = proj;  (x, B, C) = SiLU(conv(x, B, C));  dt = softplus(dt + dt_bias)
    out = RMSNorm(ssd(x, dt, -exp(A_log), B, C, D) * SiLU(z)) * norm_weight

in one direction, or summed over both as `gated_norm` says. A second operation gives ssd(...) alone,
at the last token of each sequence alone, from a proj without z: what a read-out there needs of all
tokens.

The kernels are those of `conv`, `ssd`, `ssd_last` and `gated_norm`. As one node of autograd they
read slices of proj in place and their backward passes write into slices of one dproj: split
operations would each cost a gradient that a concatenation copies, at long batches as much as the
convolution. Softplus and the exponential are made where dt is read. The reversed direction walks
the same rows from their end, and adds its gradients: no row is ever put in another order.

For the backward they keep proj and what the convolution and the scan gave, of each direction: its
outputs and its chunks' states.

Shape suffixes: T tokens, B sequences, E = H P inner channels, H heads, N state, M = E + 2N columns
convolved, K taps, F = E + M + H columns of proj, G = M + H those without z, Z chunks.
"""

import torch
from torch import Tensor

from modules.fused import whole_rows
from modules.kernels.conv import KERNEL_TAPS, conv_gradients, convolve
from modules.kernels.gated_norm import MAX_WIDTH, gated_norm_gradients, gated_norm_op
from modules.kernels.partial_sums import partial_sums
from modules.kernels.ssd import (
    DTYPES,
    SIZES,
    choose_launch,
    chunk_slots,
    decay_gradients,
    decays,
    make_table,
    rows,
    scan,
    scan_gradients,
)
from modules.kernels.ssd_last import last_gradients, last_outputs


def parts_of_proj(proj_TF: Tensor, E: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, the convolution's input and dt: views."""
    return proj_TF[:, :E], proj_TF[:, E : E + M], proj_TF[:, E + M :]


def gradient_rows(proj: Tensor) -> Tensor:
    """Room for the gradient of proj, whose rows begin at whole sectors of memory, 32 bytes.

    On an H100, at 1,160 columns and 262,144 tokens, the convolution's gradients then take 0.40 ms
    in place of 0.45 (0.43 at 64 bytes, which suit proj), and the product that makes those of
    in_proj's weight 0.27 in place of 0.31.
    """
    tokens, columns = proj.shape
    return proj.new_empty(tokens, whole_rows(columns, proj.dtype, 32))[:, :columns]


def parts_of_convolved(xBC_TM: Tensor, E: int, H: int) -> tuple[Tensor, Tensor, Tensor]:
    """x by heads, B and C: views."""
    N = (xBC_TM.shape[1] - E) // 2
    return xBC_TM[:, :E].unflatten(1, (H, E // H)), xBC_TM[:, E : E + N], xBC_TM[:, E + N :]


def places_of_walks(position_T: Tensor, mirror_T: Tensor | None) -> list[Tensor]:
    """Of each direction the tokens' places in their sequences, in the order of its walk."""
    if mirror_T is None:
        return [position_T]
    return [position_T, position_T.index_select(0, mirror_T.flip(0))]


class Scans:
    """Convolution and scan of a batch in each direction; `last`: the scan's last outputs alone."""

    def __init__(
        self, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor,
        D_H: Tensor, offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, E: int,
        dtype: torch.dtype, *, last: bool,
    ) -> None:  # fmt: skip
        self.conv = (conv_weight_MK, conv_bias_M)
        self.dt_bias_H, self.A_log_H, self.D_H, self.E, self.last = dt_bias_H, A_log_H, D_H, E, last
        H, T = len(D_H), len(position_T)
        self.places = places_of_walks(position_T, mirror_T)
        self.launch = choose_launch(E // H, (len(conv_bias_M) - E) // 2, dtype)
        self.batch = (offsets_B1, make_table(offsets_B1, T, self.launch), self.launch)

    def outputs(self, conv_in_TM: Tensor, raw_TH: Tensor) -> list[Tensor]:
        """For each direction the outputs of convolution and scan, [T, M] and [T or B, E].

        Unless `last`, behind them the states of the scan's chunks.
        """
        kept = []
        for mirror, place_T in enumerate(self.places):
            xBC_TM = convolve(conv_in_TM, *self.conv, place_T, mirror == 1)
            dt_HT, c_HT = decays(raw_TH, self.A_log_H, *self.batch, self.dt_bias_H, mirror == 1)
            x_THP, B_TN, C_TN = parts_of_convolved(xBC_TM, self.E, len(self.D_H))
            inputs = (x_THP, dt_HT, c_HT, B_TN, C_TN, self.D_H, *self.batch)
            if self.last:
                kept += [xBC_TM, last_outputs(*inputs, mirror=mirror == 1)]
            else:
                y_THP, state_SHNP = scan(*inputs, mirror=mirror == 1)
                kept += [xBC_TM, y_THP.flatten(1), state_SHNP]
        return kept

    def gradients(
        self, dys: list[Tensor], xBCs: list[Tensor], states: list[Tensor], conv_in_TM: Tensor,
        raw_TH: Tensor, dconv_in_TM: Tensor, draw_TH: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Writes dconv_in and draw; gradients of conv_weight, conv_bias, (A_log, D, dt_bias).

        The second direction adds to what the first one wrote. states: none for `last`.
        """
        H, of_conv = len(self.D_H), []
        chunks = self.batch[1].chunks_4Z.shape[1]
        partial_3VZH = raw_TH.new_empty(3, len(dys), chunks, H, dtype=torch.float32)
        for mirror, (place_T, dy, xBC_TM) in enumerate(zip(self.places, dys, xBCs, strict=True)):
            dA_log_ZH, dD_ZH, dbias_ZH = partial_3VZH[:, mirror]
            dt_HT, c_HT = decays(raw_TH, self.A_log_H, *self.batch, self.dt_bias_H, mirror == 1)
            x_THP, B_TN, C_TN = parts_of_convolved(xBC_TM, self.E, H)
            dxBC_TM = torch.empty_like(xBC_TM)
            dy = dy.contiguous().unflatten(1, (H, self.E // H))
            rest = (
                x_THP, dt_HT, c_HT, B_TN, C_TN, self.D_H, *self.batch,
                *parts_of_convolved(dxBC_TM, self.E, H), dD_ZH,
            )  # fmt: skip
            if self.last:
                sums = last_gradients(dy, *rest, mirror=mirror == 1)
            else:
                sums = scan_gradients(dy, states[mirror], *rest, mirror=mirror == 1)
            decay_gradients(
                sums, dt_HT, self.A_log_H, *self.batch, draw_TH, dA_log_ZH, raw_TH,
                self.dt_bias_H, dbias_ZH, mirror=mirror == 1, add=mirror == 1,
            )  # fmt: skip
            of_conv.append(
                conv_gradients(
                    dxBC_TM, conv_in_TM, *self.conv, place_T, dconv_in_TM, mirror=mirror == 1,
                    add=mirror == 1,
                )
            )  # fmt: skip
        dconv_weight_MK, dconv_bias_M = of_conv[0]
        for dweight_MK, dbias_M in of_conv[1:]:
            dconv_weight_MK, dconv_bias_M = dconv_weight_MK + dweight_MK, dconv_bias_M + dbias_M
        return dconv_weight_MK, dconv_bias_M, partial_sums(partial_3VZH.flatten(1, 2))


@torch.library.custom_op("ssd4rec::mixer_core", mutates_args=())
def mixer_core_op(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    mirror_T: Tensor | None, beta: float, restore: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out_TE, and for the backward what `Scans.outputs` gives of each direction.

    Without `mirror_T` the last three are empty.
    """
    (T, _), E, M = proj_TF.shape, len(norm_weight_E), len(conv_bias_M)
    if T == 0:
        return _empty_core(proj_TF, E, M, len(D_H), mirror_T)
    z_TE, conv_in_TM, raw_TH = parts_of_proj(proj_TF, E, M)
    scans = Scans(
        conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, offsets_B1, position_T, mirror_T, E,
        proj_TF.dtype, last=False,
    )  # fmt: skip
    kept = scans.outputs(conv_in_TM, raw_TH)
    r_TE = None if mirror_T is None else kept[4]
    out_TE = gated_norm_op(kept[1], z_TE, norm_weight_E, r_TE, mirror_T, beta, restore, eps)
    absent = [proj_TF.new_empty(0) for _ in range(6 - len(kept))]
    xBC_TM, y_TE, state_SHNP, mirrored_TM, r_TE, mirrored_SHNP = *kept, *absent
    return out_TE, xBC_TM, y_TE, state_SHNP, mirrored_TM, r_TE, mirrored_SHNP


def _empty_core(
    proj_TF: Tensor, E: int, M: int, H: int, mirror_T: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Tensors like those that `mixer_core_op` returns."""
    T, N, P, empty = proj_TF.shape[0], (M - E) // 2, E // H, proj_TF.new_empty
    state = (chunk_slots(T, choose_launch(P, N, proj_TF.dtype)), H, N, P)
    second = [(0,), (0,), (0,)] if mirror_T is None else [(T, M), (T, E), state]
    return (
        empty(T, E), empty(T, M), empty(T, E), empty(state), empty(second[0]), empty(second[1]),
        empty(second[2]),
    )  # fmt: skip


@mixer_core_op.register_fake
def _(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    mirror_T: Tensor | None, beta: float, restore: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    E, M, H = norm_weight_E.shape[0], conv_bias_M.shape[0], D_H.shape[0]
    return _empty_core(proj_TF, E, M, H, mirror_T)


@torch.library.custom_op("ssd4rec::mixer_core_backward", mutates_args=())
def mixer_core_backward_op(
    dout_TE: Tensor, kept: list[Tensor], proj_TF: Tensor, conv_weight_MK: Tensor,
    conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor,
    offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, beta: float, restore: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to proj, conv_weight, conv_bias, (A_log, D, dt_bias) as rows, norm_weight.

    kept: what `Scans.outputs` gave.
    """
    T, E, M = len(proj_TF), len(norm_weight_E), len(conv_bias_M)
    dproj_TF = gradient_rows(proj_TF)
    if T == 0:
        zeros = [torch.zeros_like(t) for t in (conv_weight_MK, conv_bias_M, norm_weight_E)]
        return dproj_TF, zeros[0], zeros[1], D_H.new_zeros(3, len(D_H)), zeros[2]
    z_TE, conv_in_TM, raw_TH = parts_of_proj(proj_TF, E, M)
    dz_TE, dconv_in_TM, draw_TH = parts_of_proj(dproj_TF, E, M)
    xBCs, ys, states = kept[0::3], kept[1::3], kept[2::3]
    both = mirror_T is not None
    dy_TE, dnorm_weight_E, dr_TE = gated_norm_gradients(
        dout_TE, ys[0], z_TE, norm_weight_E, ys[1] if both else None, mirror_T, beta, restore, eps,
        dz_TE,
    )  # fmt: skip
    scans = Scans(
        conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, offsets_B1, position_T, mirror_T, E,
        proj_TF.dtype, last=False,
    )  # fmt: skip
    dconv_weight_MK, dconv_bias_M, d_3H = scans.gradients(
        [dy_TE, dr_TE] if both else [dy_TE], xBCs, states, conv_in_TM, raw_TH, dconv_in_TM, draw_TH
    )
    return dproj_TF, dconv_weight_MK, dconv_bias_M, d_3H, dnorm_weight_E


@mixer_core_backward_op.register_fake
def _(
    dout_TE: Tensor, kept: list[Tensor], proj_TF: Tensor, conv_weight_MK: Tensor,
    conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor,
    offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, beta: float, restore: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        gradient_rows(proj_TF), torch.empty_like(conv_weight_MK), torch.empty_like(conv_bias_M),
        D_H.new_empty(3, D_H.shape[0]), torch.empty_like(norm_weight_E),
    )  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.beta, ctx.restore, ctx.eps = inputs
    kept = output[1:]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # of those, which would be filled with zeros
    ctx.save_for_backward(*kept, *tensors)


def _backward(ctx, dout_TE, *_):
    if dout_TE is None:
        return (None,) * 13
    saved = ctx.saved_tensors  # once: torch.utils.checkpoint gives them no second time
    kept, tensors = saved[:6], saved[6:]
    if tensors[-1] is None:  # one direction
        kept = kept[:3]
    dproj_TF, dconv_weight_MK, dconv_bias_M, d_3H, dnorm_weight_E = mixer_core_backward_op(
        dout_TE, list(kept), *tensors, ctx.beta, ctx.restore, ctx.eps
    )
    dA_log_H, dD_H, ddt_bias_H = d_3H.unbind(0)
    return (
        dproj_TF, dconv_weight_MK, dconv_bias_M, ddt_bias_H, dA_log_H, dD_H, dnorm_weight_E,
        *[None] * 6,
    )  # fmt: skip


mixer_core_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ssd4rec::mixer_last", mutates_args=())
def mixer_last_op(
    proj_TG: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y_BE and r_BE of the last tokens, and for the backward the convolutions' outputs.

    Without `mirror_T` those of the reversed direction, r and the last, are empty.
    """
    T, E, M, B = len(proj_TG), inner, len(conv_bias_M), len(offsets_B1) - 1
    absent = [proj_TG.new_empty(0) for _ in range(2)]
    if T == 0:
        xBC_TM, y_BE, *other = (proj_TG.new_zeros(n, c) for n, c in 2 * [(0, M), (B, E)])
        mirrored_TM, r_BE = absent if mirror_T is None else other
        return y_BE, r_BE, xBC_TM, mirrored_TM
    scans = Scans(
        conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, offsets_B1, position_T, mirror_T, E,
        proj_TG.dtype, last=True,
    )  # fmt: skip
    xBC_TM, y_BE, mirrored_TM, r_BE = [*scans.outputs(proj_TG[:, :M], proj_TG[:, M:]), *absent][:4]
    return y_BE, r_BE, xBC_TM, mirrored_TM


@mixer_last_op.register_fake
def _(
    proj_TG: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    T, M, B, empty = (
        proj_TG.shape[0],
        conv_bias_M.shape[0],
        offsets_B1.shape[0] - 1,
        proj_TG.new_empty,
    )
    second = [(0,), (0,)] if mirror_T is None else [(B, inner), (T, M)]
    return empty(B, inner), empty(second[0]), empty(T, M), empty(second[1])


@torch.library.custom_op("ssd4rec::mixer_last_backward", mutates_args=())
def mixer_last_backward_op(
    dy_BE: Tensor, dr_BE: Tensor | None, xBC_TM: Tensor, mirrored_TM: Tensor, proj_TG: Tensor,
    conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor,
    offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, inner: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to proj, conv_weight, conv_bias, (A_log, D, dt_bias) as rows."""
    M, dproj_TG = len(conv_bias_M), gradient_rows(proj_TG)
    if len(proj_TG) == 0:
        zeros = [torch.zeros_like(t) for t in (conv_weight_MK, conv_bias_M)]
        return dproj_TG, zeros[0], zeros[1], D_H.new_zeros(3, len(D_H))
    scans = Scans(
        conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, offsets_B1, position_T, mirror_T,
        inner, proj_TG.dtype, last=True,
    )  # fmt: skip
    dys, xBCs = [dy_BE], [xBC_TM]
    if dr_BE is not None:
        dys, xBCs = [dy_BE, dr_BE], [xBC_TM, mirrored_TM]
    gradients = scans.gradients(
        dys, xBCs, [], proj_TG[:, :M], proj_TG[:, M:], dproj_TG[:, :M], dproj_TG[:, M:]
    )
    return dproj_TG, *gradients


@mixer_last_backward_op.register_fake
def _(
    dy_BE: Tensor, dr_BE: Tensor | None, xBC_TM: Tensor, mirrored_TM: Tensor, proj_TG: Tensor,
    conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor, A_log_H: Tensor, D_H: Tensor,
    offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, inner: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        gradient_rows(proj_TG), torch.empty_like(conv_weight_MK), torch.empty_like(conv_bias_M),
        D_H.new_empty(3, D_H.shape[0]),
    )  # fmt: skip


def _setup_last_context(ctx, inputs, output) -> None:
    *tensors, ctx.inner = inputs
    y_BE, r_BE, *kept = output
    ctx.mark_non_differentiable(*kept, *([] if tensors[-1] is not None else [r_BE]))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y_BE, *kept, *tensors)


def _last_backward(ctx, dy_BE, dr_BE, *_):
    y_BE, *tensors = ctx.saved_tensors
    if dy_BE is None and dr_BE is None:
        return (None,) * 10
    dy_BE = torch.zeros_like(y_BE) if dy_BE is None else dy_BE
    if tensors[-1] is not None and dr_BE is None:
        dr_BE = torch.zeros_like(y_BE)
    dproj_TG, dconv_weight_MK, dconv_bias_M, d_3H = mixer_last_backward_op(
        dy_BE, dr_BE, *tensors, ctx.inner
    )
    dA_log_H, dD_H, ddt_bias_H = d_3H.unbind(0)
    return (
        dproj_TG, dconv_weight_MK, dconv_bias_M, ddt_bias_H, dA_log_H, dD_H, *[None] * 4
    )  # fmt: skip


mixer_last_op.register_autograd(_last_backward, setup_context=_setup_last_context)


def check(
    proj: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, float32: dict[str, Tensor],
    offsets_B1: Tensor, position_T: Tensor, mirror_T: Tensor | None, E: int, columns: int,
) -> None:  # fmt: skip
    """Raises ValueError for a shape or dtype that the kernels do not have."""
    (T, F), (M, K), H = proj.shape, conv_weight_MK.shape, len(float32["D"])
    P, N = E // H, (M - E) // 2
    if P not in SIZES or N not in SIZES or K not in KERNEL_TAPS or E > MAX_WIDTH:
        raise ValueError(
            f"head dims and state sizes are {SIZES}, taps {KERNEL_TAPS} and inner widths up to "
            f"{MAX_WIDTH}, not P={P}, N={N}, K={K}, E={E}"
        )
    shapes = [t.shape for t in (conv_bias_M, float32["dt_bias"], float32["A_log"], position_T)]
    if columns != F or E != H * P or M != E + 2 * N or shapes != [(M,), (H,), (H,), (T,)]:
        raise ValueError(
            f"proj {(T, F)} does not fit E={E}, M={M}, H={H} and the shapes "
            f"{[tuple(shape) for shape in shapes]} of conv_bias, dt_bias, A_log and positions"
        )
    dtypes = {t.dtype for t in float32.values()}
    if proj.dtype not in DTYPES or dtypes != {torch.float32}:
        raise ValueError(
            f"proj must be one of {DTYPES} and the parameters behind the convolution fp32, not "
            f"{proj.dtype}, {dtypes}"
        )
    indices = {"offsets": offsets_B1, "positions": position_T}
    if mirror_T is not None:
        indices["mirror"] = mirror_T
    for name, index in indices.items():
        if index.dtype != torch.int64 or not index.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64, not {index.dtype}")
    if mirror_T is not None and mirror_T.shape != (T,):
        raise ValueError(f"mirror must be [{T}], not {tuple(mirror_T.shape)}")


def mixer_core_triton(
    proj_TF: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, norm_weight_E: Tensor, offsets_B1: Tensor, position_T: Tensor,
    eps: float, *, mirror_T: Tensor | None = None, beta: float = 0.0, restore: bool = False,
) -> Tensor:  # fmt: skip
    """out_TE of the formulas above, in the dtype of proj; differentiable to all floats, once.

    Args:
        proj_TF: bf16 or fp32, any stride between rows; P = E / H and N in {16, 32, 64, 128}, E up
            to 8,192.
        conv_weight_MK, conv_bias_M: any float dtype, K up to 4. The other parameters: fp32.
        offsets_B1: int64 sequence starts and the end of the last; padding may follow, where the
            scans and their gradients are 0.
        position_T: int64, each token's place in its own sequence, or in the padding.
        mirror_T: int64, the permutation that reverses each sequence, for both directions; padding
            stays in itself. beta and restore: see `gated_norm`.

    Raises:
        ValueError: a shape or dtype that the kernels do not have.
    """
    E, M, H = len(norm_weight_E), len(conv_weight_MK), len(D_H)
    float32 = {"dt_bias": dt_bias_H, "A_log": A_log_H, "D": D_H, "norm_weight": norm_weight_E}
    check(
        proj_TF, conv_weight_MK, conv_bias_M, float32, offsets_B1, position_T, mirror_T, E,
        E + M + H,
    )  # fmt: skip
    return mixer_core_op(
        rows(proj_TF), conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, norm_weight_E,
        offsets_B1, position_T, mirror_T, beta, restore, eps,
    )[0]  # fmt: skip


def mixer_last_triton(
    proj_TG: Tensor, conv_weight_MK: Tensor, conv_bias_M: Tensor, dt_bias_H: Tensor,
    A_log_H: Tensor, D_H: Tensor, offsets_B1: Tensor, position_T: Tensor, inner: int, *,
    mirror_T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan's output at each sequence's last token, y_BE, and with `mirror_T` r_BE.

    r is the reversed direction's at its own last token, the sequence's first; without `mirror_T`
    empty. Both are 0 for an empty sequence. Arguments and errors as `mixer_core_triton`; `inner`
    is E.
    """
    M, H = len(conv_weight_MK), len(D_H)
    float32 = {"dt_bias": dt_bias_H, "A_log": A_log_H, "D": D_H}
    check(
        proj_TG, conv_weight_MK, conv_bias_M, float32, offsets_B1, position_T, mirror_T, inner,
        M + H,
    )  # fmt: skip
    y_BE, r_BE, _, _ = mixer_last_op(
        rows(proj_TG), conv_weight_MK, conv_bias_M, dt_bias_H, A_log_H, D_H, offsets_B1,
        position_T, mirror_T, inner,
    )  # fmt: skip
    return y_BE, r_BE
