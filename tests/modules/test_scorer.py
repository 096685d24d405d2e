"""The exported scorer against a plain computation: one history at a time, all scores at once."""

import pytest
import torch
from torch import Tensor

from data.schema import RESERVED_ROWS
from modules.encoder import Encoder
from modules.scorer import NO_ROW, Scorer, quantise

WIDTH, TABLE_ROWS = 16, 60
LENGTHS = [5, 1, 0, 290, 17, 0]  # few reads among many tokens


def make(
    kind: str = "causal", score_bytes: int = 1 << 20, repeats: bool = False
) -> tuple[Scorer, Tensor]:
    torch.manual_seed(0)
    sizes = (WIDTH, 2, 4, 8, 2, 4)
    encoder = Encoder(kind, *sizes, dropout=0.3, norm_embedding=True, repeats=repeats)
    if repeats:
        torch.nn.init.normal_(encoder.repeat.weight)
    return Scorer(encoder, score_bytes), torch.randn(TABLE_ROWS, WIDTH)


def histories() -> list[Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(RESERVED_ROWS, TABLE_ROWS, (n,), generator=random) for n in LENGTHS]


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(parts), torch.tensor([0, *map(len, parts)]).cumsum(0)


def plain(encoder: Encoder, table: Tensor, history: Tensor, k: int, exclude: Tensor):
    """The k best of one history: all products, one sort."""
    offsets = torch.tensor([0, len(history)])
    h_D = encoder.eval()(table[history], offsets)[-1]
    scores_V = table @ h_D
    if encoder.repeats:
        scores_V[history.unique()] += encoder.repeat_score(h_D[None])
    scores_V[:RESERVED_ROWS] = -torch.inf
    scores_V[exclude] = -torch.inf
    scores, rows = scores_V.sort(descending=True)
    return rows[:k].where(scores[:k] > -torch.inf, NO_ROW), scores[:k]


@pytest.mark.parametrize(
    ("kind", "repeats"), [("causal", False), ("bidirectional", False), ("causal", True)]
)
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("score_bytes", [1, 4 * 6 * 7, 1 << 20])
@torch.no_grad()
def test_packed_and_in_blocks_equals_plain(kind, repeats, exclude_seen, score_bytes):
    scorer, table = make(kind, score_bytes, repeats)
    scorer.set_rows(list(table.split(23)), [])
    parts, k = histories(), 12
    rows, scores = scorer(*packed(parts), k, exclude_seen)
    for number, history in enumerate(parts):
        if len(history):
            seen = history if exclude_seen else history[:0]
            expected, values = plain(scorer.encoder, table, history, k, seen)
            assert torch.equal(rows[number], expected)
            torch.testing.assert_close(scores[number], values)


@pytest.mark.parametrize(
    ("kind", "repeats"), [("causal", False), ("bidirectional", False), ("causal", True)]
)
def test_scripted_equals_eager_also_after_saving(kind, repeats, tmp_path):
    scorer, table = make(kind, repeats=repeats)
    torch.jit.script(scorer).save(tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    for one in (scorer, loaded):
        one.set_rows(list(table.split(25)), [])
    inputs = packed(histories())
    for _ in range(3):  # TorchScript compiles anew after its first calls
        got, expected = loaded(*inputs, 9, not repeats), scorer(*inputs, 9, not repeats)
        assert torch.equal(got[0], expected[0])
        torch.testing.assert_close(got[1], expected[1])


def test_an_empty_history_and_a_spent_catalogue_end_in_no_row():
    scorer, table = make()
    scorer.set_rows([table], [])
    rows, scores = scorer(*packed(histories()), TABLE_ROWS + 5, True)
    for number, history in enumerate(histories()):
        remain = TABLE_ROWS - RESERVED_ROWS - len(history.unique()) if len(history) else 0
        assert (rows[number, :remain] >= RESERVED_ROWS).all()
        assert (rows[number, remain:] == NO_ROW).all()
        assert (scores[number, remain:] == -torch.inf).all()
        assert len(rows[number, :remain].unique()) == remain
        assert not torch.isin(rows[number], history).any()


def test_nothing_but_empty_histories():
    scorer, table = make()
    scorer.set_rows([table], [])
    rows, scores = scorer(torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), 3)
    assert rows.tolist() == [[NO_ROW] * 3] * 3
    assert (scores == -torch.inf).all()


def test_padding_tokens_change_nothing():
    scorer, table = make()
    scorer.set_rows([table], [])
    items, offsets = packed(histories())
    expected = scorer(items, offsets, 7, True)
    got = scorer(torch.cat([items, torch.zeros(9, dtype=torch.int64)]), offsets, 7, True)
    assert torch.equal(got[0], expected[0])


@torch.no_grad()
def test_further_pairs_are_left_out():
    scorer, table = make(score_bytes=64)
    scorer.set_rows(list(table.split(31)), [])
    parts = histories()
    items, sequences = torch.tensor([9, 40, 59, 59]), torch.tensor([0, 0, 3, 1])
    rows, _ = scorer(*packed(parts), 10, True, items, sequences)
    for number, history in enumerate(parts):
        if len(history):
            exclude = torch.cat([history, items[sequences == number]])
            expected, _ = plain(scorer.encoder, table, history, 10, exclude)
            assert torch.equal(rows[number], expected)


@torch.no_grad()
def test_only_allowed_rows_are_recommended():
    scorer, table = make(score_bytes=64)
    scorer.set_rows(list(table.split(31)), [])
    allowed = torch.zeros(TABLE_ROWS, dtype=torch.bool)
    allowed[[2, 9, 30, 31, 59]] = True  # 2 is reserved
    rows, _ = scorer(*packed(histories()), 6, False, allowed_V=allowed)
    for number, history in enumerate(histories()):
        if len(history):
            others = (~allowed).nonzero().squeeze(1)
            expected, _ = plain(scorer.encoder, table, history, 6, others)
            assert torch.equal(rows[number], expected)
            assert (rows[number] == NO_ROW).sum() == 2


@pytest.mark.parametrize("scripted", [False, True])
def test_a_state_moved_event_by_event_scores_as_the_whole_history(scripted):
    scorer, table = make()
    model = torch.jit.script(scorer) if scripted else scorer
    model.set_rows(list(table.split(25)), [])
    parts = [part for part in histories() if len(part)]
    states = torch.zeros(len(parts), model.state_numbers)
    for event in range(max(map(len, parts))):
        going = torch.tensor([n for n, part in enumerate(parts) if event < len(part)])
        items = torch.stack([parts[n][event] for n in going])
        states[going] = model.advance(states[going], items)
    expected_h = model.hidden(*packed(parts))
    torch.testing.assert_close(states[:, -WIDTH:], expected_h, rtol=1e-4, atol=1e-5)
    nothing = torch.zeros(0, dtype=torch.int64)
    rows, scores = model.top(states[:, -WIDTH:], 12, nothing, nothing)
    expected_rows, expected = model(*packed(parts), 12, False)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "bound"), [("fp16", 2**-11), ("int8", 0.5 / 127)])
def test_quantised_rows_are_off_by_at_most_their_step(kind, bound):
    _, table = make()
    table[5] = 0.0
    rows, scales = quantise(table, kind)
    back = rows.float() if scales is None else rows.float() * scales.unsqueeze(1)
    largest = table.abs().amax(1, keepdim=True)
    assert ((back - table).abs() <= bound * largest * 1.001).all()
    assert (back[5] == 0).all()


@pytest.mark.parametrize("kind", ["fp16", "int8"])
@torch.no_grad()
def test_quantised_rows_score_as_their_values(kind):
    scorer, table = make(score_bytes=200)
    blocks = [quantise(block, kind) for block in table.split(19)]
    scales = [scale for _, scale in blocks if scale is not None]
    scorer.set_rows([rows for rows, _ in blocks], scales)
    values = scorer.look_up(torch.arange(TABLE_ROWS))
    for number, history in enumerate(histories()):
        if len(history):
            expected, scores = plain(scorer.encoder, values, history, 8, history)
            got = scorer(history, torch.tensor([0, len(history)]), 8, True)
            assert torch.equal(got[0][0], expected), number
            torch.testing.assert_close(got[1][0], scores)


def test_what_cannot_be_answered_raises():
    scorer, table = make()
    scorer.set_rows([table], [])
    with pytest.raises(RuntimeError, match="at least 1"):
        scorer(*packed(histories()), 0, True)
    with pytest.raises(RuntimeError, match="outside the table"):
        scorer(torch.tensor([TABLE_ROWS]), torch.tensor([0, 1]), 1, True)
    with pytest.raises(ValueError, match="fp32, fp16 or int8"):
        quantise(table, "int4")
