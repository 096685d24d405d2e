"""The differentiable collectives of the candidate-parallel loss.

Each rank holds the hidden states of its own tokens and the rows of its own candidates. Both
functions are called once a step by every rank, with equal shapes, which the batch fixes.
Without a process group, or with one rank, they return their input.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# torch 2.13 has the first name and warns of the second, torch 2.11 has the second alone.
gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather(x: Tensor) -> Tensor:
    """Every rank's x [S, …] stacked, [W S, …]; the gradient is summed back to its owner."""
    return x if world_size() == 1 else _AllGather.apply(x)


def all_to_all(x: Tensor) -> Tensor:
    """Row block r of x [W S, …] goes to rank r; out [W S, …] holds what each rank sent here."""
    return x if world_size() == 1 else _AllToAll.apply(x)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
        gather_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        blocks = _exchange(gradient).unflatten(0, (world_size(), -1))
        return blocks.sum(0)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _exchange(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchange(gradient)


def _exchange(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous())
    return out
