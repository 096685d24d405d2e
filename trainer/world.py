"""Where a process stands among all ranks. Without the imports that a process group needs."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class World:
    """Where this process stands among all: one process a device."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0
