"""The parts of a run take what the config says."""

from dataclasses import replace

import pytest
import torch

from data.errors import InputError
from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from tests.data.datasets import random_histories, write_dataset
from tests.trainer.test_config import composed
from trainer import build
from trainer.checkpoint import RunState


def test_max_history_bounds_training_and_evaluation_alike(tmp_path, one_rank):
    folder = write_dataset(tmp_path, random_histories(users=30, longest=20, items=9))
    options = ["data.max_history=4", "data.long_history=windows", "data.overlap_tokens=2"]
    options += ["data.batch_tokens=64", "trainer.max_epochs=1", f"data.path={folder}"]
    dataset, vocabulary = HistoryDataset(folder), Vocabulary.read(folder)
    config = build.resolve(composed(*options), one_rank, dataset)
    drawn = build.candidates(config, dataset.table_rows, vocabulary, one_rank)
    with build.training_steps(config, dataset, drawn, one_rank, RunState()) as steps:
        trained = [step.batch for step in steps]
        assert sum(int((one.targets_S > 0).sum()) for one in trained) == steps.counts.targets
        assert steps.counts.targets == (dataset.n_train_U.clip(1) - 1).sum()
    evaluated = [one.batch for one in build.evaluation_batches(config, dataset, "test", one_rank)]
    for batches in (trained, evaluated):
        assert max(int(one.offsets_B1.diff().max()) for one in batches) == 4


def test_what_cannot_be_trained_is_refused(tmp_path, one_rank):
    folder = write_dataset(tmp_path, [[8], [9]])
    dataset, cuda = HistoryDataset(folder), replace(one_rank, device=torch.device("cuda", 0))

    def refused(message: str, world, *options: str) -> None:
        with pytest.raises(InputError, match=message):
            build.resolve(composed(*options, f"data.path={folder}"), world, dataset)

    refused(r"has no user with two training events.*; convert a larger log or lower", one_rank)
    refused(r"model\.head=8 has no CUDA kernel; it is one of 16, 32, 64, 128", cuda, "model.head=8")
    for name in ("auto", "adam"):
        options = [f"embedding.optimizer={name}", "embedding.dtype=fp16"]
        refused(rf"optimizer={name} is adam here.*; use partial_rowwise_adam", cuda, *options)
    with pytest.raises(InputError, match=r"no test target with a history.*; convert the log with"):
        build.evaluation_batches(composed(f"data.path={folder}"), dataset, "test", one_rank)
