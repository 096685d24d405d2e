"""CUDA graphs of calls that read and write tensors which stay in place.

Launching the few hundred kernels of a step one by one takes the host longer than the GPU needs to
run them; a replay is one launch.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UP_CALLS = 3  # compile kernels, and let libraries choose and allocate, before the capture


def captured(call: Callable[[], T], changes: Sequence[Tensor] = ()) -> Callable[[], T]:
    """`call` as the replay of a CUDA graph; what it returned at the capture is what a replay fills.

    `call` runs a few times for the capture, and `changes`, the tensors that it updates, have their
    values again afterwards. Everything that it reads must be where it was, and of the same shape,
    at each replay. It may draw random numbers: a replay goes by the generator's state of then.
    """
    kept = [one.clone() for one in changes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile: the loader pins memory, NCCL's watchdog looks at events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    with torch.no_grad():
        for one, value in zip(changes, kept, strict=True):
            one.copy_(value)

    def replay() -> T:
        graph.replay()
        return result

    return replay
