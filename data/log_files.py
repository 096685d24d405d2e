"""The files of an event log: paths, folders and globs in, one sorted list of files out.

Hive partitions are the folders such as `day=2024-01-01` from the input's own folder down: the
folder that is named, the folder of a named file, or the one in which a glob's first wildcard
stands. Folders above that say where the log lies, not what is in it.
"""

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
    partitions: tuple[str, ...] = ()  # the same for every file
    outer: tuple[str, ...] = ()  # KEY of KEY=VALUE folders above: to the engine partitions as well

    @property
    def name(self) -> str:
        """What a sentence calls them."""
        return self.paths[0] if len(self.paths) == 1 else f"{len(self.paths)} files"


def find_files(inputs: str | Iterable[str], option: str = "input") -> LogFiles:
    """Find the files of `inputs`: a file, a folder (read recursively), a glob, or several of them.

    In folders, names that start with `.` or `_` and files of other kinds are passed over. A file
    named twice counts once, a CSV file without a byte not at all. Raises InputError when nothing
    matches, when Parquet and CSV are mixed, when Hive partitions differ among the files, for an
    empty name, and for object-store URLs. option: by which sentences name the inputs.
    """
    found: dict[str, Path] = {}  # each file and the highest of the inputs' folders that hold it
    for one in [inputs] if isinstance(inputs, str) else list(inputs):
        for path, folder in _expand(str(one), option):
            found[path] = min(found.get(path, folder), folder, key=lambda part: len(part.parts))
    paths = tuple(sorted(found))
    if not paths:
        raise InputError(f"{option} names no file; give {option}=PATH, a glob, or [PATH,PATH,…]")
    kinds = {_kind(path) for path in paths}
    if None in kinds:
        odd = next(path for path in paths if _kind(path) is None)
        raise InputError(
            f"the format of {odd} is not known; a log's name ends in {', '.join(SUFFIXES)}"
        )
    if len(kinds) > 1:
        raise InputError(f"{option} mixes Parquet and CSV files; give one kind, e.g. with a glob")
    kind = str(kinds.pop())
    if kind == "csv":  # one without a byte has no header to agree with the others'
        paths = tuple(path for path in paths if Path(path).stat().st_size)
        if not paths:
            raise InputError(
                f"the log is empty: {min(found)} has not one byte; name another {option}"
            )
    partitions, outer = _partitions({path: found[path] for path in paths})
    return LogFiles(paths, kind, partitions, outer)


def _expand(one: str, option: str) -> list[tuple[str, Path]]:
    """The files that one input names, each with the folder at which its partitions begin."""
    if not one.strip():
        raise InputError(f"{option} is empty; give {option}=PATH, a glob, or [PATH,PATH,…]")
    if _URL.match(one):
        raise InputError(
            f"{option}={one} is a URL, and only files are read: copy the log to a disk, or mount it"
        )
    path = Path(one).expanduser().absolute()
    if path.is_file():
        return [(str(path), path.parent)]
    if path.is_dir():
        files = [str(entry) for entry in path.rglob("*") if _is_data(entry, path)]
        if not files:
            raise InputError(f"folder {one} holds no {', '.join(SUFFIXES)} file; name another")
        return [(file, path) for file in files]
    matches = [match for match in glob.glob(str(path), recursive=True) if _visible(match)]
    files = [match for match in matches if Path(match).is_file()]
    for folder in (Path(match) for match in matches if Path(match).is_dir()):
        files += [str(entry) for entry in folder.rglob("*") if _is_data(entry, folder)]
    if not files:
        raise InputError(f"no file matches {option}={one}; check the path or the glob")
    fixed = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
    return [(file, fixed) for file in files]


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


def _partitions(folders: dict[str, Path]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Partition keys from each file's folder down, and the KEY=VALUE folders above those."""
    layouts = {path: _layout(path, folder) for path, folder in folders.items()}
    first = next(iter(layouts))
    partitions, outer = layouts[first]
    for path, layout in layouts.items():
        # The engine sees all such folders, so these have to agree too where it looks for any.
        agree = layout == layouts[first] if partitions else not layout[0]
        if not agree:
            raise InputError(
                f"{path} has the Hive partitions {[*layout[1], *layout[0]]} but {first} has "
                f"{[*outer, *partitions]}; name files of one layout"
            )
    return partitions, outer


def _layout(path: str, folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    above = len(folder.parts) - 1  # the input's own folder is a partition if it looks like one
    parts = Path(path).parent.parts
    inner, outer = parts[above:], parts[:above]
    return _keys(inner), _keys(outer)


def _keys(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(part.split("=", 1)[0] for part in parts if "=" in part)
