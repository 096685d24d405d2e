"""Fetching: the real wheel where an index can be reached, a small stand-in everywhere."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from tools import fetch_movielens
from tools.fetch_movielens import INSIDE, fetch

ROOT = Path(__file__).parents[2]
FILES = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "196\t242\t3\t881250949\n186\t302\t4\t881250949\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "242\tKolya\t1996\tComedy\n302\tunknown\tunkonwn\tunknown\n",
}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the same files inside, of two rows each, whose hashes are taken for right."""
    path = tmp_path / "small.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(INSIDE + name, text)
            digest = hashlib.sha256(text.encode()).hexdigest()
            monkeypatch.setitem(fetch_movielens.SHA256, name, digest)
    return path


def test_command_line_with_the_real_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.fetch_movielens", f"output={tmp_path / 'log'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "pip could not fetch" in done.stderr:
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    assert "research use" in done.stdout
    ratings = pq.read_table(tmp_path / "log/ratings.parquet")
    assert ratings.num_rows == 100_000
    assert ratings.slice(0, 1).to_pylist() == [
        {"user_id": 196, "item_id": 242, "rating": 3.0, "timestamp": 881250949}
    ]
    items = pq.read_table(tmp_path / "log/items.parquet")
    assert set(ratings["item_id"].to_pylist()) == set(items["item_id"].to_pylist())
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "already there, kept" in again.stdout


def test_from_a_wheel(wheel: Path, tmp_path: Path) -> None:
    assert fetch(tmp_path / "log", wheel)
    ratings = pq.read_table(tmp_path / "log/ratings.parquet")
    assert ratings.schema.types == [pa.int64(), pa.int64(), pa.float32(), pa.int64()]
    assert ratings["user_id"].to_pylist() == [196, 186]
    items = pq.read_table(tmp_path / "log/items.parquet").to_pylist()
    assert items[0] == {"item_id": 242, "title": "Kolya", "year": 1996, "genres": "Comedy"}
    assert items[1]["year"] is None
    assert not fetch(tmp_path / "log", wheel)


def test_other_contents_are_refused(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fetch_movielens.SHA256, "ml-100k.item", "0" * 64)
    with pytest.raises(InputError, match=r"ml-100k.item in .* has sha256"):
        fetch(tmp_path / "log", wheel)
    (tmp_path / "text.whl").write_text("no archive")
    with pytest.raises(InputError, match="is not the wheel of recbole"):
        fetch(tmp_path / "log", tmp_path / "text.whl")
    with pytest.raises(InputError, match="is not the wheel of recbole"):
        fetch(tmp_path / "log", tmp_path / "absent.whl")
    assert not (tmp_path / "log").exists()


def test_a_folder_with_other_files_is_refused(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    (tmp_path / "log/ratings.parquet").write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        fetch(tmp_path / "log", wheel)


def test_no_index_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(InputError, match=r"pip could not fetch .*wheel=FILE"):
        fetch(tmp_path / "log")
