"""The SSD encoders: packed item embeddings in, hidden states at the read positions out.

Legend: T packed tokens, B sequences, S read positions, D model width, E = expand * D inner width,
H heads of P = E / H channels, N state size, K convolution width.

The bidirectional encoder is the paper's (arXiv 2409.01192); it trains on prefixes, one target each.
The causal one is the same with the forward direction alone: every position predicts its next item
in one pass, and a user's state can be carried forward event by event. The encoder knows nothing of
ids, TorchRec or losses, and scripts to TorchScript, where the mixer runs the PyTorch reference
instead of kernels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.ssd import (
    causal_conv,
    causal_conv_reference,
    sequence_of_tokens,
    ssd,
    ssd_reference,
)

NORM_EPS = 1e-12  # the published code's LayerNorm
GATED_NORM_EPS = 1e-5  # mamba-ssm's RMSNorm


class Mamba2Mixer(nn.Module):
    """The Mamba-2 block: project, convolve, scan, gate, normalise, project back; x [T, D].

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

    def forward(self, u_TD: Tensor, offsets_B1: Tensor, position_T: Tensor) -> Tensor:
        sizes = [self.inner, self.inner + 2 * self.state, self.heads]
        z_TE, xBC, dt_TH = torch.split(self.in_proj(u_TD), sizes, dim=-1)
        dt_TH = F.softplus(dt_TH.float() + self.dt_bias)
        A_H = -torch.exp(self.A_log)
        if torch.jit.is_scripting():
            xBC = causal_conv_reference(xBC, self.conv_weight, self.conv_bias, position_T)
        else:
            xBC = causal_conv(xBC, self.conv_weight, self.conv_bias, offsets_B1, position_T)
        x_TE, B_TN, C_TN = torch.split(xBC, [self.inner, self.state, self.state], dim=-1)
        x_THP = x_TE.unflatten(-1, (self.heads, self.head))
        if torch.jit.is_scripting():
            y_THP = ssd_reference(x_THP, dt_TH, A_H, B_TN, C_TN, self.D, offsets_B1)
        else:
            y_THP = ssd(x_THP, dt_TH, A_H, B_TN, C_TN, self.D, offsets_B1)
        return self.out_proj(self._gated_norm(y_THP.flatten(1), z_TE))

    def _gated_norm(self, y_TE: Tensor, z_TE: Tensor) -> Tensor:
        """RMSNorm(y * SiLU(z)): gate first, then normalise over E."""
        gated = y_TE.float() * F.silu(z_TE.float())
        scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + self.gated_norm_eps)
        return (gated * scale * self.norm_weight).to(y_TE.dtype)


class FeedForward(nn.Module):
    """W2 dropout(GELU(W1 x)), W1: D -> 4 D; exact GELU."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width)
        self.w2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(self.dropout(F.gelu(self.w1(x_TD))))


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
        self.dropout = nn.Dropout(dropout)
        self.bidirectional, self.beta, self.restore_order = bidirectional, beta, restore_order

    def forward(
        self, x_TD: Tensor, offsets_B1: Tensor, position_T: Tensor, reversed_T: Tensor
    ) -> Tensor:
        mixed_TD = self.mixer(x_TD, offsets_B1, position_T)
        if self.bidirectional:
            R_TD = self.mixer(x_TD[reversed_T], offsets_B1, position_T)
            if self.restore_order:
                R_TD = R_TD[reversed_T]
            mixed_TD = mixed_TD + self.beta * R_TD
        H_TD = self.dropout(self.norm1(mixed_TD + x_TD))
        return self.dropout(self.norm2(self.feed_forward(H_TD) + H_TD))


class Encoder(nn.Module):
    """A stack of layers of one kind, behind dropout and LayerNorm where `norm_embedding` is set.

    kind: "causal" | "bidirectional". `beta` and `restore_order` concern the bidirectional one.
    Linear weights start as N(0, 0.02), biases as 0.
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
    ) -> None:
        super().__init__()
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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, x_TD: Tensor, offsets_B1: Tensor, read_positions_S: Tensor | None = None
    ) -> Tensor:
        """h [S, D] at the read positions, every token when None (S = T).

        offsets_B1: int64, see `data.batch.SequenceBatch`. The output at padding tokens has no
        meaning.
        """
        position_T, reversed_T = positions(offsets_B1, x_TD.shape[0])
        x_TD = self.norm(self.dropout(x_TD))
        for layer in self.layers:
            x_TD = layer(x_TD, offsets_B1, position_T, reversed_T)
        if read_positions_S is None:
            return x_TD
        return x_TD[read_positions_S]


def positions(offsets_B1: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's place in its own sequence, and the permutation that reverses each sequence.

    Padding counts as one more sequence.
    """
    bounds = torch.cat([offsets_B1, torch.full_like(offsets_B1[:1], tokens)])
    sequence_T = sequence_of_tokens(offsets_B1, tokens)
    token_T = torch.arange(tokens, device=offsets_B1.device, dtype=offsets_B1.dtype)
    position_T = token_T - bounds[sequence_T]
    return position_T, bounds[sequence_T + 1] - 1 - position_T
