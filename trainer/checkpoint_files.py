"""The files of a checkpoint: their checksums, and reading them without running anything in them.

torch.distributed.checkpoint describes its files in a pickle and loads entries that are no tensors
with another. Here the first may name nothing but the classes of that description, and the second
do not exist: everything that a run stores is a tensor or JSON.
"""

import json
import pickle
from collections.abc import Iterable
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem

from data.cores import on_all_cores
from data.errors import InputError, reason
from data.schema import sha256_of, write_atomically

MANIFEST = "files.json"  # written last: a folder without one is no checkpoint
METADATA = ".metadata"

_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class Reader(FileSystemReader):
    """DCP's reader with `.metadata` read by allow-list. Raises InputError for anything else."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(self._folder)
        metadata.storage_meta.load_id = self.load_id  # type: ignore[union-attr]
        return metadata


class Planner(DefaultLoadPlanner):
    """DCP's planner for tensors alone."""

    def load_bytes(self, read_item: ReadItem, value: IO[bytes]) -> None:
        raise InputError(
            f"the checkpoint's entry {read_item.dest_index.fqn} is no tensor but a pickle, which "
            "is not read; use a checkpoint that this program wrote"
        )


def read_metadata(folder: Path) -> Metadata:
    """DCP's description of the checkpoint's tensors.

    Raises InputError when it is damaged, names a class that it has no business with, or a file
    outside the folder.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        files = {one.relative_path for one in metadata.storage_data.values()}
        metadata.storage_meta.load_id  # noqa: B018  raises where it is absent
    except InputError:
        raise
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise InputError(f"{path} is damaged ({reason(error)}); use another checkpoint") from error
    for name in files:
        if not _is_plain(name):
            raise InputError(f"{path} names the file {name!r}, which is not in its own folder")
    return cast(Metadata, metadata)


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._name = file.name

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._member
        known = (module, name) in _CLASSES
        if not known and module == "torch":
            known = isinstance(getattr(torch, name, None), torch.dtype)
        if not known:
            raise InputError(
                f"{self._name} names {module}.{name}, which no checkpoint of this program does; "
                "it was not loaded, and nothing in it was run"
            )
        return super().find_class(module, name)

    def _member(self, kind: Any, name: str) -> Any:
        """An enumeration's member: Python 3.11.0 to 3.11.3 pickle it as `getattr(kind, name)`."""
        if not isinstance(kind, EnumMeta) or name not in kind.__members__:
            raise InputError(
                f"{self._name} asks for {name} of {kind!r}, which no checkpoint of this program "
                "does; it was not given"
            )
        return kind.__members__[name]


def checksums(paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """{"bytes", "sha256"} of each file by its name."""
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Write what `find_damage` compares with."""
    text = json.dumps({"files": files}, indent=1, sort_keys=True)
    write_atomically(folder / MANIFEST, text.encode())


def find_damage(folder: Path, part: int = 0, parts: int = 1, processes: int = 1) -> str | None:
    """What is wrong with a checkpoint's files, naming the first such file; None when all is well.

    Compares all sizes, and the checksums of one of `parts` shares of the files. processes: of this
    host that take a share. Raises InputError for a file that is there and cannot be read: that says
    nothing about its content.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            if not _is_plain(name):
                return f"{MANIFEST} names the file {name!r}, which is not in its own folder"
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size:,} bytes instead of {expected['bytes']:,}"
        names = sorted(files)[part::parts]
        found = on_all_cores(lambda name: checksums([folder / name])[name], names, processes)
        for name, now in zip(names, found, strict=True):
            if now != files[name]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError as error:
        return f"{error.filename} is absent"
    except OSError as error:
        raise InputError(
            f"{error.filename} cannot be read ({error.strerror}); see to the storage and try again"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({reason(error)})"
    return None


def _is_plain(name: str) -> bool:
    return Path(name).name == name and name not in ("", ".", "..")
