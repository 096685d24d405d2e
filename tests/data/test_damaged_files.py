"""Data sets that arrive damaged or mean harm: named, left out by choice, never followed outside."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import InputError
from data.reader import HistoryDataset, damaged_files
from data.schema import MANIFEST, VOCABULARY, Manifest
from data.vocabulary import Vocabulary
from tests.data.datasets import random_histories, write_dataset

FUZZ = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
USERS = random_histories(users=90, longest=12, items=40, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("set"), USERS, files=3, row_group_users=10)


def everything(dataset: HistoryDataset) -> list:
    parts = [dataset.read(group) for group in range(len(dataset.groups))]
    return [(h.user_ids.to_pylist(), h.items_N.tolist(), h.n_train_U.tolist()) for h in parts]


def refusal(read: Callable[[], object], otherwise: str) -> str:
    """What InputError says, `otherwise` where `read` succeeds; anything else fails the test."""
    try:
        read()
    except InputError as error:
        return str(error)
    return otherwise


@st.composite
def damages(draw) -> tuple[float, int, bool]:
    """A place in the file, as a share of it, the bit to flip there, and whether to cut instead."""
    return draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(0, 7)), draw(st.booleans())


@FUZZ
@given(damage=damages())
def test_a_damaged_file_is_named_and_can_be_left_out(folder: Path, damage) -> None:
    share, bit, cut = damage
    whole = everything(HistoryDataset(folder))
    name = "histories/part-00001.parquet"
    good = (folder / name).read_bytes()
    place = int(share * len(good))
    flipped = good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :]
    try:
        (folder / name).write_bytes(good[:place] if cut else flipped)
        (found,) = damaged_files(folder).items()
        assert found[0] == name
        assert ("bytes, the manifest says" if cut else "its hash is not the manifest's") in found[1]
        rest = HistoryDataset(folder, damaged_files(folder))
        assert rest.left_out == [name]
        assert everything(rest) == [*whole[:3], *whole[6:]]
        assert "part-00001.parquet" in refusal(lambda: everything(HistoryDataset(folder)), name)
    finally:
        (folder / name).write_bytes(good)


def test_processes_of_a_host_share_the_scan(folder: Path) -> None:
    good = {}
    for one in Manifest.read(folder).histories:
        good[one.path] = (folder / one.path).read_bytes()
        (folder / one.path).unlink()
    found = [damaged_files(folder, part, 2) for part in range(2)]
    assert [len(one) for one in found] == [2, 1]
    assert sorted(found[0] | found[1]) == list(good)
    assert all("cannot be read (No such file" in what for what in found[1].values())
    for path, content in good.items():
        (folder / path).write_bytes(content)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../other/part.parquet", "histories/../../part.parquet"],
)
@pytest.mark.parametrize("part", ["vocabulary", "histories", "residual", "bad_rows"])
def test_a_manifest_whose_paths_leave_its_folder_is_refused(
    tmp_path: Path, folder: Path, part: str, path: str
) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    file = raw["vocabulary"] | {"path": path}
    raw[part] = [file] if part == "histories" else file
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(InputError, match=rf"manifest.json names {path}, outside its own folder"):
        HistoryDataset(tmp_path)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=3,
)


@FUZZ
@given(data=st.data())
def test_a_manifest_of_other_values_is_refused(tmp_path: Path, folder: Path, data) -> None:
    """One value of the manifest becomes any other JSON, or the text is cut."""
    text = (folder / MANIFEST).read_text()
    raw = json.loads(text)
    where = data.draw(st.sampled_from(["histories", "vocabulary", "counts", "cut", *raw]))
    if where == "cut":
        changed = text[: data.draw(st.integers(0, len(text) - 3))]
    else:
        node, key = raw, where
        if where in ("histories", "vocabulary"):
            node = raw["histories"][0] if where == "histories" else raw["vocabulary"]
            key = data.draw(st.sampled_from(sorted(node)))
        elif where == "counts":
            node, key = raw["counts"], "users"
        node[key] = data.draw(ANY_JSON)
        changed = json.dumps(raw)
    (tmp_path / MANIFEST).write_text(changed)
    (tmp_path / VOCABULARY).write_bytes((folder / VOCABULARY).read_bytes())
    path = str(tmp_path / MANIFEST)
    assert path in refusal(lambda: damaged_files(tmp_path), path)


def test_a_flipped_bit_in_the_vocabulary_is_noticed(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, USERS)
    content = (folder / VOCABULARY).read_bytes()
    start = content.index(b"i8")  # the first raw id, in the first page
    flipped = bytearray(content)
    flipped[start + 1] ^= 1
    (folder / VOCABULARY).write_bytes(flipped)
    with pytest.raises(InputError, match=r"vocabulary.parquet is damaged"):
        Vocabulary.read(folder)
