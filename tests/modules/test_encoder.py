"""The encoders: packed equals one by one, causal means causal, and the paper's layer as written."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.encoder import Encoder, positions
from modules.fused import dropout, permute_rows_op, project_residual
from modules.ssd import causal_conv_reference, ssd_reference

LENGTHS = [1, 2, 9, 1, 30]
WIDTH = 16


def make(kind: str, **changes) -> Encoder:
    torch.manual_seed(0)
    sizes = dict(width=WIDTH, layers=2, state=4, head=8, expand=2, conv=4, dropout=0.0)
    return Encoder(kind, **{**sizes, "norm_embedding": True, **changes}).double()


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


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 1},
        {"layers": 3, "conv": 2, "head": 16},
        {"conv": 1},
        {"norm_embedding": False},
    ],
)
@torch.no_grad()
def test_steps_give_what_the_whole_history_gives(changes):
    """Three sequences in step, every token of each, from a state of zeros."""
    encoder = make("causal", dropout=0.3, **changes).eval()
    x = torch.randn(3, 40, WIDTH, dtype=torch.float64)
    whole = encoder(x.flatten(0, 1), offsets_of([40] * 3)).view(x.shape)
    state = torch.zeros(3, encoder.state_numbers, dtype=torch.float64)
    for event in range(40):
        h, state = encoder.step(x[:, event], state)
        torch.testing.assert_close(h, whole[:, event])
    assert state.shape == (3, encoder.state_numbers)


def test_a_bidirectional_encoder_has_no_state():
    encoder = make("bidirectional")
    with pytest.raises(RuntimeError, match="reads whole histories and has no state"):
        encoder.step(torch.zeros(1, WIDTH), torch.zeros(1, encoder.state_numbers))


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


# What the layers have to read. The last two sequences of a batch are unused: their read position
# is token 0, as the packer writes it.
READ = {
    "last": lambda offsets: offsets[1:-2] - 1,
    "last, unused sequences": lambda offsets: torch.cat([offsets[1:-2] - 1, offsets[:1].repeat(2)]),
    "any, unordered, repeated": lambda offsets: torch.tensor([40, 3, 0, 3, 17]),
}


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize(
    ("kind", "restore_order"),
    [("causal", False), ("bidirectional", False), ("bidirectional", True)],
)
def test_read_out_equals_rows_of_everything_values_and_gradients(kind, restore_order, read):
    encoder = make(kind, restore_order=restore_order, beta=0.4)
    offsets = offsets_of(LENGTHS, unused=2)
    x = torch.randn(sum(LENGTHS) + 3, WIDTH, dtype=torch.float64, requires_grad=True)
    read_S = READ[read](offsets)
    leaves = [x, *encoder.parameters()]
    got = gradients(encoder(x, offsets, read_S), leaves)
    expected = gradients(encoder(x, offsets)[read_S], leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_read_out_computes_only_the_rows_it_needs(kind, monkeypatch):
    encoder = make(kind)
    rows, projected = [], []
    last = encoder.layers[-1]
    last.mixer.out_proj.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    last.feed_forward.register_forward_hook(lambda _, __, out: rows.append(len(out[0])))

    def recorded(x_TD, weight, **options):
        projected.append((len(x_TD), len(weight)))
        return project_residual(x_TD, weight, **options)

    monkeypatch.setattr("modules.encoder.project_residual", recorded)
    x, offsets = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64), offsets_of(LENGTHS)
    encoder(x, offsets, offsets[1:] - 1)
    assert rows == [len(LENGTHS)] * 2
    wide, inner = len(last.mixer.in_proj.weight), 4 * WIDTH
    # The last layer projects z at the read positions alone, not together with the rest.
    assert projected == [(len(x), wide), (len(x), inner), (len(LENGTHS), inner)]


def plain_layer(layer, x, offsets, restore_order):
    """The paper's layer as a composition of whole blocks, one a direction."""
    position, reverse = positions(offsets, len(x))
    mixer = layer.mixer

    def block(u):
        inner, state = mixer.inner, mixer.state
        z, xBC, dt = mixer.in_proj(u).split([inner, inner + 2 * state, mixer.heads], 1)
        xBC = causal_conv_reference(xBC, mixer.conv_weight, mixer.conv_bias, position)
        x, B, C = xBC.split([inner, state, state], 1)
        dt, A = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp()
        y = ssd_reference(x.unflatten(1, (mixer.heads, -1)), dt, A, B, C, mixer.D, offsets)
        gated = y.flatten(1) * F.silu(z)
        return mixer.out_proj(F.rms_norm(gated, [inner], mixer.norm_weight, 1e-5))

    mixed = block(x)
    if layer.bidirectional:
        backward = block(x[reverse])
        mixed = mixed + layer.beta * (backward[reverse] if restore_order else backward)
    hidden = layer.norm1(mixed + x)
    feed_forward = layer.feed_forward
    return layer.norm2(feed_forward.w2(F.gelu(feed_forward.w1(hidden))) + hidden)


@pytest.mark.parametrize(
    ("kind", "restore_order"),
    [("causal", False), ("bidirectional", False), ("bidirectional", True)],
)
def test_layer_equals_the_plain_composition_values_and_gradients(kind, restore_order):
    encoder = make(kind, layers=1, beta=0.3, restore_order=restore_order)
    layer = encoder.layers[0]
    with torch.no_grad():  # biases and norms away from where they start
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    offsets = offsets_of(LENGTHS, unused=1)
    x = torch.randn(sum(LENGTHS) + 2, WIDTH, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    got = gradients(layer(x, offsets, *positions(offsets, len(x))), leaves)
    expected = gradients(plain_layer(layer, x, offsets, restore_order), leaves)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_autocast_streams_bf16_returns_the_inputs_dtype_and_stays_close(kind):
    encoder = make(kind, width=64, state=16, head=32).float()
    offsets = offsets_of(LENGTHS)
    x = torch.randn(sum(LENGTHS), 64)
    streams = []
    encoder.layers[1].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = encoder(x, offsets)
    assert streams == [torch.bfloat16]
    assert got.dtype == torch.float32
    expected = encoder.double()(x.double(), offsets)
    assert (got - expected).norm() / expected.norm() < 1e-2


def project_and_add(project):
    """What the encoder does with `project_residual`: the residual meets one sum."""

    def run(x, weight):
        product, residual = project(x, weight)
        return torch.tanh(product).sum(1, keepdim=True) * weight.sum() + residual.square()

    return run


def plain_projection(x, weight):
    return F.linear(x, weight), x


def test_project_residual_gradcheck():
    torch.manual_seed(1)
    x, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3))
    assert torch.autograd.gradcheck(project_and_add(project_residual), (x, weight))


@pytest.mark.parametrize(
    ("kind", "autocast"),
    [(torch.float64, False), (torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_project_residual_equals_the_plain_form(kind, autocast):
    torch.manual_seed(2)
    x = torch.randn(40, 16).to(kind).requires_grad_()
    weight_kind = torch.float32 if autocast else kind
    weight = torch.randn(24, 16).to(weight_kind).requires_grad_()
    answers = []
    for project in (project_residual, plain_projection):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = project_and_add(project)(x, weight)
        answers.append([out, *torch.autograd.grad(out.float().sum(), [x, weight])])
    assert answers[0][1].dtype == kind
    assert answers[0][2].dtype == weight_kind
    tolerance = 1e-2 if autocast else 1e-5
    for got, expected in zip(*answers, strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= tolerance * expected.norm()


def test_dropout_is_fair_scaled_and_governed_by_the_seed():
    x = torch.ones(300, 333)
    torch.manual_seed(5)
    first, second = dropout(x, 0.3), dropout(x, 0.3)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.3))
    assert not torch.equal(first, second)
    kept = first != 0
    assert kept.float().mean().item() == pytest.approx(0.7, abs=0.006)
    assert first.max().item() == pytest.approx(1 / 0.7, rel=1e-4)
    assert (kept[:, 1:] & kept[:, :-1]).float().mean().item() == pytest.approx(0.49, abs=0.008)
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_dropout_in_training_only(kind):
    encoder = make(kind, dropout=0.5)
    x, offsets = torch.randn(sum(LENGTHS), WIDTH, dtype=torch.float64), offsets_of(LENGTHS)
    assert not torch.equal(encoder(x, offsets), encoder(x, offsets))
    encoder.eval()
    assert torch.equal(encoder(x, offsets), encoder(x, offsets))


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
    backward, _ = layer.mixer(x.flip(0), offsets, position)
    if restore_order:
        backward = backward.flip(0)
    hidden = layer.norm1(layer.mixer(x, offsets, position)[0] + 0.3 * backward + x)
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
def test_scripted_equals_eager(kind):
    encoder = make(kind).float().eval()
    scripted = torch.jit.script(encoder)
    x, offsets = torch.randn(sum(LENGTHS), WIDTH), offsets_of(LENGTHS)
    torch.testing.assert_close(scripted(x, offsets), encoder(x, offsets))
    last = offsets[1:] - 1
    torch.testing.assert_close(scripted(x, offsets, last, True), encoder(x, offsets, last, True))


def test_head_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="head size 24 does not divide"):
        make("causal", head=24)


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ValueError, match="at least 1 layer"):
        make("causal", layers=0)


def test_permute_rows_opcheck():
    x = torch.randn(5, 3, requires_grad=True)
    torch.library.opcheck(permute_rows_op, (x, torch.tensor([1, 0, 4, 3, 2])))
