"""The catalogue's top k against all scores in float64, and the kernel scorer against the bundle's.

`problem` and `assert_exact` also serve the card (tests/gpu/test_catalogue_gpu.py).
"""

import pytest
import torch

from data.schema import RESERVED_ROWS
from modules.catalogue import COLUMNS, Catalogue, RepeatPairs
from modules.encoder import Encoder
from modules.kernel_scorer import TOKEN_BITS, USER_BITS, KernelScorer, rounded_up
from modules.scorer import NO_ROW, Scorer, quantise

CPU = torch.device("cpu")
NOTHING = torch.zeros(0, dtype=torch.int64)


def problem(users, rows, width, device=CPU, seed=0):
    """Vectors, a table whose rows differ in length, and pairs to leave out: the best among them."""
    g = torch.Generator(device).manual_seed(seed)
    h_BD = torch.randn(users, width, generator=g, device=device)
    rows_VD = torch.randn(rows, width, generator=g, device=device)
    rows_VD *= 0.5 + torch.rand(rows, 1, generator=g, device=device)
    best = (h_BD @ rows_VD.T).topk(min(5, rows), dim=1).indices.flatten()
    other = torch.randint(0, rows, (7 * users,), generator=g, device=device)
    items_N = torch.cat([best, other, other[:3]])  # some twice
    users_N = torch.arange(users, device=device).repeat_interleave(min(5, rows))
    users_N = torch.cat(
        [users_N, torch.randint(0, users, (len(other),), generator=g, device=device)]
    )
    return h_BD, rows_VD, items_N, torch.cat([users_N, users_N[len(best) : len(best) + 3]])


def exact_scores(h_BD, values_VD, items_N, users_N, allowed_V=None):
    """Scores of all rows in float64, -inf where they may not be recommended."""
    scores_BV = h_BD.double() @ values_VD.double().T
    scores_BV[:, :RESERVED_ROWS] = -torch.inf
    if allowed_V is not None:
        scores_BV[:, ~allowed_V] = -torch.inf
    scores_BV[users_N, items_N] = -torch.inf
    return scores_BV


def assert_exact(answer, scores_BV, k):
    """The k best scores, in order, and rows that have them: equal scores may change places."""
    rows_BK, scores_BK = answer
    assert scores_BK.dtype == torch.float32
    want = scores_BV.topk(min(k, scores_BV.shape[1]), dim=1).values
    want = torch.nn.functional.pad(want, (0, k - want.shape[1]), value=-torch.inf)
    scale = scores_BV.nan_to_num(neginf=0.0).abs().max()
    torch.testing.assert_close(scores_BK.double(), want, rtol=0, atol=1e-6 * scale.item())
    real_BK = want > -torch.inf
    assert torch.equal(rows_BK != NO_ROW, real_BK)
    found = scores_BV.gather(1, rows_BK.clamp(min=0)).where(real_BK, -torch.inf)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6 * scale.item())
    for row_K in rows_BK:
        assert len(row_K[row_K >= 0].unique()) == (row_K >= 0).sum()


@pytest.mark.parametrize(
    ("users", "rows", "width", "k"),
    [
        (1, 9, 4, 3),
        (5, 60, 8, 70),
        (3, COLUMNS + 7, 16, 10),
        (7, 8 + COLUMNS, 12, 5),
        (9, 30_011, 20, 40),
    ],
)
@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_top_is_that_of_all_scores(users, rows, width, k, blocks, kind):
    h_BD, rows_VD, items_N, users_N = problem(users, rows, width)
    stored_VD, scales_V = quantise(rows_VD, kind)
    sizes = {} if blocks == "one" else {"score_bytes": 4 * 2 * 1024, "block_items": 1000}
    for allowed_V in (None, torch.rand(rows, generator=torch.Generator().manual_seed(1)) < 0.7):
        if allowed_V is not None:
            allowed_V[-1] = True
        catalogue = Catalogue(stored_VD, scales_V, allowed_V, **sizes)
        rows_BK, scores_BK, proved_B = catalogue.top(h_BD, k, items_N, users_N)
        assert proved_B.all()
        values_VD = catalogue.look_up(torch.arange(rows))
        exact = exact_scores(h_BD, values_VD, items_N, users_N, allowed_V)
        assert_exact((rows_BK, scores_BK), exact, k)


def repeats_of(rows, pairs, size, seed=2):
    """Pairs, some twice, with repeat scores of this size, of both signs."""
    g = torch.Generator().manual_seed(seed)
    items_P, users_P = pairs
    score_B = torch.randn(int(users_P.max()) + 1, generator=g) * size
    return RepeatPairs(items_P, users_P, score_B, (users_P * rows + items_P).sort().values)


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("blocks", ["one", "many"])
def test_repeats_score_more(size, blocks):
    h_BD, rows_VD, items_P, users_P = problem(9, 5_000, 24)
    repeats = repeats_of(len(rows_VD), (items_P, users_P), size)
    sizes = {} if blocks == "one" else {"score_bytes": 4 * 2 * 1024, "block_items": 1000}
    catalogue = Catalogue(rows_VD, **sizes)
    left_out = items_P[::3], users_P[::3]
    rows_BK, scores_BK, proved_B = catalogue.top(h_BD, 40, *left_out, repeats)
    assert proved_B.all()
    exact = exact_scores(h_BD, rows_VD, *left_out)
    pairs_P2 = torch.stack([users_P, items_P], 1).unique(dim=0)
    exact[pairs_P2[:, 0], pairs_P2[:, 1]] += repeats.score_B[pairs_P2[:, 0]].double()
    assert_exact((rows_BK, scores_BK), exact, 40)


@pytest.mark.parametrize("rows", [100, 5_000])
def test_a_repeat_score_beyond_fp16_proves_nothing(rows):
    """Also where every item is a candidate: a score far below would pass for one left out."""
    h_BD, rows_VD, *pairs = problem(9, rows, 24)
    *_, proved_B = Catalogue(rows_VD).top(
        h_BD, 40, NOTHING, NOTHING, repeats_of(len(rows_VD), pairs, 1e6)
    )
    assert not proved_B.any()


def test_nobody_has_anything_left_out():
    h_BD, rows_VD, *_ = problem(4, 500, 8)
    rows_BK, scores_BK, proved_B = Catalogue(rows_VD).top(h_BD, 9, NOTHING, NOTHING)
    assert proved_B.all()
    assert_exact((rows_BK, scores_BK), exact_scores(h_BD, rows_VD, NOTHING, NOTHING), 9)


def test_the_bound_holds_and_is_no_larger_than_it_has_to_be():
    """Nearly equal components make the largest errors: all of one sign, below a power of two."""
    for width in (16, 256):
        rows_VD = 1.0 + 2.0**-12 + torch.rand(4000, width) * 2.0**-10
        h_BD = 1.0 + 2.0**-12 + torch.rand(3, width) * 2.0**-10
        catalogue = Catalogue(rows_VD)
        question = catalogue._question(h_BD, NOTHING, NOTHING, None)
        approx_BC, row_BC = catalogue._candidates(question, 4000)
        scale_B1 = question.scale_B.double().unsqueeze(1)
        exact_BC = (h_BD.double() @ rows_VD.double().T * scale_B1).gather(1, row_BC.clamp(min=0))
        error_BC = (approx_BC - exact_BC).where(row_BC >= 0, 0.0).abs()
        assert error_BC.max() <= catalogue.error
        assert error_BC.max() > catalogue.error / 8


def close_rows(rows, width):
    """Scores that fall by less than fp16 can tell: no proof is possible."""
    return torch.ones(rows, width) + torch.arange(rows).unsqueeze(1) * 2.0**-22


def test_what_cannot_be_proved_says_so():
    rows_VD = close_rows(2000, 8)
    h_BD = torch.stack([torch.ones(8), torch.zeros(8), torch.full([8], torch.nan)])
    *_, proved_B = Catalogue(rows_VD).top(h_BD, 10, NOTHING, NOTHING)
    assert not proved_B.any()


def scripted(rows_VD, blocks, kind="fp32", **sizes):
    """A scripted scorer as a bundle holds it, with its rows, and its encoder's config."""
    torch.manual_seed(0)
    config = {"kind": "causal", "width": rows_VD.shape[1], "layers": 2, "state": 4, "head": 8}
    config |= {"expand": 2, "conv": 4, "dropout": 0.3, "norm_embedding": True} | sizes
    encoder = Encoder(**config)
    if encoder.repeats:
        torch.nn.init.normal_(encoder.repeat.weight)
    scorer = torch.jit.script(Scorer(encoder))
    parts = [quantise(part, kind) for part in rows_VD.split(blocks)]
    scales = [scale for _, scale in parts if scale is not None]
    scorer.set_rows([part for part, _ in parts], scales)
    return scorer, config


LENGTHS = [5, 1, 290, 17, 64]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("repeats", [False, True])
def test_kernel_scorer_answers_as_the_bundles_model(kind, exclude_seen, repeats):
    rows_VD = torch.randn(700, 16, generator=torch.Generator().manual_seed(3))
    model, config = scripted(rows_VD, 150, kind, repeats=repeats)
    items_T = torch.randint(8, 700, (sum(LENGTHS),), dtype=torch.int32)
    offsets_B1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    pairs = torch.tensor([9, 40, 600, 600]), torch.tensor([0, 0, 3, 4])
    allowed_V = torch.ones(700, dtype=torch.bool)
    allowed_V[300:350] = False
    expected = model(items_T.long(), offsets_B1, 12, exclude_seen, *pairs, allowed_V)
    scorer = KernelScorer(model, config, CPU, "fp32", allowed_V)
    rows, scores = scorer.launch(items_T, offsets_B1, 12, exclude_seen, pairs)()
    assert scorer.rescored == 0
    assert torch.equal(rows, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=1e-5, atol=1e-5)
    again = model(items_T.long(), offsets_B1, 12, exclude_seen, *pairs, allowed_V)
    assert torch.equal(again[0], expected[0])  # its rows are one block now


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("pads", [False, True])  # True: as on a GPU
def test_users_without_a_proof_are_ranked_in_full(monkeypatch, exclude_seen, pads):
    """Some have one and some not: here by a bound that is too large for most."""
    monkeypatch.setattr("modules.kernel_scorer.USER_BITS", 0)  # 5 users become 8
    rows_VD = torch.randn(3000, 16, generator=torch.Generator().manual_seed(3))
    model, config = scripted(rows_VD, 3000, repeats=True)
    items_T = torch.randint(8, 3000, (sum(LENGTHS),))
    offsets_B1 = torch.tensor([0, *LENGTHS]).cumsum(0)
    pairs = torch.tensor([9, 40]), torch.tensor([1, 3])
    expected = model(items_T, offsets_B1, 20, exclude_seen, *pairs)
    scorer = KernelScorer(model, config, CPU, "fp32")
    h_BD = scorer.hidden(items_T, offsets_B1)
    question = scorer.catalogue._question(h_BD, NOTHING, NOTHING, None)
    approx_BC, _ = scorer.catalogue._candidates(question, 256)
    _, best_BK, _ = scorer.catalogue.top(h_BD, 20, NOTHING, NOTHING)
    gap_B = best_BK[:, -1] * question.scale_B - approx_BC.amin(1)
    scorer.catalogue.error = float(gap_B.sort().values[2])
    scorer.pads = pads
    sizes = [len(one) for one in scorer._padded(items_T, offsets_B1)]
    assert sizes == ([384, 9] if pads else [377, 6])
    rows, scores = scorer.launch(items_T, offsets_B1, 20, exclude_seen, pairs)()
    assert 0 < scorer.rescored < len(LENGTHS)
    assert torch.equal(rows, expected[0])
    torch.testing.assert_close(scores, expected[1], rtol=1e-5, atol=1e-5)


def test_sizes_are_few_and_not_much_larger():
    assert rounded_up(261_993, TOKEN_BITS) == 262_144
    assert [rounded_up(users, USER_BITS) for users in (1, 31, 33, 1_024, 1_470)] == [
        1, 31, 34, 1_024, 1_472,
    ]  # fmt: skip
    for bits in (TOKEN_BITS, USER_BITS):
        found = [rounded_up(number, bits) for number in range(1, 5_000)]
        assert all(0 <= up - number <= number / 2**bits for number, up in enumerate(found, 1))
        assert sum(up > 1_024 for up in set(found)) <= 3 * 2**bits


def test_large_batches_are_done_in_even_blocks():
    catalogue = Catalogue(torch.randn(200, 4), score_bytes=2 * COLUMNS * 300)
    assert catalogue.most_users == 300
    assert [catalogue._users_at_once(users) for users in (1, 300, 301, 599)] == [128, 300, 256, 300]
