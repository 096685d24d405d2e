"""Losses against plain log-softmax, values and gradients, whole and in chunks."""

import pytest
import torch

from data.schema import PADDING_ROW, RESERVED_ROWS
from modules import losses
from modules.losses import FullSoftmax, SampledSoftmax, logsumexp_reference
from modules.repeats import SeenItems

WIDTH = 8


def problem(positions: int = 20, rows: int = 40):
    torch.manual_seed(0)
    h = torch.randn(positions, WIDTH, dtype=torch.float64, requires_grad=True)
    c = torch.randn(rows, WIDTH, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(RESERVED_ROWS, rows, (positions,))
    targets[3::4] = PADDING_ROW
    return h, c, targets


def assert_same(ours, expected, leaves):
    torch.testing.assert_close(ours, expected)
    for got, wanted in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_full_softmax_is_cross_entropy_over_the_items():
    h, c, targets = problem()
    ours = FullSoftmax(rank=0)(h, targets, c, torch.arange(40), None)
    real = targets != PADDING_ROW
    expected = torch.nn.functional.cross_entropy(
        h[real] @ c[RESERVED_ROWS:].T, targets[real] - RESERVED_ROWS, reduction="sum"
    )
    assert_same(ours, expected, (h, c))


def test_hidden_states_cross_between_ranks_in_the_dtype_of_the_products(monkeypatch):
    sent = []
    monkeypatch.setattr(losses, "all_gather", lambda x: sent.append(x.dtype) or x)
    h, c, targets = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = FullSoftmax(rank=0)(h.float(), targets, c.float(), torch.arange(40), None)
    assert sent == [torch.bfloat16, torch.int64]
    assert total.dtype == torch.float32


def test_full_softmax_ignores_padding_behind_the_table():
    h, c, targets = problem(rows=37)
    padded = torch.cat([c, torch.ones(3, WIDTH, dtype=torch.float64)])
    ids = torch.arange(40).where(torch.arange(40) < 37, PADDING_ROW)
    ours = FullSoftmax(rank=0)(h, targets, padded, ids, None)
    torch.testing.assert_close(ours, FullSoftmax(rank=0)(h, targets, c, torch.arange(37), None))


def histories(score: torch.Tensor) -> SeenItems:
    """Of 12 and 8 positions, two tokens without a position between them, read in any order."""
    items = torch.randint(RESERVED_ROWS, 24, (22,), generator=torch.Generator().manual_seed(3))
    read = torch.tensor([*range(12), *range(21, 13, -1)])
    return SeenItems.of(items, torch.tensor([0, 12, 22, 22]), read, score)


def held(one: SeenItems, position: int) -> set[int]:
    """The items of a position's history, by looking."""
    token = int(one.token_S[position])
    start = 0 if token < 12 else 12
    return set(one.items_T[start : token + 1].tolist())


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_full_softmax_with_repeats_and_smoothing_is_the_formula(smoothing):
    h, c, targets = problem()
    score = torch.randn(20, dtype=torch.float64, requires_grad=True)
    one = histories(score)
    targets[1], targets[15] = one.items_T[0], one.items_T[14]  # repeats are targets too
    ours = FullSoftmax(0, smoothing=smoothing)(h, targets, c, torch.arange(40), None, one)
    expected = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(targets.tolist()):
        if target == PADDING_ROW:
            continue
        plain = c[RESERVED_ROWS:] @ h[t]
        mine = torch.tensor([row in held(one, t) for row in range(RESERVED_ROWS, 40)])
        logits = plain + score[t] * mine
        wanted = (1 - smoothing) * logits[target - RESERVED_ROWS] + smoothing * plain.mean()
        expected = expected + torch.logsumexp(logits, 0) - wanted
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    for got, want in zip(
        torch.autograd.grad(ours, (h, c, score)),
        torch.autograd.grad(expected, (h, c, score)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("in_batch", [False, True])
def test_sampled_softmax_with_repeats_is_the_formula(in_batch):
    h, table, targets = problem()
    score = torch.randn(20, dtype=torch.float64, requires_grad=True)
    one = histories(score)
    targets[1], targets[15] = one.items_T[0], one.items_T[14]
    negatives = torch.randint(RESERVED_ROWS, 40, (30,))  # some of them twice
    ids = torch.cat([negatives, targets])
    log_counts = torch.randn(50, dtype=torch.float64)
    loss = SampledSoftmax(30, in_batch, True)
    ours = loss(h, targets, table[ids], ids, log_counts, one)
    expected = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(targets.tolist()):
        if target == PADDING_ROW:
            continue
        logits = [h[t] @ table[target] + score[t] * (target in held(one, t))]
        for place, rival in enumerate((ids if in_batch else negatives).tolist()):
            if rival not in (target, PADDING_ROW):
                value = h[t] @ table[rival] + score[t] * (rival in held(one, t))
                logits.append(value - log_counts[place])
        expected = expected + torch.logsumexp(torch.stack(logits), 0) - logits[0]
    assert_same(ours, expected, (h, table, score))


@pytest.mark.parametrize(("draws", "in_batch"), [(12, False), (12, True), (0, True)])
@pytest.mark.parametrize("logq", [False, True])
def test_sampled_softmax_is_the_formula(draws, in_batch, logq):
    h, table, targets = problem()
    negatives = torch.randint(RESERVED_ROWS, 40, (draws,))
    negatives[:1] = targets[0]  # an accidental hit
    ids = torch.cat([negatives, targets])
    log_counts = torch.randn(draws + 20, dtype=torch.float64)
    ours = SampledSoftmax(draws, in_batch, logq)(h, targets, table[ids], ids, log_counts)

    rivals = ids if in_batch else negatives
    expected = torch.zeros((), dtype=torch.float64)
    for t, target in enumerate(targets.tolist()):
        if target == PADDING_ROW:
            continue
        logits = [h[t] @ table[target]]
        for place, rival in enumerate(rivals.tolist()):
            if rival != target and rival != PADDING_ROW:
                score = h[t] @ table[rival]
                logits.append(score - log_counts[place] if logq else score)
        expected = expected + torch.logsumexp(torch.stack(logits), 0) - logits[0]
    assert_same(ours, expected, (h, table))


def test_sampled_softmax_without_a_rival_costs_nothing():
    h, table, _ = problem(positions=2)
    targets = torch.tensor([9, 9])
    ids = torch.tensor([9, 9, 9])
    loss = SampledSoftmax(1, True, True)(h, targets, table[ids], ids, torch.zeros(3))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, (h, table)):
        assert not gradient.any()


@pytest.mark.parametrize("logit_bytes", [1, 4 * 40 * 7, 1 << 20])
def test_chunks_change_nothing(logit_bytes):
    h, c, targets = problem()
    ids, bias = torch.arange(40), torch.randn(40, dtype=torch.float64)
    ours, _ = logsumexp_reference(h, c, bias, ids, targets, logit_bytes=logit_bytes)
    logits = (h @ c.T + bias).masked_fill(ids == targets[:, None], -torch.inf)
    weights = torch.randn(20, dtype=torch.float64)
    assert_same((ours * weights).sum(), (torch.logsumexp(logits, 1) * weights).sum(), (h, c))


def test_gradients_by_finite_differences():
    h, c, targets = problem(positions=3, rows=12)
    bias = torch.randn(12, dtype=torch.float64)
    places = torch.tensor([4, -1, 0])
    torch.autograd.gradcheck(
        lambda h, c: logsumexp_reference(
            h, c, bias, torch.arange(12), targets, places, logit_bytes=100
        ),
        (h, c),
    )
