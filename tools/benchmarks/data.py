"""Suite `data`: the loader alone, from Parquet to batches of one rank, on ML-1M-like lengths."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import ML1M_ITEMS, ML1M_USERS, write_data_set
from tools.benchmarks.measure import Floor
from trainer import build
from trainer.checkpoint import RunState
from trainer.config import Config
from trainer.parts import candidates
from trainer.resolve import resolve

NEVER = 1_000_000  # epochs
Samples = Literal["histories", "prefixes"]


def run(bench: Bench) -> None:
    users = ML1M_USERS if bench.on_gpu or not bench.quick else ML1M_USERS // 4
    with tempfile.TemporaryDirectory(prefix="ssd4rec-benchmark-") as folder:
        path = write_data_set(Path(folder) / "data", users, ML1M_ITEMS, seed=1)
        cases: list[tuple[Samples, int]] = [
            ("histories", 16_384),
            ("histories", bench.size(262_144, 65_536, 65_536)),
            ("prefixes", bench.size(200_502, 65_536, 65_536)),
        ]
        for samples, tokens in cases:
            name = f"{samples}, {tokens:,} tokens a batch"
            with bench.case(name):
                _measure(bench, name, with_data(bench.config, path, samples, tokens))


def with_data(config: Config, path: Path, samples: Samples, batch_tokens: int) -> Config:
    """The config that trains these samples of the data set at `path` without an end."""
    changed = replace(config.data, path=str(path), samples=samples, batch_tokens=batch_tokens)
    return replace(config, data=changed, trainer=replace(config.trainer, max_epochs=NEVER))


def _measure(bench: Bench, name: str, config: Config) -> None:
    dataset = HistoryDataset(Path(config.data.path))
    config = resolve(config, bench.world, dataset)
    vocabulary = Vocabulary.read(dataset.folder)
    drawn = candidates(config, dataset.table_rows, vocabulary, bench.world)
    with build.training_steps(config, dataset, drawn, bench.world, RunState()) as steps:
        step = next(steps)
        each = max(20, bench.size(4_194_304, 1_048_576, 0) // config.data.tokens_a_batch)
        times = bench.timer.steps(lambda: next(steps), warm_up=6, each=each, groups=5)
    batch = step.batch
    written = sum(
        one.numel() * one.element_size()
        for one in (batch.features.values(), batch.offsets_B1, batch.targets_S)
    )
    # The floor is that of this device's memory; a batch is made in the host's.
    floor = None if bench.on_gpu else Floor(written, precision="fp32")
    bench.keep(f"{name}: a step", times, work=step.tokens, floor=floor)
