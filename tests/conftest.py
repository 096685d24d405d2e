"""Fixtures that several test folders share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.distributed import process_group, quiet_libraries
from trainer.world import World

ROOT = Path(__file__).parent.parent


@pytest.fixture
def one_rank() -> Iterator[World]:
    """A process group of this process alone."""
    quiet_libraries()
    with process_group("cpu") as world:
        yield world
