"""What a warm start refuses before it reads a tensor. That it reads rightly: tests/distributed."""

from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest
import yaml

from data.errors import InputError
from data.schema import RESERVED_ROWS
from data.vocabulary import Vocabulary
from tests.trainer.test_config import composed
from trainer.checkpoint import CONFIG
from trainer.checkpoint_files import MANIFEST
from trainer.warm_start import warm_start

OLD = ["a", "b", "c"]


def vocabulary(items: list[str]) -> Vocabulary:
    return Vocabulary(pa.array(items), np.ones(RESERVED_ROWS + len(items), np.int64))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of OLD's items, as far as it is looked at."""
    content = {
        "vocabulary": {"items": 3, "sha256": vocabulary(OLD).digest(3)},
        "embedding": {"optimizer": "adam"},
        "model": asdict(composed().model),
    }
    (tmp_path / MANIFEST).write_text("{}")
    (tmp_path / CONFIG).write_text(yaml.safe_dump(content))
    return tmp_path


@pytest.mark.parametrize("items", [["a", "b"], ["b", "a", "c", "d"], ["a", "bc", "", "d"]])
def test_another_vocabulary(checkpoint, items):
    config = composed(f"init_from={checkpoint}")
    with pytest.raises(InputError, match="was trained with another vocabulary"):
        warm_start(config, vocabulary(items), None, None)


def test_a_run_before_vocabularies_were_noted(checkpoint):
    content = yaml.safe_load((checkpoint / CONFIG).read_text())
    del content["vocabulary"]
    (checkpoint / CONFIG).write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="was trained with another vocabulary"):
        warm_start(composed(f"init_from={checkpoint}"), vocabulary(OLD), None, None)


def test_another_optimizer(checkpoint):
    config = composed(f"init_from={checkpoint}", "embedding.optimizer=sgd")
    with pytest.raises(InputError, match=r"embedding\.optimizer=adam, which sgd cannot use"):
        warm_start(config, vocabulary([*OLD, "d"]), None, None)


def test_another_model(checkpoint):
    """Tensors of one shape can mean different things."""
    config = composed(f"init_from={checkpoint}", "model.restore_order=true", "model.dropout=0.7")
    with pytest.raises(InputError, match=r"\(model\.restore_order was False, now True\)"):
        warm_start(config, vocabulary(OLD), None, None)
