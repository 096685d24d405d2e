"""Suite `ssd`: the state space duality alone, forward and forward + backward to all inputs.

Legend: T tokens, H heads of P channels, E = H P, N state size, B sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.products import DTYPES, fp32_products
from modules.ssd import ssd
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import filling_lengths, offsets_of
from tools.benchmarks.mamba import mamba_ssd
from tools.benchmarks.measure import Floor

Scan = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`length`: tokens of every history, or None for lognormal ones of mean 200."""

    head: int
    state: int
    precision: str
    length: int | None = None

    @property
    def name(self) -> str:
        lengths = "mean 200" if self.length is None else f"length {self.length:,}"
        return f"P {self.head} N {self.state} {self.precision}, {lengths}"


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 8_192, 1_024)
    channels = bench.config.model.expand * bench.config.model.width
    for case in cases(bench, tokens):
        with bench.case(case.name):
            measure(bench, case, tokens, channels, ssd, "ours")
        if bench.mamba and bench.on_gpu:
            with bench.case(f"{case.name} [mamba-ssm]", peer=True):
                measure(bench, case, tokens, channels, mamba_ssd, "mamba-ssm")


def cases(bench: Bench, tokens: int) -> list[Case]:
    kind = bench.precision
    shown = [Case(64, 64, kind), Case(16, 64, kind)]
    if bench.quick:
        return shown
    long = min(16_384, tokens // 4)
    shown += [Case(64, 128, kind)]
    shown += [Case(head, 64, kind, length) for length in (long, tokens) for head in (64, 16)]
    if bench.on_gpu:
        shown += [Case(head, 64, kind) for kind in ("fp32", "tf32") for head in (64, 16)]
    return list(dict.fromkeys(shown))


def measure(bench: Bench, case: Case, tokens: int, channels: int, scan: Scan, by: str) -> None:
    inputs, offsets_B1 = random_inputs(case, tokens, channels, bench.device)
    dy_THP = torch.randn_like(inputs[0])

    def forward() -> None:
        with torch.no_grad(), fp32_products(case.precision):
            scan(*inputs, offsets_B1)

    def both() -> None:
        with fp32_products(case.precision):
            y_THP = scan(*inputs, offsets_B1)
            torch.autograd.grad(y_THP, inputs, dy_THP)

    for name, call, backward in (("fwd", forward, False), ("fwd+bwd", both, True)):
        bench.record(
            f"{case.name}: {name}",
            call,
            by=by,
            work=tokens,
            floor=floor(tokens, channels, case, backward),
            graph=True,
        )


def random_inputs(
    case: Case, tokens: int, channels: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """([x, dt, A, B, C, D], offsets): x, B, C slices of one projection, as in the encoder."""
    generator = torch.Generator(device).manual_seed(1)
    heads, kind = channels // case.head, DTYPES[case.precision]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    xBC = normal(tokens, channels + 2 * case.state).to(kind)
    x_TE, B_TN, C_TN = torch.split(xBC, [channels, case.state, case.state], dim=-1)
    x_THP = x_TE.unflatten(-1, (heads, case.head))
    dt_TH = torch.nn.functional.softplus(normal(tokens, heads) - 2.0)
    A_H = -torch.rand(heads, generator=generator, device=device) * 15 - 1
    inputs = [x_THP, dt_TH, A_H, B_TN, C_TN, normal(heads)]
    if case.length is None:
        lengths = filling_lengths(tokens, 200, seed=1)
    else:
        lengths = np.full(tokens // case.length, case.length)
    return [one.detach().requires_grad_() for one in inputs], offsets_of(lengths, device)


def floor(tokens: int, channels: int, case: Case, backward: bool) -> Floor:
    """The recurrence's own work.

    Forward: x, B, C and dt in, y out, and two multiply-adds for each number of each token's state
    [E, N], one to advance it and one to read it. Backward: x, B, C, dt and dy in, dx, dB, dC and
    ddt out, and twice the operations.
    """
    number = DTYPES[case.precision].itemsize
    wide, narrow = tokens * channels * number, tokens * case.state * number
    steps = tokens * channels // case.head * 4
    moved = 2 * wide + 2 * narrow + steps
    if backward:
        moved += 3 * wide + 4 * narrow + 2 * steps
    operations = 4.0 * tokens * channels * case.state * (3 if backward else 1)
    return Floor(moved, operations, case.precision)
