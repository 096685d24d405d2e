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
        """device: one of DEVICES. Where there are more processes than GPUs, they share them evenly.

        Raises InputError for a device that this host lacks.
        """
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
            return cls(rank, size, torch.device("cpu"))
        gpus = torch.cuda.device_count()
        if not gpus:
            raise InputError(f"device={device}, but torch sees no GPU; use device=cpu")
        return cls(rank, size, torch.device("cuda", local_rank % gpus))
