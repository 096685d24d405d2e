"""Reading row groups: values, users' numbers, and one clear sentence for everything damaged."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.reader import Histories, HistoryDataset, concatenated_ranges
from data.schema import Manifest
from tests.data.datasets import random_histories, write_dataset

HISTORIES = random_histories(users=23, longest=9, items=40, seed=3)


def as_lists(histories):
    """Histories as one list a user."""
    offsets = histories.offsets_U1
    return [histories.items_N[a:b].tolist() for a, b in pairwise(offsets)]


def first_file(folder):
    return folder / Manifest.read(folder).histories[0].path


def rewrite(folder, table):
    """Replace the first file and put its new size into the manifest."""
    path = first_file(folder)
    pq.write_table(table, path)
    text = (folder / "manifest.json").read_text()
    old = Manifest.read(folder).histories[0].bytes
    (folder / "manifest.json").write_text(
        text.replace(f'"bytes": {old},', f'"bytes": {path.stat().st_size},')
    )


@pytest.mark.parametrize("item_type", [pa.int32(), pa.int64()])
@pytest.mark.parametrize(("files", "row_group_users"), [(1, None), (3, 2), (30, 1)])
def test_groups_hold_all_users_in_order(tmp_path, files, row_group_users, item_type):
    folder = write_dataset(
        tmp_path, HISTORIES, files=files, row_group_users=row_group_users, item_type=item_type
    )
    dataset = HistoryDataset(folder)
    assert len(dataset) == len(HISTORIES)
    read, names = [], []
    for group in range(len(dataset.groups)):
        part = dataset.read(group)
        read += as_lists(part)
        names += part.user_ids.to_pylist()
        start, stop = dataset.group_starts_G1[group : group + 2]
        assert np.array_equal(part.n_train_U, dataset.n_train_U[start:stop])
        assert part.items_N.dtype == item_type.to_pandas_dtype()
    assert read == HISTORIES
    assert names == [f"u{user}" for user in range(len(HISTORIES))]
    assert dataset.n_events_U.tolist() == [len(one) for one in HISTORIES]


def test_several_groups_read_as_one(tmp_path):
    dataset = HistoryDataset(write_dataset(tmp_path, HISTORIES, files=4, row_group_users=2))
    groups = np.array([1, 3, 4])
    together = dataset.read_many(groups)
    users = dataset.users_of(groups)
    expected = [HISTORIES[user] for user in users]
    assert as_lists(together) == expected
    assert np.array_equal(together.n_validation_U, dataset.n_validation_U[users])


def test_no_users_and_empty_row_groups(tmp_path):
    assert len(HistoryDataset(write_dataset(tmp_path / "none", []))) == 0
    folder = write_dataset(tmp_path / "some", [[8, 9, 10]], files=3)
    dataset = HistoryDataset(folder)
    sizes = [len(dataset.read(group)) for group in range(len(dataset.groups))]
    assert sum(sizes) == len(dataset) == 1


def test_concatenate_gives_offsets_of_the_whole():
    one = Histories(np.arange(8, 11), np.array([0, 1, 3]), np.ones(2), np.zeros(2))
    assert Histories.concatenate([one, one]).offsets_U1.tolist() == [0, 1, 3, 4, 6]


def test_concatenated_ranges_skip_empty_ones():
    starts, lengths = np.array([5, 0, 7]), np.array([2, 0, 3])
    assert concatenated_ranges(starts, lengths).tolist() == [5, 6, 7, 8, 9]
    assert concatenated_ranges(starts[:0], lengths[:0]).tolist() == []


def test_another_number_of_users_is_named(tmp_path):
    folder = write_dataset(tmp_path, HISTORIES)
    rewrite(folder, pq.read_table(first_file(folder)).slice(1))
    with pytest.raises(InputError, match=r"has 22 users, the manifest says 23; convert the log ag"):
        HistoryDataset(folder).read(0)


def test_absent_and_resized_files_are_named(tmp_path):
    folder = write_dataset(tmp_path, HISTORIES)
    path = first_file(folder)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"part-00000.parquet has [\d,]+ bytes, the manifest says"):
        HistoryDataset(folder)
    path.unlink()
    with pytest.raises(InputError, match=r"part-00000.parquet is named in the manifest and absent"):
        HistoryDataset(folder)


def test_damaged_files_are_named(tmp_path):
    folder = write_dataset(tmp_path, HISTORIES)
    dataset = HistoryDataset(folder)
    path = first_file(folder)
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196  # the first column's pages
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"part-00000.parquet is damaged"):
        dataset.read(0)
    path.write_bytes(b"\0" * len(content))  # no footer
    with pytest.raises(InputError, match=r"part-00000.parquet is damaged"):
        HistoryDataset(folder)


@pytest.mark.parametrize(("item", "message"), [(3, "holds item 3,"), (12, "rows 8 to 11")])
def test_items_outside_the_table_are_refused(tmp_path, item, message):
    folder = write_dataset(tmp_path, [[8, 9, item, 10]], table_rows=12)
    with pytest.raises(InputError, match=f"part-00000.parquet .*{message}"):
        HistoryDataset(folder).read(0)


def test_more_train_events_than_events_are_refused(tmp_path):
    folder = write_dataset(tmp_path, [[8, 9], [8, 9]], n_train=[1, 2], n_validation=[1, 1])
    with pytest.raises(InputError, match=r"n_train \+ n_validation = 3 of 2 events"):
        HistoryDataset(folder).read(0)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("items", [[8, None]], "null item"),
        ("items", [None], "null item"),
        ("items", [["a"]], "items of type list<"),
        ("n_train", pa.array([1], pa.int64()), "n_train of type int64"),
        ("n_train", pa.array([-1], pa.int32()), "n_train = -1"),
        ("n_validation", pa.array([None], pa.int32()), "null n_validation"),
        ("user_id", None, "no column user_id"),
    ],
)
def test_columns_of_another_kind_are_refused(tmp_path, column, values, message):
    folder = write_dataset(tmp_path, [[8, 9]], n_train=[1])
    kept = pq.read_table(first_file(folder))
    table = kept.drop_columns([column])
    if values is not None:
        if column == "items" and values != [["a"]]:
            values = pa.array(values, pa.list_(pa.int32()))
        table = table.append_column(column, values if isinstance(values, pa.Array) else [values])
    rewrite(folder, table)
    with pytest.raises(InputError, match=message):
        HistoryDataset(folder).read(0)
