"""Suite `layer`: one encoder layer, forward + backward, in training mode.

Legend: T tokens, S read positions, D width, E inner width, N state, H heads, K convolution width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from modules.encoder import positions
from modules.products import DTYPES
from modules.ssd import causal_conv_reference
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import filling_lengths, offsets_of
from tools.benchmarks.measure import Floor
from tools.benchmarks.passes import encoder_pass, new_encoder
from trainer.config import ModelConfig

PUBLISHED_HEAD = 16


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 8_192, 1_024)
    offsets_B1 = offsets_of(filling_lengths(tokens, 200, seed=2), bench.device)
    last_S = offsets_B1[1:] - 1
    causal = bench.model(kind="causal", layers=1, norm_embedding=False)
    both = replace(causal, kind="bidirectional", head=PUBLISHED_HEAD)
    for model, reads in [(causal, None), (both, None), (both, last_S)]:
        name = f"{model.kind}, {'all positions' if reads is None else 'last position'}"
        with bench.case(name):
            encoder = new_encoder(model, bench.device)
            step = encoder_pass(bench, encoder, tokens, offsets_B1, reads)
            row = f"{name}, P {model.head}"
            work = floor(model, tokens, None if reads is None else len(reads), bench.precision)
            bench.record(f"{row}: fwd+bwd", step, work=tokens, floor=work)
            if bench.on_gpu:  # as the trainer runs it
                label = f"{row}: as a graph"
                bench.record(
                    label, step, work=tokens, floor=work, gradient_bytes=None, graph=True
                )  # fmt: skip
    convolution(bench, causal, tokens, offsets_B1)


def convolution(bench: Bench, model: ModelConfig, tokens: int, offsets_B1: Tensor) -> None:
    """The layer's convolution and SiLU in PyTorch, and on CUDA by the Triton kernel."""
    columns = model.expand * model.width + 2 * model.state
    kind = DTYPES[bench.precision]
    x_TE = torch.randn(tokens, columns, device=bench.device, dtype=kind, requires_grad=True)
    weight_EK = torch.randn(columns, model.conv, device=bench.device, requires_grad=True)
    bias_E = torch.randn(columns, device=bench.device, requires_grad=True)
    dy_TE = torch.randn_like(x_TE)
    position_T, _ = positions(offsets_B1, tokens)
    work = Floor(5 * x_TE.numel() * x_TE.element_size(), 0.0, bench.precision)

    def backward(y_TE: Tensor) -> None:
        torch.autograd.grad(y_TE, (x_TE, weight_EK, bias_E), dy_TE)

    with bench.case("convolution, PyTorch"):
        bench.record(
            "convolution, PyTorch: fwd+bwd",
            lambda: backward(causal_conv_reference(x_TE, weight_EK, bias_E, position_T)),
            work=tokens,
            floor=work,
        )
    if bench.device.type == "cuda":
        from modules.kernels.conv import causal_conv_triton  # Triton is there only with a GPU

        with bench.case("convolution, Triton"):
            bench.record(
                "convolution, Triton: fwd+bwd",
                lambda: backward(causal_conv_triton(x_TE, weight_EK, bias_E, position_T)),
                work=tokens,
                floor=work,
            )


def floor(model: ModelConfig, tokens: int, reads: int | None, precision: str) -> Floor:
    """One layer's own work, forward and backward: x and dh in, h and dx out.

    Matrix products forward and twice that backward. Both directions share one input and one output
    projection; with `reads` alone read, the gate, C, the output projection and the feed-forward are
    needed there only.
    """
    D, E, N = model.width, model.expand * model.width, model.state
    rows = tokens if reads is None else reads
    directions = 2 if model.kind == "bidirectional" else 1
    entering = 2 * D * (E + N + E // model.head) + directions * (2 * model.conv * (E + N))
    scan = directions * 2 * E * N  # advance the state
    leaving = 2 * D * (E + N) + 2 * E * D + 16 * D * D + directions * 2 * E * N
    operations = 3.0 * (tokens * (entering + scan) + rows * leaving)
    return Floor(2 * (tokens + rows) * D * DTYPES[precision].itemsize, operations, precision)
