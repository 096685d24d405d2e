"""The parts of a run take what the config says."""

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
