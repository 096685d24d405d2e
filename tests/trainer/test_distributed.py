"""What a rank refuses before it joins the others, on hosts as they are not here."""

import weakref

import pytest
import torch

from data.errors import InputError
from modules.products import fp32_products
from trainer.distributed import process_group


def refused(message: str, device: str) -> None:
    with pytest.raises(InputError, match=message), process_group(device):
        pytest.fail("the group was joined")


def test_what_a_failed_call_held_is_gone_before_the_group_ends():
    """Its exception is still there, to be shown."""
    held = []

    def fail() -> None:
        graph = torch.zeros(1)
        held.append(weakref.ref(graph))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no") as caught, process_group("cpu"):
        fail()
    assert held[0]() is None
    assert caught.tb is not None


def test_products_are_exact_whatever_the_environment_asked_for():
    # The outer switch is how TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 leaves torch.
    with fp32_products("tf32"), process_group("cpu"):
        found = torch.get_float32_matmul_precision()
    assert found == "highest"


def test_more_ranks_than_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    refused(r"--nproc_per_node=3, but this host has 2 GPUs; start one process a GPU", "auto")


def test_restarts_on_several_hosts_with_a_kept_store(monkeypatch):
    for name, value in {
        "RANK": "0",
        "GROUP_WORLD_SIZE": "2",
        "TORCHELASTIC_RESTART_COUNT": "1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }.items():
        monkeypatch.setenv(name, value)
    refused(r"on several hosts .*: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun", "cpu")
