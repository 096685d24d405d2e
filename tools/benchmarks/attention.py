"""Attention as a peer: an encoder of equal width and depth, with our own feed-forward and norms.

It is given the easiest batches there are: histories of one length, so that they need neither
padding nor variable-length bookkeeping. On CUDA the attention is flash attention.

Legend: T tokens, B sequences of L tokens, A attention heads of G channels, D width.
"""

import contextlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.encoder import NORM_EPS, FeedForward
from modules.fused import input_norm, residual_norm
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import offsets_of
from tools.benchmarks.passes import encoder_pass, new_encoder
from trainer.config import ModelConfig

HEADS = 4
LENGTHS = (50, 200, 1_024, 4_096, 16_384)


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 8_192, 1_024)
    lengths = [length for length in LENGTHS if length <= tokens]
    model = bench.model(kind="causal")
    ours, theirs = new_encoder(model, bench.device), new_attention(model, bench.device)
    measured: list[tuple[int, float, float]] = []
    for length in lengths:
        name = f"causal, length {length:,}"
        with bench.case(name):
            used = tokens // length * length
            offsets_B1 = offsets_of(np.full(used // length, length), bench.device)
            mine, peer = (
                bench.record(
                    f"{name}: fwd+bwd",
                    encoder_pass(bench, encoder, used, offsets_B1),
                    by=by,
                    work=used,
                    graph=True,
                )
                for by, encoder in (("ours", ours), ("attention", theirs))
            )
            measured.append((length, mine.median_ms, peer.median_ms))
            bench.find(f"length {length:,}: ours is {peer.median_ms / mine.median_ms:.2f} times")
    ratios = [theirs_ms / ours_ms for _, ours_ms, theirs_ms in measured]
    bench.find(describe(crossings([length for length, *_ in measured], ratios), ratios))


def crossings(lengths: list[int], ratios: list[float]) -> list[float]:
    """Lengths at which a ratio passes 1, interpolated on logarithmic axes."""
    found = []
    for i in range(len(lengths) - 1):
        a, b = np.log(ratios[i]), np.log(ratios[i + 1])
        if (a < 0) != (b < 0):
            start, end = np.log(lengths[i]), np.log(lengths[i + 1])
            found.append(float(np.exp(start + (end - start) * a / (a - b))))
    return found


def describe(crossed: list[float], ratios: list[float]) -> str:
    if crossed:
        places = ", ".join(f"{one:,.0f}" for one in crossed)
        return f"ours and attention are level at history length {places}"
    if not ratios:
        return "nothing was measured"
    where = "ahead of" if ratios[0] >= 1 else "behind"
    return f"ours is {where} attention at every length measured"


class AttentionLayer(nn.Module):
    """H = dropout(LN(attention(x) + x)); out = dropout(LN(FFN(H) + H)), as our `Layer`."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = HEADS, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feed_forward = FeedForward(width, dropout)
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x_TD: Tensor, length: int) -> Tensor:
        qkv_BL3AG = self.qkv(x_TD).view(-1, length, 3, self.heads, x_TD.shape[1] // self.heads)
        q, k, v = (one.transpose(1, 2) for one in qkv_BL3AG.unbind(2))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        H_TD = self._norm(self.norm1, self.out(mixed.reshape(x_TD.shape)), x_TD)
        product_TD, H_TD = self.feed_forward(H_TD)
        return self._norm(self.norm2, product_TD, H_TD, self.feed_forward.w2.bias)

    def _norm(
        self, norm: nn.LayerNorm, y_TD: Tensor, x_TD: Tensor, y_bias_D: Tensor | None = None
    ) -> Tensor:
        rate, dtype = self.dropout if self.training else 0.0, x_TD.dtype
        return residual_norm(y_TD, x_TD, norm.weight, norm.bias, norm.eps, rate, dtype, y_bias_D)


class AttentionEncoder(nn.Module):
    """A stack of layers over equal histories: takes offsets as `Encoder` does."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = dropout

    def forward(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        read_positions_S: Tensor | None = None,
        read_last: bool = False,
    ) -> Tensor:
        assert read_positions_S is None
        length = x_TD.shape[0] // (len(offsets_B1) - 1)
        dtype, device = x_TD.dtype, x_TD.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        rate, norm = self.dropout if self.training else 0.0, self.norm
        x_TD = input_norm(x_TD, norm.weight, norm.bias, norm.eps, rate, kind)
        flash = x_TD.is_cuda and x_TD.dtype != torch.float32
        choice = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext()
        with choice:
            for layer in self.layers:
                x_TD = layer(x_TD, length)
        return x_TD.to(dtype)


def new_attention(model: ModelConfig, device: torch.device) -> AttentionEncoder:
    torch.manual_seed(1)
    with torch.device(device):
        return AttentionEncoder(model.width, model.layers, model.dropout)
