"""What states are compared with: whole histories, read in the ways that this device has."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.bundle import Bundle
from tests.trained_run import trained
from tools import full_pass
from tools.full_pass import FullPass, full_passes


@pytest.fixture
def bundle() -> Bundle:
    return Bundle.open(trained().bundle, "cpu")


def test_a_cpu_reads_histories_by_the_bundles_model(bundle):
    (only,) = full_passes(bundle)
    assert only.kernels == "torchscript"
    assert 0 < only.seconds_an_event < 1e-2


def test_a_gpu_reads_them_by_the_kernels_too(bundle, monkeypatch):
    """With the device patched and nothing run."""
    kernels = SimpleNamespace(hidden=lambda items_T, offsets_B1: None)
    monkeypatch.setattr(full_pass, "kernel_scorer", lambda *of: kernels)
    timed = {}

    def seconds(bundle, name, encode):
        timed[name] = encode
        return float(len(timed))

    monkeypatch.setattr(full_pass, "_seconds_an_event", seconds)
    found = full_passes(replace(bundle, device=torch.device("cuda", 0)))
    assert found == [FullPass("torchscript", 1.0), FullPass("bf16", 2.0)]
    assert timed["bf16"] is kernels.hidden


def test_a_batch_is_that_of_scoring(bundle):
    sizes = []

    def encode(items_T, offsets_B1):
        sizes.append((len(items_T), int(offsets_B1[1]), int(offsets_B1[-1])))

    assert full_pass._seconds_an_event(bundle, "torchscript", encode) > 0
    assert set(sizes) == {(2048, 128, 2048)}


def test_why_kernels_are_not_timed_is_said(bundle, monkeypatch):
    """The tiny model's sizes, state 4 and head 8, and a card that is too small for any way."""
    card = replace(bundle, device=torch.device("cuda", 0))
    monkeypatch.setattr(full_pass, "_by_bundle", lambda bundle: failing("CUDA out of memory"))
    own, fast = full_passes(card)
    assert own.seconds_an_event is fast.seconds_an_event is None
    assert own.reason == "what it needs does not fit beside the item table"
    assert fast.reason == "model.head=8 has no CUDA kernel; it is one of 16, 32, 64, 128"
    monkeypatch.setattr(full_pass, "_by_kernels", lambda bundle: failing("an illegal address"))
    with pytest.raises(RuntimeError, match="illegal"):
        full_passes(card)


def failing(message):
    def encode(items_T, offsets_B1):
        raise RuntimeError(message)

    return encode
