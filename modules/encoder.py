"""The SSD encoders: packed item embeddings in, hidden states at the read positions out.

Legend: T packed tokens, B sequences, S read positions, D model width, E = expand * D inner width,
H heads of P = E / H channels, N state size, K convolution width, M = E + 2N columns convolved,
F = E + M + H columns of in_proj.

The bidirectional encoder is the paper's (arXiv 2409.01192); it trains on prefixes, one target each.
The causal one is the same with the forward direction alone: every position predicts its next item
in one pass, and a user's state can be carried forward event by event. The encoder knows nothing of
ids, TorchRec or losses, and scripts to TorchScript, where references run instead of kernels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.fused import (
    at_least_fp32,
    gated_norm,
    gated_norm_both_reference,
    gelu_dropout,
    input_norm,
    permute_rows,
    project_and_read,
    project_residual,
    residual_norm,
)
from modules.ssd import (
    causal_conv,
    sequence_of_tokens,
    ssd,
    ssd_reference,
)

NORM_EPS = 1e-12  # the published code's LayerNorm
GATED_NORM_EPS = 1e-5  # mamba-ssm's RMSNorm


class Mamba2Mixer(nn.Module):
    """The Mamba-2 block: project, convolve, scan, gate, normalise, project back; u [T, D].

        [z, x, B, C, dt] = in_proj(u);  (x, B, C) = SiLU(conv(x, B, C));  dt = softplus(dt + bias)
        out = out_proj(RMSNorm(ssd(x, dt, A, B, C, D) * SiLU(z)))

    One group of B and C; projections without bias (Dao and Gu 2024, section 7).
    """

    def __init__(self, width: int, state: int, head: int, expand: int, conv: int) -> None:
        super().__init__()
        inner = expand * width
        if inner % head:
            raise ValueError(f"head size {head} does not divide the inner width {inner}")
        self.inner, self.state, self.heads, self.head = inner, state, inner // head, head
        mixed = inner + 2 * state  # what the convolution sees: x, B, C
        self.in_proj = nn.Linear(width, inner + mixed + self.heads, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(mixed, conv))
        self.conv_bias = nn.Parameter(torch.empty(mixed))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.gated_norm_eps = GATED_NORM_EPS
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Convolution as PyTorch's default; A ~ U[1, 16]; dt log-uniform in [1e-3, 0.1]."""
        bound = 1.0 / math.sqrt(self.conv_weight.shape[1])
        self.conv_weight.uniform_(-bound, bound)
        self.conv_bias.uniform_(-bound, bound)
        self.A_log.uniform_(1.0, 16.0).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(0.1)).exp_()
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def forward(
        self,
        u_TD: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        read_S: Tensor | None = None,
        read_last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """One direction; out and u, for the residual sum, [T, D], or [S, D] at the tokens `read_S`.

        Behind the scan everything is position-wise: with `read_S`, z, gate, norm and out_proj
        exist at those rows only. read_last: see `Encoder.forward`.
        """
        if read_S is None:
            proj_TF, u_TD = project_residual(u_TD, self.in_proj.weight, aligned=True)
            return self.out_proj(self.core(proj_TF, offsets_B1, position_T)), u_TD
        proj_TG, u_GSD = project_and_read(
            u_TD, self.in_proj.weight[self.inner :], read_S.unsqueeze(0)
        )
        if read_last and not torch.jit.is_scripting() and u_TD.is_cuda:
            y_SE, _ = self._last_cuda(proj_TG, offsets_B1, position_T, None)
        else:
            xBC, dt_TH = self._split_scan(proj_TG)
            y_SE = self._scan(xBC, dt_TH, offsets_B1, position_T, read_S)
        u_SD = u_GSD[0]
        y_SE = gated_norm(y_SE, self._gate(u_SD), self.norm_weight, self.gated_norm_eps)
        return self.out_proj(y_SE), u_SD

    def core(
        self,
        proj_TF: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor | None = None,
        beta: float = 0.0,
        restore_order: bool = False,
    ) -> Tensor:
        """What is between the projections, [T, E]; on CUDA one node of autograd.

        One direction, or with `reversed_T` both (see `both`).
        """
        if not torch.jit.is_scripting() and proj_TF.is_cuda:
            return self._core_cuda(
                proj_TF, offsets_B1, position_T, reversed_T, beta, restore_order
            )  # fmt: skip
        eps, weight_E = self.gated_norm_eps, self.norm_weight
        z_TE, xBC, dt_TH = self._split(proj_TF)
        y_TE = self._scan(xBC, dt_TH, offsets_B1, position_T)
        if reversed_T is None:
            return gated_norm(y_TE, z_TE, weight_E, eps)
        r_TE = self._scan_reversed(xBC, dt_TH, offsets_B1, position_T, reversed_T)
        return gated_norm_both_reference(
            y_TE, r_TE, z_TE, weight_E, eps, beta, reversed_T, restore_order
        )

    @torch.jit.unused
    def _core_cuda(
        self,
        proj_TF: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor | None,
        beta: float,
        restore_order: bool,
    ) -> Tensor:
        from modules.kernels.mixer import mixer_core_triton  # Triton is there only with a GPU

        return mixer_core_triton(
            proj_TF,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            self.norm_weight,
            offsets_B1,
            position_T,
            self.gated_norm_eps,
            mirror_T=reversed_T,
            beta=beta,
            restore=restore_order,
        )

    @torch.jit.unused
    def _last_cuda(
        self,
        proj_TG: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The scan at each sequence's last token, [B, E], and with `reversed_T` the reversed one's.

        The reversed direction's last token is the sequence's first.
        """
        from modules.kernels.mixer import mixer_last_triton

        return mixer_last_triton(
            proj_TG,
            self.conv_weight,
            self.conv_bias,
            self.dt_bias,
            self.A_log,
            self.D,
            offsets_B1,
            position_T,
            self.inner,
            mirror_T=reversed_T,
        )

    @torch.jit.unused
    def _last_both_cuda(
        self,
        proj_TG: Tensor,
        u_SD: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor,
        restore_order: bool,
    ) -> tuple[Tensor, Tensor]:
        """Both directions' scans as the last tokens read them, [S, E] each.

        Put back in order, the reversed one has read the last token alone there.
        """
        if not restore_order:
            return self._last_cuda(proj_TG, offsets_B1, position_T, reversed_T)
        y_SE, _ = self._last_cuda(proj_TG, offsets_B1, position_T, None)
        alone_SG = F.linear(u_SD, self.in_proj.weight[self.inner :])
        alone_S1 = torch.arange(len(u_SD) + 1, device=u_SD.device)
        r_SE, _ = self._last_cuda(alone_SG, alone_S1, torch.zeros_like(alone_S1[:-1]), None)
        return y_SE, r_SE

    def both(
        self,
        u_TD: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor,
        beta: float,
        restore_order: bool,
        read_S: Tensor | None = None,
        read_last: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """forward(u) + beta forward(u[reversed]), the latter put back with `restore_order`, and u.

        in_proj is position-wise and out_proj linear, so each runs once:
        out_proj(N(y, z) + beta N(r, z[reversed])), N the gated norm, r the scan of xBC[reversed].
        """
        if read_S is None:
            proj_TF, u_TD = project_residual(u_TD, self.in_proj.weight, aligned=True)
            core_TE = self.core(proj_TF, offsets_B1, position_T, reversed_T, beta, restore_order)
            return self.out_proj(core_TE), u_TD
        read_GS = read_S.unsqueeze(0)
        if not restore_order:
            read_GS = torch.stack([read_S, reversed_T.index_select(0, read_S)])
        proj_TG, u_GSD = project_and_read(u_TD, self.in_proj.weight[self.inner :], read_GS)
        if read_last and not torch.jit.is_scripting() and u_TD.is_cuda:
            y_SE, r_SE = self._last_both_cuda(
                proj_TG, u_GSD[0], offsets_B1, position_T, reversed_T, restore_order
            )
        else:
            xBC, dt_TH = self._split_scan(proj_TG)
            y_SE = self._scan(xBC, dt_TH, offsets_B1, position_T, read_S)
            r_SE = self._scan_reversed(
                xBC, dt_TH, offsets_B1, position_T, reversed_T,
                reversed_T.index_select(0, read_S) if restore_order else read_S,
            )  # fmt: skip
        z_GSE = self._gate(u_GSD)
        y_SE = gated_norm(y_SE, z_GSE[0], self.norm_weight, self.gated_norm_eps)
        r_SE = gated_norm(r_SE, z_GSE[-1], self.norm_weight, self.gated_norm_eps)
        return self.out_proj(y_SE + beta * r_SE), u_GSD[0]

    def step(
        self, u_BD: Tensor, conv_BKM: Tensor, ssm_BHPN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The forward direction one token on, for B sequences: out [B, D] and both states.

        conv_BKM: the last K - 1 inputs of the convolution, oldest first. ssm_BHPN: h of the
        recurrence in `modules.ssd`. Both are 0 in front of a sequence.
        """
        z_BE, xBC_BM, dt_BH = self._split(self.in_proj(u_BD))
        window_BKM = torch.cat([conv_BKM, xBC_BM.unsqueeze(1)], 1)
        xBC_BM = F.silu((window_BKM * self.conv_weight.t()).sum(1) + self.conv_bias)
        x_BE, B_BN, C_BN = torch.split(xBC_BM, [self.inner, self.state, self.state], dim=-1)
        x_BHP = x_BE.unflatten(-1, (self.heads, self.head))
        dt_BH = F.softplus(dt_BH + self.dt_bias)
        kept_BH = torch.exp(dt_BH * -torch.exp(self.A_log))
        added_BHPN = (dt_BH.unsqueeze(2) * x_BHP).unsqueeze(3) * B_BN[:, None, None]
        ssm_BHPN = torch.addcmul(added_BHPN, kept_BH[:, :, None, None], ssm_BHPN)
        y_BE1 = ssm_BHPN.flatten(1, 2) @ C_BN.unsqueeze(2)  # one product a sequence, not a head
        y_BHP = y_BE1.view_as(x_BHP) + self.D.unsqueeze(1) * x_BHP
        out_BD = self.out_proj(
            gated_norm(y_BHP.flatten(1), z_BE, self.norm_weight, self.gated_norm_eps)
        )
        return out_BD, window_BKM[:, 1:], ssm_BHPN

    def _split(self, proj_TF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, xBC and dt, before convolution and softplus."""
        sizes = [self.inner, self.inner + 2 * self.state, self.heads]
        z_TE, xBC, dt_TH = torch.split(proj_TF, sizes, dim=-1)
        return z_TE, xBC, dt_TH

    def _split_scan(self, proj_TG: Tensor) -> tuple[Tensor, Tensor]:
        """xBC and dt of a projection without z: what every token before a read-out must have."""
        sizes = [self.inner + 2 * self.state, self.heads]
        xBC, dt_TH = torch.split(proj_TG, sizes, dim=-1)
        return xBC, dt_TH

    def _gate(self, u: Tensor) -> Tensor:
        """z of some rows."""
        return F.linear(u, self.in_proj.weight[: self.inner])

    def _scan(
        self,
        xBC: Tensor,
        dt_TH: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        read_S: Tensor | None = None,
    ) -> Tensor:
        """Convolution and SSD of projected rows, y [T, E], or [S, E] at the tokens `read_S`."""
        dt_TH = F.softplus(at_least_fp32(dt_TH) + self.dt_bias)
        A_H = -torch.exp(self.A_log)
        xBC = causal_conv(xBC, self.conv_weight, self.conv_bias, position_T)
        x_TE, B_TN, C_TN = torch.split(xBC, [self.inner, self.state, self.state], dim=-1)
        x_THP = x_TE.unflatten(-1, (self.heads, self.head))
        if torch.jit.is_scripting():
            y_THP = ssd_reference(x_THP, dt_TH, A_H, B_TN, C_TN, self.D, offsets_B1, read_S)
        else:
            y_THP = ssd(x_THP, dt_TH, A_H, B_TN, C_TN, self.D, offsets_B1, read_S)
        return y_THP.flatten(1)

    def _scan_reversed(
        self,
        xBC: Tensor,
        dt_TH: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor,
        read_S: Tensor | None = None,
    ) -> Tensor:
        """`_scan` of the reversed sequences."""
        xBC, dt_TH = permute_rows(xBC, reversed_T), permute_rows(dt_TH, reversed_T)
        return self._scan(xBC, dt_TH, offsets_B1, position_T, read_S)


class FeedForward(nn.Module):
    """W2 dropout(GELU(W1 x)), W1: D -> 4 D; exact GELU.

    Answers with x for the residual sum. The bias of W2 is left to `residual_norm`, which adds it in
    its own pass.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width)
        self.w2 = nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        rate = self.dropout if self.training else 0.0
        inner_TF, x_TD = project_residual(x_TD, self.w1.weight)
        inner_TF = gelu_dropout(inner_TF, self.w1.bias, rate)
        return F.linear(inner_TF, self.w2.weight), x_TD


class Layer(nn.Module):
    """The paper's layer, in both directions or forward alone.

        F = SSD(x);  R = SSD(reverse(x)) if bidirectional, else 0
        H = dropout(LN(F + beta R + x));  out = dropout(LN(FFN(H) + H))

    `reverse` reverses each sequence in place, and one mixer serves both directions. As in the
    published code R is not put back in order before it is added: at a sequence's last position R
    has read the whole history and ends at its oldest item. `restore_order` puts it back, which
    leaves R only the last item there.
    """

    def __init__(
        self,
        mixer: Mamba2Mixer,
        feed_forward: FeedForward,
        width: int,
        dropout: float,
        bidirectional: bool,
        beta: float,
        restore_order: bool,
    ) -> None:
        super().__init__()
        self.mixer, self.feed_forward = mixer, feed_forward
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = dropout
        self.bidirectional, self.beta, self.restore_order = bidirectional, beta, restore_order

    def forward(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        position_T: Tensor,
        reversed_T: Tensor,
        read_S: Tensor | None = None,
        read_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """out [T, D], or [S, D] at the tokens `read_S`; in `dtype`, by default that of x.

        Only the scans need every token: with `read_S` the rest is done at those rows alone.
        read_last: see `Encoder.forward`.
        """
        if self.bidirectional:
            mixed_TD, x_TD = self.mixer.both(
                x_TD,
                offsets_B1,
                position_T,
                reversed_T,
                self.beta,
                self.restore_order,
                read_S,
                read_last,
            )
        else:
            mixed_TD, x_TD = self.mixer(x_TD, offsets_B1, position_T, read_S, read_last)
        return self._behind_mixer(mixed_TD, x_TD, x_TD.dtype if dtype is None else dtype)

    def step(
        self, x_BD: Tensor, conv_BKM: Tensor, ssm_BHPN: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`Mamba2Mixer.step` with the rest of the layer, which has no memory."""
        mixed_BD, conv_BKM, ssm_BHPN = self.mixer.step(x_BD, conv_BKM, ssm_BHPN)
        return self._behind_mixer(mixed_BD, x_BD, x_BD.dtype), conv_BKM, ssm_BHPN

    def _behind_mixer(self, mixed_TD: Tensor, x_TD: Tensor, dtype: torch.dtype) -> Tensor:
        rate = self.dropout if self.training else 0.0
        H_TD = residual_norm(
            mixed_TD, x_TD, self.norm1.weight, self.norm1.bias, self.norm1.eps, rate, x_TD.dtype
        )
        product_TD, H_TD = self.feed_forward(H_TD)
        return residual_norm(
            product_TD,
            H_TD,
            self.norm2.weight,
            self.norm2.bias,
            self.norm2.eps,
            rate,
            dtype,
            self.feed_forward.w2.bias,
        )


class Encoder(nn.Module):
    """A stack of layers of one kind, behind dropout and LayerNorm where `norm_embedding` is set.

    kind: "causal" | "bidirectional". `beta` and `restore_order` concern the bidirectional one.
    `repeats`: items that a history holds get one more number in their scores (`repeat_score`).
    Linear weights start as N(0, 0.02), biases as 0.

    The residual stream, what runs from one LayerNorm to the next, has the dtype of the products:
    that of autocast where it is on, else that of the input. The norms compute in fp32 and round
    once. Every projection rounds its input to that dtype anyway, and post-norm re-normalises the
    stream at each sublayer, so its rounding does not pile up; it halves the bytes of the norms and
    spares a cast in front of each product.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        layers: int,
        state: int,
        head: int,
        expand: int,
        conv: int,
        dropout: float,
        norm_embedding: bool,
        beta: float = 0.1,
        restore_order: bool = False,
        repeats: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"an encoder has at least 1 layer, not {layers}")
        self.norm = nn.LayerNorm(width, eps=NORM_EPS) if norm_embedding else nn.Identity()
        self.dropout = nn.Dropout(dropout if norm_embedding else 0.0)
        self.layers = nn.ModuleList(
            Layer(
                Mamba2Mixer(width, state, head, expand, conv),
                FeedForward(width, dropout),
                width,
                dropout,
                kind == "bidirectional",
                beta,
                restore_order,
            )
            for _ in range(layers)
        )
        self.repeats = repeats
        self.repeat = nn.Linear(width, 1) if repeats else nn.Identity()
        self.causal, self.width = kind == "causal", width
        inner = expand * width
        self.conv_sizes = [conv - 1, inner + 2 * state]
        self.ssm_sizes = [inner // head, head, state]
        self.state_numbers = layers * (math.prod(self.conv_sizes) + math.prod(self.ssm_sizes))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        read_positions_S: Tensor | None = None,
        read_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """h [S, D] at the read positions, every token when None (S = T); in `dtype`, or that of x.

        offsets_B1: int64, see `data.batch.SequenceBatch`. The output at padding tokens has no
        meaning. read_positions_S: any tokens, in any order, repeated or not.
        read_last: promises that S = B and that each position is its own sequence's last token. Then
        the kernels compute nothing else of the last layer's scans. A position of an empty sequence
        may be any token; its output has no meaning and its gradient must be 0.
        """
        position_T, reversed_T = positions(offsets_B1, x_TD.shape[0])
        if dtype is None:
            dtype = x_TD.dtype
        x_TD = self.norm(self.dropout(x_TD)) if torch.jit.is_scripting() else self._stream(x_TD)
        for number, layer in enumerate(self.layers):
            if number < len(self.layers) - 1:
                x_TD = layer(x_TD, offsets_B1, position_T, reversed_T)
            else:
                x_TD = layer(
                    x_TD, offsets_B1, position_T, reversed_T, read_positions_S, read_last, dtype
                )
        return x_TD

    @torch.jit.export
    def repeat_score(self, h_SD: Tensor) -> Tensor:
        """What an item that the history holds already scores more than h . row, fp32 [S].

        Only with `repeats`. Under autocast the product is rounded to its dtype, half a percent.
        """
        return self.repeat(h_SD).squeeze(1).float()

    @torch.jit.export
    def step(self, x_BD: Tensor, state_BF: Tensor) -> tuple[Tensor, Tensor]:
        """One event on, for B sequences: (h [B, D] as `forward` reads it there, the next state).

        state_BF: fp32, F = state_numbers, each layer's convolution inputs [K - 1, E + 2N] and
        recurrent state [H, P, N] one behind the other; 0 in front of a sequence. The cost does not
        depend on the events before. For the causal encoder without dropout or autocast.
        """
        if not self.causal:
            raise RuntimeError("a bidirectional encoder reads whole histories and has no state")
        x_BD = self.norm(x_BD)
        conv_numbers = self.conv_sizes[0] * self.conv_sizes[1]
        numbers = state_BF.shape[1] // len(self.layers)
        states: list[Tensor] = []
        for number, layer in enumerate(self.layers):
            of_layer = state_BF[:, number * numbers : (number + 1) * numbers]
            conv_BKM = of_layer[:, :conv_numbers].unflatten(1, self.conv_sizes)
            ssm_BHPN = of_layer[:, conv_numbers:].unflatten(1, self.ssm_sizes)
            x_BD, conv_BKM, ssm_BHPN = layer.step(x_BD, conv_BKM, ssm_BHPN)  # type: ignore[operator]
            states += [conv_BKM.flatten(1), ssm_BHPN.flatten(1)]
        return x_BD, torch.cat(states, 1)

    @torch.jit.unused
    def _stream(self, x_TD: Tensor) -> Tensor:
        """The input in the residual stream's dtype, behind dropout and LayerNorm if there are."""
        dtype = x_TD.dtype
        if torch.is_autocast_enabled(x_TD.device.type):
            dtype = torch.get_autocast_dtype(x_TD.device.type)
        if isinstance(self.norm, nn.Identity):
            return x_TD.to(dtype)
        rate = self.dropout.p if self.training else 0.0
        return input_norm(x_TD, self.norm.weight, self.norm.bias, self.norm.eps, rate, dtype)


def positions(offsets_B1: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's place in its own sequence, and the permutation that reverses each sequence.

    Padding counts as one more sequence.
    """
    bounds = torch.cat([offsets_B1, torch.full_like(offsets_B1[:1], tokens)])
    sequence_T = sequence_of_tokens(offsets_B1, tokens)
    token_T = torch.arange(tokens, device=offsets_B1.device, dtype=offsets_B1.dtype)
    position_T = token_T - bounds[sequence_T]
    return position_T, bounds[sequence_T + 1] - 1 - position_T
