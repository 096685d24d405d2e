"""The encoders: packed equals one by one, causal means causal, and the paper's layer as written."""

import pytest
import torch
from torch import Tensor

from modules.encoder import Encoder, positions

LENGTHS = [1, 2, 9, 1, 30]
WIDTH = 16


def make(kind: str, **changes) -> Encoder:
    torch.manual_seed(0)
    sizes = dict(width=WIDTH, layers=2, state=4, head=8, expand=2, conv=4, dropout=0.0)
    return Encoder(kind, norm_embedding=True, **{**sizes, **changes}).double()


def offsets_of(lengths: list[int], unused: int = 0) -> Tensor:
    return torch.tensor([0, *lengths, *[0] * unused]).cumsum(0)


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_packed_equals_one_by_one_values_and_gradients(kind):
    encoder = make(kind)
    x = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64)
    leaves = [x, *encoder.parameters()]

    padded = torch.cat([x, torch.ones(3, WIDTH)])
    packed = encoder(padded, offsets_of(LENGTHS, unused=2))[: len(x)]
    alone = torch.cat([encoder(part, offsets_of([len(part)])) for part in x.split(LENGTHS)])

    torch.testing.assert_close(packed, alone)
    together = torch.autograd.grad((packed * weights).sum(), leaves)
    apart = torch.autograd.grad((alone * weights).sum(), leaves)
    for got, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(got, expected)


def test_causal_reads_no_later_token():
    encoder = make("causal")
    x = torch.randn(20, WIDTH, dtype=torch.float64)
    before = encoder(x, offsets_of([20]))
    x[12:] += torch.randn(8, WIDTH)
    after = encoder(x, offsets_of([20]))
    assert torch.equal(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_read_positions_pick_the_rows():
    encoder = make("bidirectional")
    x = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64)
    last = offsets_of(LENGTHS)[1:] - 1
    everything = encoder(x, offsets_of(LENGTHS))
    assert torch.equal(encoder(x, offsets_of(LENGTHS), last), everything[last])


def test_positions_and_reversal():
    position, reverse = positions(offsets_of([2, 3], unused=1), 7)
    assert position.tolist() == [0, 1, 0, 1, 2, 0, 1]
    assert reverse.tolist() == [1, 0, 4, 3, 2, 6, 5]


@pytest.mark.parametrize("restore_order", [False, True])
def test_bidirectional_layer_is_the_papers_formula(restore_order):
    encoder = make("bidirectional", layers=1, beta=0.3, restore_order=restore_order)
    layer = encoder.layers[0]
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    offsets = offsets_of([7])
    position, reverse = positions(offsets, 7)
    backward = layer.mixer(x.flip(0), offsets, position)
    if restore_order:
        backward = backward.flip(0)
    hidden = layer.norm1(layer.mixer(x, offsets, position) + 0.3 * backward + x)
    inner = torch.nn.functional.gelu(hidden @ layer.feed_forward.w1.weight.T)
    expected = layer.norm2(inner @ layer.feed_forward.w2.weight.T + hidden)
    layer.feed_forward.w1.bias.data.zero_()
    layer.feed_forward.w2.bias.data.zero_()
    torch.testing.assert_close(layer(x, offsets, position, reverse), expected)


def test_initialisation_is_the_published_one():
    torch.manual_seed(2)
    mixer = make("causal", width=128, layers=1).layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert ((dt > 0.99e-3) & (dt < 0.101)).all()
    assert ((mixer.A_log.exp() >= 1) & (mixer.A_log.exp() <= 16)).all()
    assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.conv_weight.abs().max() <= 0.5
    assert (mixer.D == 1).all()


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_scripted_equals_eager(kind):
    encoder = make(kind).float().eval()
    scripted = torch.jit.script(encoder)
    x, offsets = torch.randn(sum(LENGTHS), WIDTH), offsets_of(LENGTHS)
    torch.testing.assert_close(scripted(x, offsets), encoder(x, offsets))


def test_head_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="head size 24 does not divide"):
        make("causal", head=24)
