"""Attention as a peer: an encoder of equal width and depth, with our own feed-forward and norms.

Histories of one length are the easiest for it: they need neither padding nor bookkeeping. There it
runs in both of its forms, over a batch of rows and over packed histories (varlen), and the faster
one counts. Histories whose lengths differ, as those of users do, it takes packed. On CUDA both are
flash attention.

Legend: T tokens, B sequences of L tokens, A attention heads of G channels, D width.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.encoder import NORM_EPS, FeedForward
from modules.fused import input_norm, residual_norm
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import filling_lengths, offsets_of
from tools.benchmarks.passes import encoder_pass, new_encoder
from trainer.config import ModelConfig

HEADS = 4
LENGTHS = (50, 200, 1_024, 4_096, 16_384)
MEANS = (50, 200, 1_024, 4_096)
LIMIT = 1e-2  # ‖one form - the other‖ / ‖the other‖, bf16
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v and the answer, [T, A, G]


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 8_192, 1_024)
    packs = bench.on_gpu and bench.precision == "bf16"  # what flash attention has
    equal = {one: np.full(tokens // one, one) for one in LENGTHS if one <= tokens}
    compare(bench, equal, "length", [False, True] if packs else [False])
    if packs:
        mixed = {one: filling_lengths(tokens, one, seed=1) for one in MEANS}
        compare(bench, mixed, "mean length", [True])
        with bench.case("equal outputs of attention's forms"):
            require_equal(bench)


def compare(bench: Bench, batches: dict[int, np.ndarray], called: str, forms: list[bool]) -> None:
    """Time ours and attention on each batch of lengths; forms: whether attention is packed."""
    model = bench.model(kind="causal")
    ours = new_encoder(model, bench.device)
    ratios: dict[int, float] = {}
    for number, lengths in batches.items():
        name = f"causal, {called} {number:,}"
        with bench.case(name):
            offsets_B1, tokens = offsets_of(lengths, bench.device), int(lengths.sum())
            encoders: dict[str, nn.Module] = {"ours": ours}
            for packed in forms:
                longest = int(lengths.max()) if packed else None
                by = "attention, packed" if packed else "attention"
                encoders[by] = new_attention(model, bench.device, longest)
            milliseconds = {
                by: bench.record(
                    f"{name}: fwd+bwd",
                    encoder_pass(bench, encoder, tokens, offsets_B1),
                    by=by,
                    work=tokens,
                    graph=True,
                ).median_ms
                for by, encoder in encoders.items()
            }
            mine = milliseconds.pop("ours")
            ratios[number] = min(milliseconds.values()) / mine
            bench.find(f"{called} {number:,}: ours is {ratios[number]:.2f} times")
    crossed = crossings(list(ratios), list(ratios.values()))
    bench.find(describe(crossed, list(ratios.values()), called))


def require_equal(bench: Bench) -> None:
    """Raises ValueError where packed attention is not that over rows."""
    model = bench.model(kind="causal", dropout=0.0)
    offsets_B1 = offsets_of(np.full(16, 300), bench.device)
    x_TD = torch.randn(16 * 300, model.width, device=bench.device)
    with torch.no_grad(), bench.autocast("bf16"):
        packed, rows = (
            new_attention(model, bench.device, longest)(x_TD, offsets_B1).double()
            for longest in (300, None)
        )
    error = float((packed - rows).norm() / rows.norm())
    if not error <= LIMIT:
        raise ValueError(f"packed attention differs by {error:.1e} from attention over rows")


def crossings(lengths: list[int], ratios: list[float]) -> list[float]:
    """Lengths at which a ratio passes 1, interpolated on logarithmic axes."""
    found = []
    for i in range(len(lengths) - 1):
        a, b = np.log(ratios[i]), np.log(ratios[i + 1])
        if (a < 0) != (b < 0):
            start, end = np.log(lengths[i]), np.log(lengths[i + 1])
            found.append(float(np.exp(start + (end - start) * a / (a - b))))
    return found


def describe(crossed: list[float], ratios: list[float], called: str) -> str:
    if crossed:
        places = ", ".join(f"{one:,.0f}" for one in crossed)
        return f"ours and attention are level at {called} {places}"
    if not ratios:
        return "nothing was measured"
    where = "ahead of" if ratios[0] >= 1 else "behind"
    return f"ours is {where} attention at every {called} measured"


def over_rows(length: int) -> Attend:
    """Causal attention over histories of one length."""

    def attend(*qkv_TAG: Tensor) -> Tensor:
        q, k, v = (one.unflatten(0, (-1, length)).transpose(1, 2) for one in qkv_TAG)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed.transpose(1, 2).flatten(0, 1)

    return attend


def over_packed(offsets_B1: Tensor, longest: int) -> Attend:
    """Causal attention over packed histories of any lengths; for a GPU, bf16."""
    from torch.nn.attention.varlen import varlen_attn  # torch from 2.10 on

    starts_B1 = offsets_B1.int()
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "is_causal" in inspect.signature(varlen_attn).parameters:  # as it was at first
        options = {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = varlen_attn(q, k, v, starts_B1, starts_B1, longest, longest, **options)
        assert isinstance(mixed, Tensor)
        return mixed

    return attend


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

    def forward(self, x_TD: Tensor, attend: Attend) -> Tensor:
        qkv_T3AG = self.qkv(x_TD).unflatten(1, (3, self.heads, -1))
        mixed_TD = attend(*qkv_T3AG.unbind(1)).flatten(1)
        H_TD = self._norm(self.norm1, self.out(mixed_TD), x_TD)
        product_TD, H_TD = self.feed_forward(H_TD)
        return self._norm(self.norm2, product_TD, H_TD, self.feed_forward.w2.bias)

    def _norm(
        self, norm: nn.LayerNorm, y_TD: Tensor, x_TD: Tensor, y_bias_D: Tensor | None = None
    ) -> Tensor:
        rate, dtype = self.dropout if self.training else 0.0, x_TD.dtype
        return residual_norm(y_TD, x_TD, norm.weight, norm.bias, norm.eps, rate, dtype, y_bias_D)


class AttentionEncoder(nn.Module):
    """A stack of layers: takes offsets as `Encoder` does.

    longest: of histories that are to be packed; None for histories of one length.
    """

    def __init__(self, width: int, layers: int, dropout: float, longest: int | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AttentionLayer(width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout, self.longest = dropout, longest

    def forward(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        read_positions_S: Tensor | None = None,
        read_last: bool = False,
    ) -> Tensor:
        assert read_positions_S is None
        dtype, device = x_TD.dtype, x_TD.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        rate, norm = self.dropout if self.training else 0.0, self.norm
        x_TD = input_norm(x_TD, norm.weight, norm.bias, norm.eps, rate, kind)
        flash = x_TD.is_cuda and x_TD.dtype != torch.float32
        choice = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if flash else contextlib.nullcontext()
        attend = over_rows(x_TD.shape[0] // (len(offsets_B1) - 1))
        if self.longest is not None:
            attend = over_packed(offsets_B1, self.longest)
        with choice:
            for layer in self.layers:
                x_TD = layer(x_TD, attend)
        return x_TD.to(dtype)


def new_attention(
    model: ModelConfig, device: torch.device, longest: int | None = None
) -> AttentionEncoder:
    torch.manual_seed(1)
    with torch.device(device):
        return AttentionEncoder(model.width, model.layers, model.dropout, longest)
