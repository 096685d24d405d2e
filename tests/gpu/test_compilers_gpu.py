"""With Triton's cache empty: the children leave nothing for the first step to compile."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from configs.command import plain_config
from tests.conftest import ROOT
from tools.benchmarks.inputs import ML1M_ITEMS, ML1M_USERS, write_data_set
from trainer.compilers import cache_folder, compilers_of
from trainer.config import Config

pytestmark = pytest.mark.gpu

CODE = "import sys; from tests.gpu.test_compilers_gpu import first_step as f; f(sys.argv[1:])"


def first_step(arguments: list[str]) -> None:
    """Runs inside the subprocess: the trainer's own first step, which compiles what is missing."""
    from data.reader import HistoryDataset
    from data.vocabulary import Vocabulary
    from tools.benchmarks.step import loaded, placed
    from trainer.distributed import process_group
    from trainer.resolve import resolve
    from trainer.stepper import Stepper

    config = Config.of(plain_config("train", arguments))
    with process_group("cuda") as world, ExitStack() as stack:
        dataset = HistoryDataset(Path(config.data.path))
        config = resolve(config, world, dataset)
        sharded = placed(config, dataset.table_rows, world)
        vocabulary = Vocabulary.read(dataset.folder)
        steps = stack.enter_context(loaded(config, dataset, vocabulary, world))
        outcome = Stepper(sharded, config.trainer, world, config.seed).take(next(steps), 0)
        assert torch.isfinite(outcome.loss)


def kernels() -> set[str]:
    """Name and folder of every kernel in Triton's cache, and of every launcher."""
    found = [*cache_folder().glob("*/*.cubin"), *cache_folder().glob("*/*.so")]
    return {f"{one.stem} {one.parent.name}" for one in found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    folder = tmp_path_factory.mktemp("ml1m") / "data"
    return write_data_set(folder, ML1M_USERS, ML1M_ITEMS, seed=1)


@pytest.mark.parametrize(
    "options",
    [
        ["experiment=ml1m_causal"],
        ["experiment=ml1m_paper"],
        ["experiment=ml1m_causal", "loss=sampled", "loss.in_batch=true"],
        ["data.batch_tokens=4097", "loss=sampled", "trainer.precision=fp32"],
        ["data.batch_tokens=4097", "trainer.precision=tf32"],
    ],
    ids=["causal", "paper", "sampled", "odd", "tf32"],
)
def test_the_first_step_finds_every_kernel(folder, tmp_path, monkeypatch, options):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    arguments = [f"data.path={folder}", f"run_dir={tmp_path / 'run'}", *options]
    plain = plain_config("train", arguments)
    with compilers_of(Config.of(plain), plain) as compilers:
        assert compilers._children
        assert compilers.wait() is None
    compiled = kernels()
    assert len(compiled) > 20
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert kernels() == compiled
    with compilers_of(Config.of(plain), plain) as compilers:
        assert not compilers._children  # the cache is marked
