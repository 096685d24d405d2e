"""The files of an event log: paths, folders and globs in, one sorted list of files out."""

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from data.errors import InputError

PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SUFFIXES = PARQUET_SUFFIXES + CSV_SUFFIXES
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True)
class LogFiles:
    """Sorted absolute paths of one kind; their order is the input order of the events."""

    paths: tuple[str, ...]
    kind: str  # parquet | csv

    @property
    def hive_partitioned(self) -> bool:
        """Whether every file lies in folders such as `day=2024-01-01`."""
        return all(partition_keys(path) for path in self.paths)


def find_files(inputs: str | Iterable[str]) -> LogFiles:
    """Find the files of `inputs`: a file, a folder (read recursively), a glob, or several of them.

    In folders, names that start with `.` or `_` and files of other kinds are passed over. A file
    named twice counts once. Raises InputError when nothing matches, when Parquet and CSV are
    mixed, when Hive partitions differ among the files, and for object-store URLs.
    """
    found: set[str] = set()
    for one in [inputs] if isinstance(inputs, str) else list(inputs):
        found.update(_expand(str(one)))
    paths = tuple(sorted(found))
    if not paths:
        raise InputError("input names no file; give input=PATH, a glob, or [PATH,PATH,…]")
    kinds = {_kind(path) for path in paths}
    if None in kinds:
        odd = next(path for path in paths if _kind(path) is None)
        raise InputError(f"the format of {odd} is not known; a log is {', '.join(SUFFIXES)}")
    if len(kinds) > 1:
        raise InputError("input mixes Parquet and CSV files; convert one kind, e.g. with a glob")
    _check_partitions(paths)
    return LogFiles(paths, str(kinds.pop()))


def _expand(one: str) -> list[str]:
    if _URL.match(one):
        raise InputError(
            f"input={one} is a URL, and only files are read: copy the log to a disk, or mount it"
        )
    path = Path(one).expanduser()
    if path.is_file():
        return [str(path.absolute())]
    if path.is_dir():
        files = [str(entry.absolute()) for entry in path.rglob("*") if _is_data(entry, path)]
        if not files:
            raise InputError(f"folder {one} holds no {', '.join(SUFFIXES)} file")
        return files
    matches = [match for match in glob.glob(str(path), recursive=True) if _visible(match)]
    files = [str(Path(match).absolute()) for match in matches if Path(match).is_file()]
    for folder in (Path(match) for match in matches if Path(match).is_dir()):
        files += [str(entry.absolute()) for entry in folder.rglob("*") if _is_data(entry, folder)]
    if not files:
        raise InputError(f"no file matches input={one}; check the path or the glob")
    return files


def _visible(path: str) -> bool:
    return not Path(path).name.startswith((".", "_"))


def _is_data(entry: Path, folder: Path) -> bool:
    inside = entry.relative_to(folder).parts
    hidden = any(part.startswith((".", "_")) for part in inside)
    return not hidden and _kind(entry.name) is not None and entry.is_file()


def _kind(path: str) -> str | None:
    name = path.lower()
    if name.endswith(PARQUET_SUFFIXES):
        return "parquet"
    return "csv" if name.endswith(CSV_SUFFIXES) else None


def partition_keys(path: str) -> tuple[str, ...]:
    """The names of a file's Hive partitions, such as `day` for `day=2024-01-01/`."""
    return tuple(part.split("=", 1)[0] for part in Path(path).parent.parts if "=" in part)


def _check_partitions(paths: tuple[str, ...]) -> None:
    first = partition_keys(paths[0])
    for path in paths:
        if partition_keys(path) != first:
            raise InputError(
                f"{path} has the Hive partitions {list(partition_keys(path))} but {paths[0]} has "
                f"{list(first)}; name files of one layout"
            )
