"""Dropout masks that no one stores: drawn from a counter, so the backward draws them again.

A row's columns come in groups of 8. Group g of row t takes the Philox 4x32 block number
`t * groups + g` under a 64-bit key that lies on the device (`draw_seed`), and its four words give
eight 16-bit draws: one block an element would cost more than the bytes that the kernel moves. Seven
rounds pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table
2). The rate is therefore a multiple of 1/65536, and the survivors are scaled by the rate as
rounded, so that the expectation is exact.

Shape suffixes: R rows of a tile, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 8  # columns that one Philox block serves: a tile's columns are a multiple of it


def draw_seed(device: torch.device) -> Tensor:
    """A new key, int64 [1], from torch's generator of the device: `torch.manual_seed` governs it,
    and a captured CUDA graph draws another one at every replay."""
    return torch.randint(0, 2**63 - 1, (1,), device=device)


def threshold_of(rate: float) -> int:
    """The 16-bit draws below this value are dropped. Raises ValueError unless 0 <= rate < 1."""
    threshold = round(rate * 65536)
    if not 0 <= threshold < 65536:
        raise ValueError(f"a dropout rate must be at least 0 and below 1, not {rate}")
    return threshold


@triton.jit
def keep_scale(seed, t_R, threshold, D: tl.constexpr):
    """[R, D] fp32: 0 where dropped, else 1 / (1 - rate)."""
    R: tl.constexpr = t_R.shape[0]
    GROUPS: tl.constexpr = D // 8
    block_RG = t_R.to(tl.int64)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    a_RG, b_RG, c_RG, d_RG = tl.randint4x(seed, block_RG, 7)
    words = tl.join(tl.join(a_RG, b_RG), tl.join(c_RG, d_RG)).to(tl.uint32, bitcast=True)
    draws_RD = tl.reshape(tl.join(words << 16, words), [R, D])  # a draw is in the upper 16 bits
    least = threshold.to(tl.uint32) << 16
    return tl.where(draws_RD >= least, 65536.0 / (65536 - threshold), 0.0)
