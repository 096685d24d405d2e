"""Suite `state`: one event on a user's state against a pass over the whole history, as exported.

The scripted scorer answers with the best 100 of 10,000 items for one user, seen items left out, as
a service asks it; then many states move on at once. docs/benchmarks.md says how to read it.
"""

import io
from collections.abc import Callable

import torch
from torch import Tensor

from data.bundle import load_model
from data.schema import RESERVED_ROWS
from tools.benchmarks import layer
from tools.benchmarks.bench import Bench
from tools.benchmarks.measure import Floor
from tools.benchmarks.passes import new_encoder
from tools.full_pass import WARM_UP
from trainer.config import ModelConfig
from trainer.model_files import scripted

LENGTHS = (200, 2_000, 20_000)
ITEMS, K = 10_000, 100
USERS, CPU_USERS = 8_192, 64  # moved on together


def run(bench: Bench) -> None:
    config = bench.model(kind="causal")
    encoder = new_encoder(config, torch.device("cpu"))
    rows_VD = torch.randn(RESERVED_ROWS + ITEMS, config.width)
    model = load_model(io.BytesIO(scripted(encoder)), [], bench.device)
    model.set_rows([rows_VD.to(bench.device)], [])
    state_1F = torch.zeros(1, model.state_numbers, device=bench.device)
    kept_bytes = 4 * model.state_numbers
    bench.find(f"a state is {model.state_numbers:,} numbers, {kept_bytes:,} bytes in fp32")
    for length in LENGTHS[:2] if bench.quick else LENGTHS:
        with bench.case(f"history {length:,}"):
            items_T = _items(length, bench.device)
            step = bench.record(
                f"history {length:,}: one event on the state",
                _advance(model, state_1F, items_T),
                work=1,
                unit="event",
            )
            whole = bench.record(
                f"history {length:,}: the whole history",
                _whole(model, items_T),
                work=1,
                unit="event",
            )
            ratio = whole.median_ms / step.median_ms
            bench.find(f"history {length:,}: the state answers {ratio:,.1f} times as fast")
    users = bench.size(USERS, CPU_USERS, CPU_USERS)
    with bench.case(f"{users:,} users"):
        state_UF, items_U = state_1F.repeat(users, 1), _items(users, bench.device)
        bench.record(
            f"{users:,} users: one event on each state",
            _warm(lambda: model.advance(state_UF, items_U)),
            work=users,
            unit="event",
            floor=advance_floor(config, users, kept_bytes),
        )


def advance_floor(model: ModelConfig, users: int, state_bytes: int) -> Floor:
    """Each state read and written, each item's row read; the forward products of all layers."""
    flops = model.layers * layer.floor(model, users, None, "fp32").flops / 3
    return Floor(users * (2 * state_bytes + 4 * model.width), flops, "fp32")


def _warm(call: Callable[[], object]) -> Callable[[], object]:
    """`call`, once TorchScript has compiled it."""
    for _ in range(WARM_UP):
        call()
    return call


def _items(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    items = torch.randint(RESERVED_ROWS, RESERVED_ROWS + ITEMS, [count], generator=generator)
    return items.to(device)


def _advance(model: torch.jit.ScriptModule, state_1F: Tensor, items_T: Tensor) -> Callable:
    users_T = torch.zeros_like(items_T)

    def answer() -> None:
        state = model.advance(state_1F, items_T[-1:])
        model.top(state[:, -model.width :], K, items_T, users_T)

    return _warm(answer)


def _whole(model: torch.jit.ScriptModule, items_T: Tensor) -> Callable:
    offsets_B1 = torch.tensor([0, len(items_T)], device=items_T.device)
    return _warm(lambda: model(items_T, offsets_B1, K, True))
