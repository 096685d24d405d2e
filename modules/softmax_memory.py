"""What a softmax loss may hold of its logits, or of their exponentials, at once.

The reference in PyTorch keeps LOGIT_BYTES of logits. The kernels keep the exponentials of all
logits from the forward to the backward where they fit, which spares the backward a product, and
otherwise make some at a time anew.
"""

import torch

LOGIT_BYTES = 256 * 2**20
KEPT_SHARE = 0.05  # of a GPU's memory, for exponentials of all logits
CHUNK_BYTES = 512 * 2**20  # of exponentials that are made anew
LARGE_GPU = 80 * 2**30  # which Triton's interpreter passes for


def keeps_exponentials(needed: int, device: torch.device) -> bool:
    """Whether the kernels keep exponentials that take `needed` bytes."""
    there = LARGE_GPU
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    return needed <= KEPT_SHARE * there


def most_held(logits: int, number_bytes: int, device: torch.device) -> int:
    """Bytes that a loss of so many logits holds at most. number_bytes: of a number in products."""
    if device.type != "cuda":
        return min(LOGIT_BYTES, 4 * logits)
    needed = number_bytes * logits
    return needed if keeps_exponentials(needed, device) else min(CHUNK_BYTES, needed)
