"""Raw ids to rows and back."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.schema import RESERVED_ROWS, VOCABULARY
from data.vocabulary import UNKNOWN, Vocabulary


def written(folder: Path, ids: list[int] | list[str]) -> Vocabulary:
    rows = pa.array(range(RESERVED_ROWS, RESERVED_ROWS + len(ids)), pa.int64())
    counts = pa.array([10 * place for place in range(len(ids))], pa.int64())
    table = pa.table({"item_id": ids, "item": rows, "count": counts})
    pq.write_table(table, folder / VOCABULARY, row_group_size=2)
    return Vocabulary.read(folder)


@pytest.mark.parametrize("ids", [[30, -5, 2**62, 0, 7], ["b", "a", "", "ü", "7"]])
def test_rows_and_raw_are_inverse(tmp_path: Path, ids: list) -> None:
    vocabulary = written(tmp_path, ids)
    assert vocabulary.size == 5
    assert vocabulary.table_rows == 13
    rows = vocabulary.rows(pa.array(ids))
    assert rows.dtype == np.int64
    assert rows.tolist() == [8, 9, 10, 11, 12]
    assert vocabulary.raw(rows[::-1]).to_pylist() == ids[::-1]
    assert vocabulary.counts.tolist() == [0] * 8 + [0, 10, 20, 30, 40]
    assert vocabulary.counts.dtype == np.int64


@pytest.mark.parametrize(
    ("ids", "more"), [([30, -5, 7], [8]), (["b", "", "ü"], ["c"]), (["ab", "c"], ["a", "bc"])]
)
def test_digest_tells_a_grown_vocabulary_from_another(tmp_path: Path, ids: list, more: list):
    before, after = (written(tmp_path, one).digest(len(ids)) for one in (ids, [*ids, *more]))
    assert before == after
    assert written(tmp_path, [*more, *ids]).digest(len(ids)) != before
    assert written(tmp_path, ids).digest(len(ids) - 1) != before


def test_digest_sees_where_an_id_ends(tmp_path: Path) -> None:
    assert written(tmp_path, ["ab", "c"]).digest(2) != written(tmp_path, ["a", "bc"]).digest(2)


def test_unknown_null_and_other_integer_types(tmp_path: Path) -> None:
    vocabulary = written(tmp_path, [30, 0, 7])
    for kind in (pa.int8(), pa.uint16(), pa.int64(), pa.uint64()):
        rows = vocabulary.rows(pa.array([7, None, 5, 0], kind))
        assert rows.tolist() == [10, UNKNOWN, UNKNOWN, 9]
    assert vocabulary.rows(pa.array([2**64 - 1, 7], pa.uint64())).tolist() == [UNKNOWN, 10]
    assert vocabulary.rows(pa.array([], pa.int64())).tolist() == []
    chunked = pa.chunked_array([[7], [30, 1]])
    assert vocabulary.rows(chunked).tolist() == [10, 8, UNKNOWN]


def test_strings_of_other_layouts(tmp_path: Path) -> None:
    vocabulary = written(tmp_path, ["x", "y"])
    for ids in (pa.array(["y", None, "z"], pa.large_string()), pa.array(["y", None, "z"])):
        assert vocabulary.rows(ids).tolist() == [9, UNKNOWN, UNKNOWN]
    assert vocabulary.rows(pa.array(["y", "z"]).dictionary_encode()).tolist() == [9, UNKNOWN]


def test_wrong_kind_of_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="item ids are string here but int64"):
        written(tmp_path, [1, 2]).rows(pa.array(["1"]))
    with pytest.raises(InputError, match="item ids are int64 here but string"):
        written(tmp_path, ["1"]).rows(pa.array([1]))


@pytest.mark.parametrize("row", [0, RESERVED_ROWS - 1, RESERVED_ROWS + 2, -1])
def test_rows_that_are_no_item_have_no_raw_id(tmp_path: Path, row: int) -> None:
    with pytest.raises(IndexError, match="8 to 9"):
        written(tmp_path, [1, 2]).raw(np.array([8, row]))


def test_damaged_or_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vocabulary.parquet does not exist"):
        Vocabulary.read(tmp_path)
    (tmp_path / VOCABULARY).write_bytes(b"PAR1 and nothing more")
    with pytest.raises(InputError, match="is damaged"):
        Vocabulary.read(tmp_path)
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / VOCABULARY)
    with pytest.raises(InputError, match="is damaged"):
        Vocabulary.read(tmp_path)
    pq.write_table(pa.table({"item_id": [1], "item": [9], "count": [1]}), tmp_path / VOCABULARY)
    with pytest.raises(InputError, match="does not count rows from 8"):
        Vocabulary.read(tmp_path)
