"""Suite `state`: one event on a user's state against a pass over the whole history, as exported.

The scripted scorer answers with the best 100 of 10,000 items for one user, seen items left out, as
a service asks it. docs/benchmarks.md says how to read it.
"""

import io
from collections.abc import Callable

import torch
from torch import Tensor

from data.bundle import load_model
from data.schema import RESERVED_ROWS
from tools.benchmarks.bench import Bench
from tools.benchmarks.passes import new_encoder
from trainer.model_files import scripted

LENGTHS = (200, 2_000, 20_000)
ITEMS, K = 10_000, 100
USERS = 64  # moved on together, as tools.update_states does


def run(bench: Bench) -> None:
    encoder = new_encoder(bench.model(kind="causal"), torch.device("cpu"))
    rows_VD = torch.randn(RESERVED_ROWS + ITEMS, bench.config.model.width)
    model = load_model(io.BytesIO(scripted(encoder)), [], bench.device)
    model.set_rows([rows_VD.to(bench.device)], [])
    state_UF = torch.zeros(USERS, model.state_numbers, device=bench.device)
    kept_bytes = 4 * model.state_numbers
    bench.find(f"a state is {model.state_numbers:,} numbers, {kept_bytes:,} bytes in fp32")
    for length in LENGTHS[:2] if bench.quick else LENGTHS:
        with bench.case(f"history {length:,}"):
            items_T = _items(length, bench.device)
            step = bench.record(
                f"history {length:,}: one event on the state",
                _advance(model, state_UF[:1], items_T),
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
    with bench.case(f"{USERS} users"):
        items_U = _items(USERS, bench.device)
        bench.record(
            f"{USERS} users: one event on each state",
            lambda: model.advance(state_UF, items_U),
            work=USERS,
            unit="event",
        )


def _items(count: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    items = torch.randint(RESERVED_ROWS, RESERVED_ROWS + ITEMS, [count], generator=generator)
    return items.to(device)


def _advance(model: torch.jit.ScriptModule, state_1F: Tensor, items_T: Tensor) -> Callable:
    users_T = torch.zeros_like(items_T)

    def answer() -> None:
        state = model.advance(state_1F, items_T[-1:])
        model.top(state[:, -model.width :], K, items_T, users_T)

    return answer


def _whole(model: torch.jit.ScriptModule, items_T: Tensor) -> Callable:
    offsets_B1 = torch.tensor([0, len(items_T)], device=items_T.device)
    return lambda: model(items_T, offsets_B1, K, True)
