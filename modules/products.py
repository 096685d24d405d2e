"""The precision of products, by the names that configs use.

fp32: fp32 numbers and products exact to fp32. tf32: fp32 numbers, whose products round their
factors to 10 bits of mantissa, for tensor cores. bf16: numbers and products of the encoder and the
loss. Where the device has no tf32, tf32 is fp32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
}


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """How products of fp32 numbers are taken inside: exactly, but for `precision` tf32.

    It is torch's own switch, which cuBLAS and our Triton kernels go by when they are launched: a
    backward pass needs it as much as the forward pass.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def triton_precision() -> Literal["tf32", "tf32x3"]:
    """The switch as `tl.dot` takes it; three tf32 products are exact to 1e-6."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
