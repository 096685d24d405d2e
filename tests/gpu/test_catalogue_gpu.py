"""On the card: the top k against float64, the kernel scorer against a bundle's own model."""

import pytest
import torch

from modules.catalogue import COLUMNS, Catalogue
from modules.kernel_scorer import KernelScorer
from modules.scorer import quantise
from tests.modules.test_catalogue import (
    assert_exact,
    close_rows,
    exact_scores,
    problem,
    scripted,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("users", "rows", "width", "k"),
    [
        (1, 9, 16, 3),
        (3, COLUMNS + 7, 64, 10),
        (130, 3_425, 256, 100),
        (257, 100_003, 256, 100),
        (7, 100_003, 96, 300),
    ],
)
@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_top_is_that_of_all_scores(users, rows, width, k, blocks, kind):
    h_BD, rows_VD, items_N, users_N = problem(users, rows, width, CUDA)
    stored_VD, scales_V = quantise(rows_VD, kind)
    sizes = {} if blocks == "one" else {"score_bytes": 2 * 30 * 30_000, "block_items": 29_000}
    for allowed_V in (None, torch.rand(rows, device=CUDA) < 0.7):
        if allowed_V is not None:
            allowed_V[-1] = True
        catalogue = Catalogue(stored_VD, scales_V, allowed_V, **sizes)
        rows_BK, scores_BK, proved_B = catalogue.top(h_BD, k, items_N, users_N)
        assert proved_B.all()
        values_VD = catalogue.look_up(torch.arange(rows, device=CUDA))
        exact = exact_scores(h_BD, values_VD, items_N, users_N, allowed_V)
        assert_exact((rows_BK, scores_BK), exact, k)


def test_the_bound_holds():
    """Errors of one sign, for all pairs of a tile and across the width of a product."""
    rows_VD = 1.0 + 2.0**-12 + torch.rand(20_000, 256, device=CUDA) * 2.0**-10
    h_BD = 1.0 + 2.0**-12 + torch.rand(200, 256, device=CUDA) * 2.0**-10
    catalogue = Catalogue(rows_VD)
    nothing = torch.zeros(0, dtype=torch.int64, device=CUDA)
    question = catalogue._question(h_BD, nothing, nothing, None)
    approx_BC, row_BC = catalogue._candidates(question, 300)
    scale_B1 = question.scale_B.double().unsqueeze(1)
    exact_BC = (h_BD.double() @ rows_VD.double().T * scale_B1).gather(1, row_BC)
    assert (approx_BC - exact_BC).abs().max() <= catalogue.error


def test_top_waits_for_nothing():
    h_BD, rows_VD, items_N, users_N = problem(300, 50_000, 64, CUDA)
    catalogue = Catalogue(rows_VD)
    catalogue.top(h_BD, 100, items_N, users_N)
    torch.cuda.set_sync_debug_mode("error")
    try:
        catalogue.top(h_BD, 100, items_N, users_N)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.999), ("bf16", 0.95)])
@pytest.mark.parametrize("exclude_seen", [False, True])  # False: repeats get a score of their own
def test_kernel_scorer_answers_as_the_bundles_model(precision, least, exclude_seen):
    rows_VD = torch.randn(20_008, 128, device=CUDA)
    model, config = scripted(rows_VD, 7_000, state=32, head=32, repeats=True)
    model = model.to(CUDA)
    lengths = torch.tensor([1, 2, 64, 65, 300, 1, 1_000, *[40] * 100])
    offsets_B1 = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    items_T = torch.randint(8, 20_008, (int(lengths.sum()),), dtype=torch.int32)
    pairs = torch.tensor([9, 40, 600]), torch.tensor([0, 3, 4])
    here = [one.to(CUDA) for one in (items_T.long(), offsets_B1, *pairs)]
    expected = model(here[0], here[1], 100, exclude_seen, here[2], here[3])
    scorer = KernelScorer(model, config, CUDA, precision)
    rows, scores = scorer.launch(items_T, offsets_B1, 100, exclude_seen, pairs)()
    same = (rows.unsqueeze(2) == expected[0].cpu().unsqueeze(1)).any(2)
    assert same.float().mean() >= least
    assert scorer.rescored == 0
    error = (scores - expected[1].cpu()).abs().max() / scores.abs().max()
    assert error < (1e-4 if precision == "fp32" else 3e-2)


def test_users_without_a_proof_are_ranked_in_full():
    model, config = scripted(close_rows(5_000, 64).to(CUDA), 5_000, head=16, state=16)
    scorer = KernelScorer(model.to(CUDA), config, CUDA, "fp32")
    items_T, offsets_B1 = torch.randint(8, 5_000, (100,)), torch.tensor([0, 40, 100])
    rows, scores = scorer.launch(items_T, offsets_B1, 10, True)()
    assert scorer.rescored == 2
    h_BD = scorer.hidden(items_T.to(CUDA), offsets_B1.to(CUDA))
    users_T = torch.arange(2).repeat_interleave(torch.tensor([40, 60]))
    want = model.top(h_BD, 10, items_T.to(CUDA), users_T.to(CUDA))
    torch.testing.assert_close(scores, want[1].cpu())
    assert (rows >= 8).all()
