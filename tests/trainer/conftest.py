"""One data set and one undisturbed run for all tests that compare with it."""

from pathlib import Path

import pytest

from tests.trainer.launch import finish, losses, ring, start


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return ring(tmp_path_factory.mktemp("ring"))


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory) -> tuple[Path, dict[int, str]]:
    """The folder and the losses by step of a run of two ranks that nothing disturbs."""
    run_dir = tmp_path_factory.mktemp("straight")
    output = finish(start([f"data.path={data}", f"run_dir={run_dir}"]))
    return run_dir, losses(output)
