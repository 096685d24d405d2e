"""The chunked reference against a direct transcription of the recurrence, values and gradients."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from modules.ssd import causal_conv_reference, ssd_reference

CHUNK = 16


def recurrence(x, dt, A, B, C, D, offsets) -> Tensor:
    """h_i = exp(dt_i A) h_{i-1} + dt_i x_i B_i^T, y_i = h_i C_i + D x_i, token by token."""
    y = torch.zeros_like(x)
    bounds = offsets.tolist()
    for start, stop in pairwise(bounds):
        h = x.new_zeros(x.shape[1], x.shape[2], B.shape[1])
        for i in range(start, stop):
            h = torch.exp(dt[i] * A)[:, None, None] * h
            h = h + (dt[i, :, None] * x[i])[:, :, None] * B[i]
            y[i] = h @ C[i] + D[:, None] * x[i]
    return y


def inputs(lengths: list[int], padding: int = 0, unused: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(len(lengths) + sum(lengths))
    tokens = sum(lengths) + padding

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [
        draw(tokens, 2, 4),
        draw(tokens, 2).sigmoid(),
        -draw(2).exp(),
        draw(tokens, 3),
        draw(tokens, 3),
        draw(2),
    ]
    offsets = torch.tensor([0, *lengths, *[0] * unused]).cumsum(0)
    return (*(leaf.requires_grad_() for leaf in leaves), offsets)


@pytest.mark.parametrize(
    ("lengths", "padding", "unused"),
    [
        ([1], 0, 0),
        ([CHUNK - 1], 0, 0),
        ([CHUNK], 0, 0),
        ([CHUNK + 1], 0, 3),
        ([1, 1, 1], 2, 1),
        ([5, CHUNK, 1, 3 * CHUNK + 2, CHUNK - 1], 7, 2),
        ([4 * CHUNK, CHUNK], 0, 0),
    ],
)
def test_values_and_gradients_are_the_recurrence(lengths, padding, unused):
    *leaves, offsets = inputs(lengths, padding, unused)
    ours = ssd_reference(*leaves, offsets, chunk=CHUNK)
    slow = recurrence(*leaves, offsets)
    torch.testing.assert_close(ours, slow)
    weights = torch.randn_like(slow)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, weights),
        torch.autograd.grad(slow, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    "reads",
    [[4], [4, 20, 21, 71, 86], [86, 0, 20, 20, 19, 50]],
    ids=["one", "last", "any"],
)
def test_reading_some_tokens_is_reading_them_of_all(reads):
    """The last tokens of sequences, or any, in any order, repeated; padding behind them."""
    *leaves, offsets = inputs([5, CHUNK, 1, 3 * CHUNK + 2, CHUNK - 1], padding=7, unused=2)
    reads = torch.tensor(reads)
    some = ssd_reference(*leaves, offsets, reads, chunk=CHUNK)
    slow = recurrence(*leaves, offsets).index_select(0, reads)
    torch.testing.assert_close(some, slow)
    weights = torch.randn_like(slow)
    for got, expected in zip(
        torch.autograd.grad(some, leaves, weights),
        torch.autograd.grad(slow, leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)


def test_a_decay_beyond_the_range_of_exp_gives_numbers():
    x, dt, _, B, C, D, offsets = inputs([CHUNK, 5])
    A = torch.full((2,), -1e4, dtype=torch.float64, requires_grad=True)
    y = ssd_reference(x, dt, A, B, C, D, offsets, chunk=CHUNK)
    torch.testing.assert_close(y, recurrence(x, dt, A, B, C, D, offsets))
    for gradient in torch.autograd.grad(y.square().sum(), (x, dt, A, B, C, D)):
        assert torch.isfinite(gradient).all()


def test_padding_gives_zero_and_takes_no_gradient():
    x, dt, A, B, C, D, offsets = inputs([3, 4], padding=5)
    y = ssd_reference(x, dt, A, B, C, D, offsets, chunk=4)
    assert not y[7:].any()
    assert not ssd_reference(x, dt, A, B, C, D, offsets, torch.tensor([9, 7]), chunk=4).any()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert not gradient[7:].any()


def test_nothing_leaks_between_sequences():
    x, dt, A, B, C, D, offsets = inputs([9, 20, 7])
    before = ssd_reference(x, dt, A, B, C, D, offsets, chunk=8)
    changed = x.detach().clone()
    changed[9:29] += 1.0
    after = ssd_reference(changed, dt, A, B, C, D, offsets, chunk=8)
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[29:], after[29:])
    assert not torch.equal(before[9:29], after[9:29])


@pytest.mark.parametrize("width", [1, 4])
def test_convolution_is_each_sequence_alone(width):
    lengths = [1, 2, 6, 3]
    x = torch.randn(12, 5, dtype=torch.float64)
    weight, bias = (
        torch.randn(5, width, dtype=torch.float64),
        torch.randn(5, dtype=torch.float64),
    )
    position = torch.cat([torch.arange(length) for length in lengths])
    packed = causal_conv_reference(x, weight, bias, position)
    alone = []
    for part in x.split(lengths):
        padded = torch.nn.functional.pad(part.T, (width - 1, 0))
        alone.append(torch.nn.functional.conv1d(padded[None], weight[:, None], bias, groups=5)[0].T)
    torch.testing.assert_close(packed, torch.nn.functional.silu(torch.cat(alone)))
