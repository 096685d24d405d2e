"""The published composition of the encoder, as a peer: two mixer calls a layer, every position
through everything, the last position read at the end (arXiv 2409.01192 and its code).

It runs on our encoder's own weights, so its outputs and gradients must be ours. Where mamba-ssm and
causal-conv1d are installed the mixer is `mamba_split_conv1d_scan_combined`, as in the published
code; `plain` is the same in PyTorch's operations around our `ssd`. Both get a vectorised reversal,
where the published code has a Python loop over the sequences.

Legend: T tokens, B sequences, S read positions, D width, E inner width, H heads of P channels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.encoder import Encoder, FeedForward, Layer, Mamba2Mixer, positions
from modules.ssd import causal_conv_reference, ssd
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import offsets_of, prefix_lengths
from tools.benchmarks.layer import PUBLISHED_HEAD
from tools.benchmarks.mamba import mamba_mixer
from tools.benchmarks.passes import encoder_pass, new_encoder

Mixer = Callable[[Mamba2Mixer, Tensor, Tensor, Tensor], Tensor]
# ‖ours - theirs‖ / ‖theirs‖ in fp32. mamba-ssm multiplies fp32 in tf32, which rounds at 3e-4.
LIMITS = {"plain": 2e-5, "mamba-ssm": 5e-3}


def run(bench: Bench) -> None:
    prefixes = bench.size(1_024, 24, 6)
    longest = bench.size(2_277, 500, 100)
    lengths = prefix_lengths(prefixes, seed=1, longest=longest)
    offsets_B1 = offsets_of(lengths, bench.device)
    tokens, last_S = int(lengths.sum()), offsets_B1[1:] - 1
    model = bench.model(kind="bidirectional", head=PUBLISHED_HEAD)
    encoder = new_encoder(model, bench.device)
    mixers: dict[str, Mixer] = {"plain": plain_mixer}
    if bench.mamba and bench.on_gpu:
        mixers["mamba-ssm"] = mamba_mixer
    kinds = ["fp32", "tf32"] if bench.on_gpu else ["fp32"]
    for precision in dict.fromkeys([*kinds, bench.precision]):
        name = f"{prefixes:,} prefixes, {precision}"
        with bench.case(name):
            step = encoder_pass(bench, encoder, tokens, offsets_B1, last_S, precision)
            ours = bench.record(name, step, work=prefixes, unit="smp", graph=True)
            for by, mixer in mixers.items():
                with bench.case(f"{name} [{by}]", peer=True):
                    peer = Published(encoder, mixer)
                    step = encoder_pass(
                        bench, peer, tokens, offsets_B1, last_S, precision,
                        list(encoder.parameters()),
                    )  # fmt: skip
                    row = bench.record(
                        name, step, by=f"published, {by}", work=prefixes, unit="smp", graph=True
                    )
                    bench.find(
                        f"{precision}: ours is {row.median_ms / ours.median_ms:.1f} times the "
                        f"published composition ({by}) in samples/s"
                    )
    for by, mixer in mixers.items():
        with bench.case(f"equal outputs [{by}]"):
            compare(bench, encoder, by, mixer)


def compare(bench: Bench, encoder: Encoder, by: str, mixer: Mixer) -> None:
    """fp32, no dropout: outputs and the gradient to the input. Raises where they differ."""
    lengths = prefix_lengths(16, seed=2, longest=300)
    offsets_B1 = offsets_of(lengths, bench.device)
    x_TD = torch.randn(int(lengths.sum()), bench.config.model.width, device=bench.device)
    x_TD.requires_grad_()
    last_S = offsets_B1[1:] - 1
    encoder.eval()
    found = []
    for one in (encoder, Published(encoder, mixer)):
        h_SD = one(x_TD, offsets_B1, last_S)
        dh_SD = torch.linspace(-1, 1, h_SD.numel(), device=bench.device).view_as(h_SD)
        found.append((h_SD.detach(), torch.autograd.grad(h_SD, x_TD, dh_SD)[0]))
    encoder.train()
    output, gradient = (distance(a, b) for a, b in zip(*found, strict=True))
    bench.find(
        f"fp32, ours against published ({by}): outputs {output:.1e}, gradients {gradient:.1e}"
    )
    if not max(output, gradient) <= LIMITS[by]:
        raise ValueError(f"ours and the published composition differ by more than {LIMITS[by]:.0e}")


def distance(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@dataclass(frozen=True)
class Published:
    """The published forward pass over an encoder's weights."""

    encoder: Encoder
    mixer: Mixer

    def __call__(
        self, x_TD: Tensor, offsets_B1: Tensor, read_positions_S: Tensor, read_last: bool = True
    ) -> Tensor:
        assert read_last  # though everything is computed, as published
        encoder = self.encoder
        position_T, reversed_T = positions(offsets_B1, x_TD.shape[0])
        x_TD = encoder.norm(encoder.dropout(x_TD))
        for layer in self.layers:
            forward_TD = self.mixer(layer.mixer, x_TD, offsets_B1, position_T)
            reverse_TD = self.mixer(layer.mixer, x_TD[reversed_T], offsets_B1, position_T)
            mixed_TD = forward_TD + layer.beta * reverse_TD
            H_TD = self._dropout(layer.norm1(mixed_TD + x_TD))
            x_TD = self._dropout(layer.norm2(self._feed_forward(layer.feed_forward, H_TD) + H_TD))
        return x_TD[read_positions_S]

    @property
    def layers(self) -> list[Layer]:
        return [one for one in self.encoder.layers if isinstance(one, Layer)]

    def _feed_forward(self, layer: FeedForward, x_TD: Tensor) -> Tensor:
        return layer.w2(self._dropout(F.gelu(layer.w1(x_TD))))

    def _dropout(self, x_TD: Tensor) -> Tensor:
        return F.dropout(x_TD, self.layers[0].dropout, self.encoder.training)


def plain_mixer(mixer: Mamba2Mixer, u_TD: Tensor, offsets_B1: Tensor, position_T: Tensor) -> Tensor:
    """The Mamba-2 block of `modules.encoder` in PyTorch's operations, `ssd` apart."""
    sizes = [mixer.inner, mixer.inner + 2 * mixer.state, mixer.heads]
    z_TE, xBC, dt_TH = torch.split(mixer.in_proj(u_TD), sizes, dim=-1)
    dt_TH = F.softplus(dt_TH.float() + mixer.dt_bias)
    A_H = -torch.exp(mixer.A_log)
    xBC = causal_conv_reference(xBC, mixer.conv_weight, mixer.conv_bias, position_T)
    x_TE, B_TN, C_TN = torch.split(xBC, [mixer.inner, mixer.state, mixer.state], dim=-1)
    x_THP = x_TE.unflatten(-1, (mixer.heads, mixer.head))
    y_TE = ssd(x_THP, dt_TH, A_H, B_TN, C_TN, mixer.D, offsets_B1).flatten(1)
    gated = y_TE.float() * F.silu(z_TE.float())
    scale = torch.rsqrt(gated.square().mean(-1, keepdim=True) + mixer.gated_norm_eps)
    return mixer.out_proj((gated * scale * mixer.norm_weight).to(y_TE.dtype))
