"""The Python API: equal to scoring whole histories, safe in threads, and as the README shows it."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from data.bundle import Bundle
from data.errors import InputError
from data.recommend import new_state, recommend
from tests.trained_run import ROOT, Trained, trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def bundle(made) -> Bundle:
    return Bundle.open(made.bundle, CPU)


def raw(history: list[int]) -> list[str]:
    return [f"i{row}" for row in history]


def assert_same(got, expected) -> None:
    assert [item for item, _ in got] == [item for item, _ in expected]
    np.testing.assert_allclose([s for _, s in got], [s for _, s in expected], rtol=1e-4, atol=1e-5)


def test_histories_score_as_packed_rows(made, bundle):
    histories = made.histories[:5]
    got = recommend(bundle, [raw(one) for one in histories], k=7)
    for history, found in zip(histories, got, strict=True):
        items, offsets = torch.tensor(history), torch.tensor([0, len(history)])
        rows, scores = bundle.score(items, offsets, 7)
        assert_same(found, list(zip(raw(rows[0].tolist()), scores[0].tolist(), strict=True)))


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_state_recommends_as_its_whole_history(made, bundle, exclude_seen):
    history = max(made.histories, key=len)
    state = new_state(bundle)
    for events, item in enumerate(raw(history), 1):
        state = state.advance(item)
        (expected,) = recommend(bundle, [raw(history[:events])], 9, exclude_seen)
        assert_same(state.recommend(9, exclude_seen), expected)
    assert_same(new_state(bundle, raw(history)).recommend(9, exclude_seen), expected)


def test_unknown_items_are_passed_over(bundle):
    state = new_state(bundle, ["i9"])
    assert state.advance("nothing") is state
    assert new_state(bundle, ["nothing"]).recommend() == []
    got = recommend(bundle, [["nothing", "i9"], [], ["nothing"]], k=4)
    assert_same(got[0], recommend(bundle, [["i9"]], k=4)[0])
    assert got[1:] == [[], []]
    assert recommend(bundle, []) == []


def test_only_allowed_items(bundle):
    allowed = torch.zeros(bundle.vocabulary.table_rows, dtype=torch.bool)
    allowed[[12, 13]] = True
    (got,) = recommend(bundle, [["i9"]], allowed_V=allowed)
    assert {item for item, _ in got} == {"i12", "i13"}
    assert_same(new_state(bundle, ["i9"]).recommend(allowed_V=allowed), got)


def test_ids_of_another_kind_are_refused(bundle):
    with pytest.raises(InputError, match="item ids are int64 here but string"):
        recommend(bundle, [[9]])
    with pytest.raises(InputError, match="are of several kinds"):
        recommend(bundle, [["i9", 9]])
    beyond = r"the item ids \[9223372036854775808\]… are not all in \[-2\^63, 2\^63\); give ids of"
    with pytest.raises(InputError, match=beyond):
        recommend(bundle, [[2**63]], k=2)
    with pytest.raises(InputError, match=beyond):
        new_state(bundle, [2**63])


def test_threads_share_a_bundle(made, bundle):
    histories = [raw(history) for history in made.histories] * 3

    def both(history):
        return recommend(bundle, [history], 6)[0], new_state(bundle, history[-5:]).recommend(6)

    expected = [both(history) for history in histories]
    with ThreadPoolExecutor(4) as pool:
        for got, wanted in zip(pool.map(both, histories), expected, strict=True):
            for one, other in zip(got, wanted, strict=True):
                assert_same(one, other)


def test_the_readme_example_runs(made):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    for shown, ours in (("/bundles/shop", str(made.bundle)), ('"A"', '"i9"'), ('"B"', '"i12"')):
        assert shown in example
        example = example.replace(shown, ours)
    names: dict = {}
    exec(example, names)
    assert_same(names["state"].recommend(k=10), names["best"][0])
