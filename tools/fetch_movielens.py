"""MovieLens-100K as a raw event log: a small real log for demonstrations.

    python -m tools.fetch_movielens output=DIR [wheel=FILE]

The data ship inside the wheel of recbole 1.2.1, which pip fetches from the package index that it
is set up with; nothing is installed. Writes `ratings.parquet` (user_id, item_id, rating,
timestamp, in the order of the source) and `items.parquet` (item_id, title, year, genres). Files
that are there already are kept.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from configs.command import command
from data.errors import InputError
from data.output_folder import new_folder

PACKAGE = "recbole==1.2.1"
INSIDE = "recbole/dataset_example/ml-100k/"
SHA256 = {
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
RATINGS, ITEMS = "ratings.parquet", "items.parquet"
NO_YEAR = ["V", "unkonwn"]  # what the source says where it knows none
SOURCE = b"ml-100k sha256"  # metadata of both files: what they were made from
TERMS = (
    "MovieLens-100K is GroupLens' data for research use, not to be redistributed; cite F. Maxwell "
    "Harper and Joseph A. Konstan, The MovieLens Datasets: History and Context, ACM TiiS 5(4), 2015"
)


def fetch(output: Path, wheel: Path | None = None) -> bool:
    """Write the two files into the new folder `output`; False when they are there already.

    Without `wheel`, pip downloads it. Raises InputError when it cannot be had or is another one.
    """
    if _complete(output):
        return False
    with new_folder(output, [RATINGS, ITEMS]) as folder, tempfile.TemporaryDirectory() as scratch:
        wheel = wheel or _download(Path(scratch))
        raw = {name: _unpack(wheel, name) for name in SHA256}
        pq.write_table(_ratings(raw["ml-100k.inter"]), folder / RATINGS)
        pq.write_table(_items(raw["ml-100k.item"]), folder / ITEMS)
    return True


def _complete(output: Path) -> bool:
    try:
        found = [pq.read_schema(output / name).metadata or {} for name in (RATINGS, ITEMS)]
    except (OSError, pa.ArrowException):
        return False
    return [one.get(SOURCE, b"").decode() for one in found] == list(SHA256.values())


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    options = ["--no-deps", "--only-binary=:all:", "--retries=1", f"--dest={folder}", PACKAGE]
    done = subprocess.run([*pip, *options], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(
            f"pip could not fetch {PACKAGE} ({reason}); check the network and pip's index, or "
            "download the wheel elsewhere and give wheel=FILE"
        )
    return wheels[0]


def _unpack(wheel: Path, name: str) -> bytes:
    """One file of the wheel, read in memory and checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            raw = archive.read(INSIDE + name)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"{wheel} is not the wheel of {PACKAGE} ({error}); give wheel= that file"
        ) from error
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256[name]:
        raise InputError(
            f"{name} in {wheel} has sha256 {digest[:16]}…, not {SHA256[name][:16]}…; "
            f"give the wheel of {PACKAGE}"
        )
    return raw


def _ratings(raw: bytes) -> pa.Table:
    names = ["user_id", "item_id", "rating", "timestamp"]
    types = {"user_id": pa.int64(), "item_id": pa.int64(), "rating": pa.float32()}
    return _parse(raw, names, types | {"timestamp": pa.int64()}, "ml-100k.inter")


def _items(raw: bytes) -> pa.Table:
    names = ["item_id", "title", "year", "genres"]
    types = {"item_id": pa.int64(), "title": pa.string(), "year": pa.int32()}
    return _parse(raw, names, types | {"genres": pa.string()}, "ml-100k.item")


def _parse(raw: bytes, names: list[str], types: dict[str, pa.DataType], source: str) -> pa.Table:
    table = pa.csv.read_csv(
        pa.BufferReader(raw),
        read_options=pa.csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
        parse_options=pa.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pa.csv.ConvertOptions(column_types=types, null_values=NO_YEAR),
    )
    return table.replace_schema_metadata({SOURCE: SHA256[source].encode()})


@command("fetch_movielens")
def main(options: dict[str, Any]) -> None:
    output = Path(str(options["output"]))
    wheel = None if options["wheel"] is None else Path(str(options["wheel"]))
    fresh = fetch(output, wheel)
    print(TERMS)
    state = "written" if fresh else "already there, kept"
    for name in (RATINGS, ITEMS):
        print(f"{output / name}: {pq.read_metadata(output / name).num_rows:,} rows, {state}")


if __name__ == "__main__":
    main()
