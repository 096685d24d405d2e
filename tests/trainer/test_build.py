"""The parts of a run take what the config says."""

from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from data.packing import default_batch_tokens
from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from tests.data.datasets import random_histories, write_dataset
from tests.trainer.test_config import composed
from trainer import build
from trainer.checkpoint import RunState
from trainer.compilers import Compilers
from trainer.parts import candidates
from trainer.resolve import repeat_bytes, resolve
from trainer.run import run_rank


def test_max_history_bounds_training_and_evaluation_alike(tmp_path, one_rank):
    folder = write_dataset(tmp_path, random_histories(users=30, longest=20, items=9))
    options = ["data.max_history=4", "data.long_history=windows", "data.overlap_tokens=2"]
    options += ["data.batch_tokens=64", "trainer.max_epochs=1", f"data.path={folder}"]
    dataset, vocabulary = HistoryDataset(folder), Vocabulary.read(folder)
    config = resolve(composed(*options), one_rank, dataset)
    drawn = candidates(config, dataset.table_rows, vocabulary, one_rank)
    with build.training_steps(config, dataset, drawn, one_rank, RunState()) as steps:
        trained = [step.batch for step in steps]
        assert sum(int((one.targets_S > 0).sum()) for one in trained) == steps.counts.targets
        assert steps.counts.targets == (dataset.n_train_U.clip(1) - 1).sum()
    evaluated = [one.batch for one in build.evaluation_batches(config, dataset, "test", one_rank)]
    for batches in (trained, evaluated):
        assert max(int(one.offsets_B1.diff().max()) for one in batches) == 4


def test_batch_and_table_rate_follow_from_data_and_optimizer(tmp_path, one_rank):
    folder = write_dataset(tmp_path / "short", random_histories(users=30, longest=20, items=9))
    dataset = HistoryDataset(folder)
    resolved = resolve(composed(f"data.path={folder}"), one_rank, dataset)
    assert resolved.data.batch_tokens == 2048
    assert resolved.embedding.learning_rate == 0.04  # of the CPU's rowwise_adagrad
    far = composed(f"data.path={folder}", "data.max_history=100000", "data.long_history=truncate")
    resolved = resolve(far, one_rank, dataset)
    assert (resolved.data.batch_tokens, resolved.data.max_history) == (2048, 2048)
    given = ["data.batch_tokens=99", "embedding.learning_rate=0.5", "embedding.optimizer=sgd"]
    resolved = resolve(composed(f"data.path={folder}", *given), one_rank, dataset)
    assert (resolved.data.batch_tokens, resolved.embedding.learning_rate) == (99, 0.5)
    plain = composed(f"data.path={folder}", "embedding.optimizer=sgd")
    with pytest.raises(InputError, match=r"optimizer=sgd has no default learning rate; set"):
        resolve(plain, one_rank, dataset)


def test_repeats_among_too_many_rows_are_refused(tmp_path, one_rank, monkeypatch):
    folder = write_dataset(tmp_path / "short", random_histories(users=30, longest=20, items=9))
    dataset = HistoryDataset(folder)
    config = composed(f"data.path={folder}", "data.max_sequences=7")
    assert repeat_bytes(config, dataset.table_rows, one_rank) == 8 * 128 * 4
    sampled = replace(config, loss=replace(config.loss, kind="sampled", negatives=200))
    assert repeat_bytes(sampled, dataset.table_rows, one_rank) == 2 * 8 * 256 * 4
    plain = replace(config, model=replace(config.model, repeats=False))
    assert repeat_bytes(plain, dataset.table_rows, one_rank) == 0
    monkeypatch.setattr("trainer.resolve.REPEAT_BYTES", 4_095)
    with pytest.raises(InputError, match=r"repeats=true needs 4,096 bytes .*; use loss=sampled"):
        resolve(config, one_rank, dataset)
    resolve(plain, one_rank, dataset)


def test_a_dry_run_refuses_long_histories_as_training_does(tmp_path, one_rank):
    folder = write_dataset(tmp_path / "long", [[8] * 40, [8, 9, 10]])
    config = composed(f"data.path={folder}", "data.batch_tokens=16", "dry_run=true")
    message = r"the longest training history has 37 tokens, a batch only batch_tokens=16: set data"
    with pytest.raises(InputError, match=message):
        run_rank(config, folder, tmp_path / "run", one_rank, Compilers(), 0.0)


@pytest.mark.parametrize(
    ("epoch_tokens", "longest", "expected"),
    [
        (981_491, 2_275, 16_384),  # MovieLens-1M
        (131_413, 201, 2_048),  # Amazon Beauty
        (10, 1, 2_048),
        (10**12, 500, 16_384),
        (10**6, 16_385, 32_768),  # a history needs it
        (10**6, 300_000, 16_384),  # and is refused, cut or truncated as the config says
    ],
)
def test_default_batch(epoch_tokens, longest, expected):
    assert default_batch_tokens(epoch_tokens, longest) == expected


def test_what_cannot_be_trained_is_refused(tmp_path, one_rank):
    folder = write_dataset(tmp_path, [[8], [9]])
    dataset, cuda = HistoryDataset(folder), replace(one_rank, device=torch.device("cuda", 0))

    def refused(message: str, world, *options: str) -> None:
        with pytest.raises(InputError, match=message):
            resolve(composed(*options, f"data.path={folder}"), world, dataset)

    refused(r"has no user with two training events.*; convert a larger log or lower", one_rank)
    refused(r"model\.head=8 has no CUDA kernel; it is one of 16, 32, 64, 128", cuda, "model.head=8")
    refused(r"model\.conv=5 has no CUDA kernel; it is one of 1, 2, 3, 4", cuda, "model.conv=5")
    refused(r"expand \* model\.width = 16384 has no .* 8192 at most", cuda, "model.width=8192")
    for name in ("auto", "adam"):
        options = [f"embedding.optimizer={name}", "embedding.dtype=fp16"]
        refused(rf"optimizer={name} is adam here.*; use partial_rowwise_adam", cuda, *options)
    with pytest.raises(InputError, match=r"no test target with a history.*; convert the log with"):
        build.evaluation_batches(
            composed(f"data.path={folder}", "data.batch_tokens=64"), dataset, "test", one_rank
        )
