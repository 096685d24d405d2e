"""The config's checks: each names the key, the value and the limit."""

from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from configs.command import CONFIGS
from data.errors import InputError
from trainer.config import Config, completed

EXPERIMENTS = sorted(one.stem for one in (CONFIGS / "experiment").glob("*.yaml"))


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", ["data.path=D", "run_dir=R", *overrides])
    return Config.of(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_valid(name):
    assert composed(f"experiment={name}").run_dir == "R"


def test_small_numbers_in_yaml_are_numbers():
    assert composed("embedding.eps=1e-8").embedding.eps == 1e-8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.kind=lstm", "model.kind=lstm is unknown; it is one of bidirectional, causal"),
        ("model.layers=0", "model.layers=0 is below its least value 1"),
        ("model.layers=two", "model.layers='two' is not of type int"),
        ("model.head=48", "model.head=48 does not divide the inner width expand . width = 512"),
        ("model.width=62", "model.width=62 is no multiple of 4|model.head"),
        ("model.dropout=1.0", r"model.dropout=1.0 is outside \[0, 1\)"),
        ("+model.depth=3", "model.depth is no key of the config"),
        ("model=bidirectional", "train it with data=prefixes"),
        ("data.max_history=0", "data.max_history=0 is below its least value 1"),
        ("data.batch_tokens=1", "data.batch_tokens=1 is below its least value 2"),
        ("data.batch_tokens=0", "data.batch_tokens=0 is below its least value 2"),
        ("data.batch_tokens=2147483648", "data.batch_tokens=2147483648 is above 2147483647; set"),
        ("data.max_sequences=99999999999999999999", "data.max_sequences=9+ is above 2147483647"),
        ("data.max_history=99999999999999999999", "data.max_history=9+ is above 2147483647"),
        ("data.overlap_tokens=2147483648", "data.overlap_tokens=2147483648 is above 2147483647"),
        ("loss.kind=sampled", "loss.negatives=0 with loss.kind=sampled; draw at least 1, or 0"),
        ("loss.smoothing=1", r"loss.smoothing=1.0 is outside \[0, 1\)"),
        ("trainer.learning_rate=0", "trainer.learning_rate=0.0 must be above 0"),
        ("trainer.monitor=test.filtered.hr@10", "is no validation figure"),
        ("trainer.monitor=validation.filtered.hr@5", "ends in hr@5; it is one of hr@10"),
        ("trainer.learning_rate=nan", "trainer.learning_rate=nan is not a finite number"),
        ("trainer.learning_rate=true", "trainer.learning_rate=True is not of type float"),
        ("trainer.beta1=7", r"trainer.beta1=7.0 is outside \[0, 1\)"),
        ("embedding.offload=disk", "embedding.offload=disk is unknown; it is one of none, uvm"),
        ("embedding.cache_share=1", r"embedding.cache_share=1.0 is outside \(0, 1\)"),
        ("trainer.stall_seconds=1e9", "trainer.stall_seconds=1000000000.0 is above .*; 0 is off"),
        ("seed=-1", r"seed=-1 is outside \[0, 2.31\)"),
    ],
)
def test_what_cannot_be_is_refused(override, message):
    with pytest.raises(InputError, match=message):
        composed(override)


def test_smoothing_is_the_full_softmax_s():
    with pytest.raises(
        InputError, match=r"smoothing=0.1 is for the full softmax; loss=sampled has 0"
    ):
        composed("loss=sampled", "loss.smoothing=0.1")


def test_broken_combinations():
    with pytest.raises(InputError, match="windows is for data"):
        composed("data=prefixes", "data.long_history=windows")
    with pytest.raises(InputError, match=r"width=62 is no multiple of 4, which .* need; use 64"):
        composed("model.width=62", "model.head=4")
    with pytest.raises(InputError, match=r"overlap_tokens=64 must be below data.batch_tokens=64"):
        composed("data.batch_tokens=64", "data.overlap_tokens=64")
    with pytest.raises(InputError, match=r"max_history=65 is above data.batch_tokens=64"):
        composed("data.batch_tokens=64", "data.max_history=65")


def test_config_is_frozen():
    config = composed()
    with pytest.raises(AttributeError):
        config.seed = 2  # type: ignore[misc]
    assert replace(config, seed=2).seed == 2


def test_a_config_of_before_has_what_its_missing_keys_stood_for():
    now = {
        "model": {"width": 8, "repeats": True},
        "loss": {"kind": "full", "smoothing": 0.1},
        "data": {"reorder_ratio": 0.5},
    }
    assert completed(now) == now
    assert completed({"model": now["model"]}) == {"model": now["model"]}  # no config of a run
    before = {"model": {"width": 8}, "loss": {"kind": "full"}, "data": {}, "seed": 1}
    assert completed(before) == {
        "model": {"width": 8, "repeats": False},
        "loss": {"kind": "full", "smoothing": 0.0},
        "data": {"reorder_ratio": 0.0},
        "seed": 1,
    }
