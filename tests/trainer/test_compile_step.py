"""The made-up step of a child launches the kernels of the run's own step, constant for constant.

Without a GPU: tensors of the CPU pass for a GPU's and no kernel is compiled (a subprocess).
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from data.schema import RESERVED_ROWS
from modules.products import fp32_products
from tests.conftest import ROOT
from tests.data.datasets import random_histories, write_dataset
from tests.trainer.test_config import composed
from trainer.compile_step import MOST_TOKENS, cut_tokens
from trainer.config import Config

SMALL = ["model.width=64", "model.state=16", "model.head=32"]
WIDE = ["model.width=128", "model.layers=1"]  # whose batches are cut above MOST_TOKENS
ITEMS = 300


def resolved(*options: str) -> Config:
    config = composed("data.batch_tokens=40", "data.max_sequences=6", *options)
    if config.trainer.precision != "auto":
        return config
    return replace(config, trainer=replace(config.trainer, precision="bf16"))


def launched(call: Callable[[], object]) -> set[str]:
    """Triton's keys of the kernels that a call launches on tensors of the CPU."""
    import torch
    from triton.runtime.driver import driver

    from modules.kernels import compile as kernels
    from tests.gpu.lint_sass import NoDevice

    found = set()
    driver.set_active(NoDevice())
    keep = mock.patch.object(
        kernels._ShareMode, "submit", lambda self, key, compile_fn, finalize_fn: found.add(key)
    )
    with keep, mock.patch.object(torch.Tensor, "is_cuda", True):
        kernels.compile_ahead(call)
    return found


def kernels_of_run(config: Config, folder: Path) -> set[str]:
    """Those of a run's step on its first batch; its lookups are rows of one tensor."""
    import torch

    from data.reader import HistoryDataset
    from data.vocabulary import Vocabulary
    from trainer import build
    from trainer.checkpoint import RunState
    from trainer.parts import candidates
    from trainer.world import World

    world, dataset = World(0, 1, 0, 1, torch.device("cpu")), HistoryDataset(folder)
    drawn = candidates(config, dataset.table_rows, Vocabulary.read(folder), world)
    model = build.recommender(config, dataset.table_rows, world)
    with build.training_steps(config, dataset, drawn, world, RunState()) as steps:
        batch = next(steps).batch
    counts = batch.features.length_per_key()
    looked_up = torch.zeros(sum(counts), config.model.width)
    rows = [one.detach().requires_grad_() for one in looked_up.split(counts)]

    def step() -> object:
        with fp32_products(config.trainer.precision):  # as the stepper: test_precision.py
            loss = model.loss_of_rows(*rows, batch.candidates_C, batch)
            return torch.autograd.grad(loss, [*rows, *model.encoder.parameters()])

    return launched(step)


def compare(folder: str, options: list[str], kept_bytes: float, cuts: dict[str, int]) -> list[int]:
    """Runs inside the subprocess: kernels of the run, of the child, and of both.

    cuts: other constants of `trainer.compile_step`.
    """
    import torch

    from modules import softmax_memory
    from trainer import compile_step
    from trainer.world import World

    config = resolved(*options)
    softmax_memory.KEPT_SHARE = kept_bytes / softmax_memory.LARGE_GPU
    run = kernels_of_run(config, Path(folder))
    for name, value in cuts.items():
        setattr(compile_step, name, value)
    world, rows = World(0, 1, 0, 1, torch.device("cpu")), RESERVED_ROWS + ITEMS
    softmax_memory.KEPT_SHARE = compile_step.kept_share(config, rows, world)
    child = launched(compile_step.step_of(config, rows, world))
    return [len(run), len(child), len(run & child)]


def compared(
    folder: Path, options: list[str], kept_bytes: float = 2.0**32, **cuts: int
) -> list[int]:
    pytest.importorskip("triton")
    given = json.dumps([str(folder), options, kept_bytes, cuts])
    code = f"""
import json
from tests.trainer.test_compile_step import compare
print(json.dumps(compare(*json.loads({given!r}))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    histories = random_histories(users=400, longest=30, items=ITEMS)
    return write_dataset(
        tmp_path_factory.mktemp("data"), histories, table_rows=RESERVED_ROWS + ITEMS
    )


@pytest.mark.parametrize(
    "options",
    [
        [*SMALL, "data.batch_tokens=2048", "data.max_sequences=99"],
        [*SMALL, "data.batch_tokens=777", "model.dropout=0", "model.norm_embedding=false"],
        [*SMALL, "data.batch_tokens=777", "trainer.precision=tf32"],
        # An odd number of tokens: the candidates' ids behind them are not aligned.
        [*SMALL, "data.batch_tokens=2049", "loss=sampled", "loss.negatives=33"],
        [*SMALL, "loss=sampled", "loss.in_batch=true", "data.batch_tokens=4100"],
        [*SMALL, "experiment=ml1m_paper", "data.batch_tokens=3001", "data.max_sequences=301"],
        [*WIDE, "data.batch_tokens=45007", "data.max_sequences=311"],
        [*WIDE, "data.batch_tokens=65536", "data.max_sequences=311"],
        [*WIDE, "experiment=ml1m_paper", "data.batch_tokens=45007", "data.max_sequences=311"],
    ],
)
def test_the_childs_step_has_the_kernels_of_the_run(folder, options):
    run, child, both = compared(folder, options)
    assert run == child == both > 20


# bf16 exponentials of 65,536 positions and 308 candidates are 40 MB, of the batch as cut 25 MB.
LONG = [*WIDE, "data.batch_tokens=65536", "data.max_sequences=311"]
PREFIXES = [*WIDE, "experiment=ml1m_paper", "data.batch_tokens=45007", "data.max_sequences=311"]
ROWS = [*SMALL, "data.batch_tokens=2048", "data.max_sequences=99"]


@pytest.mark.parametrize(
    ("options", "kept_bytes", "cuts"),
    [
        (LONG, 2**25, {}),
        (LONG, 2**26, {}),
        (PREFIXES, 2**17, {}),
        (PREFIXES, 2**18, {}),
        (ROWS, 2**20, {"MOST_ROWS": 120}),
        (ROWS, 2**21, {"MOST_ROWS": 120}),
    ],
)
def test_the_childs_softmax_keeps_what_the_runs_keeps(folder, options, kept_bytes, cuts):
    run, child, both = compared(folder, options, kept_bytes, **cuts)
    assert run == child == both > 20


def test_a_batch_that_is_cut_too_short_has_others(folder):
    options = [*WIDE, "data.batch_tokens=45007", "data.max_sequences=311"]
    run, _, both = compared(folder, options, MOST_TOKENS=5_000, MOST_NUMBERS=0)
    assert both < run


@pytest.mark.parametrize("width", [16, 64, 256])
def test_cut_batches_keep_what_alignment_depends_on(width):
    for tokens in (2, 16_384, 200_502, 262_144, 1_000_001):
        cut = cut_tokens(tokens, width)
        assert (tokens - cut) % 1_024 == 0
        assert cut == tokens or MOST_TOKENS <= cut < max(MOST_TOKENS, 2**22 // width) + 1_024
