"""A run on a data set with a damaged file: it says so, and goes on only without the same file."""

from pathlib import Path

from configs.command import plain_config
from data.reader import HistoryDataset, damaged_files
from data.schema import Manifest
from data.vocabulary import Vocabulary
from tests.data.datasets import write_dataset
from tests.trained_run import run_command
from trainer.config import Config
from trainer.run_folder import describe


def test_files_that_were_left_out_are_part_of_the_run(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [[8, 9, 10, 11]] * 6, files=3)
    whole = HistoryDataset(folder)
    path = folder / Manifest.read(folder).histories[2].path
    path.write_bytes(path.read_bytes()[:-1])
    arguments = [f"data.path={folder}", f"run_dir={tmp_path / 'run'}"]
    config = Config.of(plain_config("train", arguments))
    rest = HistoryDataset(folder, damaged_files(folder))
    vocabulary = Vocabulary.read(folder)
    assert describe(config, rest, vocabulary) == describe(config, whole, vocabulary) | {
        "data_skipped": ["histories/part-00002.parquet"]
    }

    command = ["trainer/main.py", *arguments, "trainer.device=cpu", "dry_run=true"]
    message = run_command(*command, fails=True)
    assert f"{path} has" in message
    assert "data.damaged_files=skip" in message
    out = run_command(*command, "data.damaged_files=skip")
    assert f"skipping {path}: it has" in out
    assert "skipped 1 damaged file(s) with 2 users" in out
