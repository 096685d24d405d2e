"""What a bundle is: its manifest, the names of its files, and their hashes."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.compiled import AOTINDUCTOR, FORWARD, STEP, WEIGHTS
from data.errors import InputError
from data.schema import MANIFEST, VOCABULARY, sha256_of, write_atomically

BUNDLE_VERSION = 4
READABLE_VERSIONS = (3, BUNDLE_VERSION)  # 3 had TorchScript alone, and is otherwise the same
MODEL, ROWS = "model.pt", "rows"
TOP_LEVEL = (MODEL, WEIGHTS, FORWARD, STEP, ROWS, VOCABULARY, MANIFEST)
TORCHSCRIPT = "torchscript"
FORMATS = (TORCHSCRIPT, AOTINDUCTOR)
ROW_FORMATS = ("fp32", "fp16", "int8")
AGAIN = "export the checkpoint again with trainer.export"


@dataclass(frozen=True)
class BundleFile:
    """One file of a bundle; `path` is relative to its folder, with `/`."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class BundleManifest:
    """What a bundle is and where it comes from."""

    files: list[BundleFile]
    rows: str  # fp32 | fp16 | int8
    table_rows: int
    model: dict[str, Any]  # trainer.config.ModelConfig
    data: dict[str, Any]  # the data set: its options (how a log is read), split, counts, hash
    checkpoint: dict[str, Any]  # step, epoch, and its validation figures
    protocol: dict[str, Any]  # what the figures mean
    parity: dict[str, Any]  # the bundle's answers against the trainer's
    versions: dict[str, str]
    encoder_sha256: str  # of its config and tensors
    compiled_for: dict[str, str] | None = None  # data.compiled.TARGET; TorchScript runs anywhere
    bundle_version: int = BUNDLE_VERSION

    def write(self, folder: Path) -> None:
        """Commit the bundle."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path) -> "BundleManifest":
        """Raises InputError for a folder that is absent, no bundle, or of another version."""
        path = folder / MANIFEST
        if not folder.is_dir():
            raise InputError(f"bundle {folder} does not exist; make one with trainer.export")
        if not path.exists():
            raise InputError(f"{folder} has no {MANIFEST}: it is no finished bundle; {AGAIN}")
        try:
            raw = json.loads(path.read_bytes())
            version = raw.get("bundle_version")
            if version is None:
                raise InputError(
                    f"{folder} is no bundle, its {MANIFEST} is of another kind; make one with "
                    "trainer.export"
                )
            if version not in READABLE_VERSIONS:
                raise InputError(
                    f"{path} has bundle version {version}, this program reads "
                    f"{' and '.join(map(str, READABLE_VERSIONS))}; {AGAIN}"
                )
            raw["files"] = [BundleFile(**one) for one in raw["files"]]
            manifest = cls(**raw)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error}); {AGAIN}") from error
        for one in manifest.files:
            if Path(one.path).is_absolute() or ".." in Path(one.path).parts:
                raise InputError(f"{path} names {one.path}, outside its own folder; {AGAIN}")
        listed = {one.path for one in manifest.files}
        if absent := sorted(manifest.needed - listed):
            raise InputError(f"{path} is damaged: it does not list {absent[0]}; {AGAIN}")
        return manifest

    @property
    def needed(self) -> set[str]:
        """The files that are opened besides those of the rows; each has to have its hash here."""
        if self.compiled_for is None:
            return {VOCABULARY, MODEL}
        step = {STEP} if self.model.get("kind") == "causal" else set()
        return {VOCABULARY, WEIGHTS, FORWARD} | step

    def hash_of(self, path: str) -> str:
        """The sha256 of a file of the bundle."""
        return next(one.sha256 for one in self.files if one.path == path)

    @property
    def fingerprint(self) -> str:
        """The model: one hash over encoder, rows and vocabulary, in either format.

        Not over the code's files, which are others each time that they are written.
        """
        code = (MODEL, WEIGHTS, FORWARD, STEP)
        hashes = [one.sha256 for one in self.files if one.path not in code]
        return hashlib.sha256("".join([self.encoder_sha256, *hashes]).encode()).hexdigest()

    @property
    def format(self) -> str:
        """One of FORMATS."""
        return TORCHSCRIPT if self.compiled_for is None else AOTINDUCTOR


def encoder_hash(config: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of an encoder's config and state dict: equal for equal models."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sealed(folder: Path, path: Path) -> BundleFile:
    """A finished file as the manifest names it, on the disk for good."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    size = path.stat().st_size
    return BundleFile(path.relative_to(folder).as_posix(), size, sha256_of(path))


def check_file(path: Path, expected: BundleFile, hashes: bool) -> None:
    if not path.is_file():
        raise InputError(f"{path} is named in the bundle's manifest and absent; {AGAIN}")
    size = path.stat().st_size
    if size != expected.bytes:
        raise InputError(
            f"{path} has {size:,} bytes, the bundle's manifest says {expected.bytes:,}; {AGAIN}"
        )
    if hashes and sha256_of(path) != expected.sha256:
        raise InputError(f"{path} is damaged, its hash is not the manifest's; {AGAIN}")
