"""Which device a scoring process computes on, and where it stands among the others."""

import os
from dataclasses import dataclass

import torch

from data.errors import InputError

DEVICES = ("auto", "cpu", "cuda")  # auto: a GPU where there is one


@dataclass(frozen=True)
class Place:
    """Where this process stands among all, from torchrun's environment."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def of(cls, device: str) -> "Place":
        """device: one of DEVICES. Raises InputError for a device that this host lacks."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            return cls(rank, size, torch.device("cpu"))
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"device={device} needs a GPU for each process of this host, which has "
                f"{torch.cuda.device_count()}; start fewer processes or use device=cpu"
            )
        return cls(rank, size, torch.device("cuda", local_rank))
