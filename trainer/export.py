"""A checkpoint to a bundle: python -m trainer.export checkpoint=RUN_DIR output=BUNDLE rows=fp32

The encoder is scripted, or compiled (format=aotinductor), the item table is streamed in blocks of
rows (memory is one block), and the result must answer a probe of real histories as the trainer did
before it gets its name. The bundle's files: data/bundle.py. Needs no process group and no GPU.
"""

# ruff: noqa: E402
from configs.environment import check_versions, versions

check_versions()  # a mismatch would break the imports below

import hashlib
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor

from configs.command import command
from data.bundle_manifest import (
    FORMATS,
    ROW_FORMATS,
    ROWS,
    TOP_LEVEL,
    TORCHSCRIPT,
    BundleFile,
    BundleManifest,
    encoder_hash,
    sealed,
)
from data.compiled import AOTINDUCTOR, TARGET
from data.errors import InputError, check_whole, reason
from data.output_folder import new_folder
from data.reader import HistoryDataset
from data.schema import MANIFEST, VOCABULARY, Manifest
from data.vocabulary import Vocabulary
from modules.encoder import Encoder
from modules.scorer import Scorer, quantise
from trainer.checkpoint import CONFIG, PROBE, find, read_state
from trainer.checkpoint_files import Planner, Reader, find_damage
from trainer.config import ModelConfig, completed
from trainer.model_files import load_written, write_model
from trainer.parity import QUALITY_USERS, Parity, compare, held_out_ndcg
from trainer.stored_rows import StoredTable

QUALITY_BYTES = 1 << 30  # up to this many bytes of fp32 rows the loss by row format is measured


@dataclass(frozen=True)
class ExportConfig:
    """The options of configs/export.yaml, checked."""

    checkpoint: str
    output: str
    rows: str = "fp32"
    format: str = TORCHSCRIPT
    data_path: str | None = None
    min_agreement: float = 0.95
    block_bytes: int = 1 << 28
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("rows", ROW_FORMATS), ("format", FORMATS)):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name}={getattr(self, name)} is unknown; choose {' | '.join(choices)}"
                )
        if not isinstance(self.min_agreement, int | float) or not 0 <= self.min_agreement <= 1:
            raise InputError(f"min_agreement={self.min_agreement} is outside [0, 1]")
        check_whole("block_bytes", self.block_bytes, 1)
        if not isinstance(self.overwrite, bool):
            raise InputError(f"overwrite={self.overwrite} must be true or false")


@dataclass(frozen=True)
class Source:
    """What is exported: a checkpoint, its run's config, its table and its data set."""

    folder: Path
    config: dict[str, Any]
    table: StoredTable
    data: Path
    dataset: Manifest


def export(config: ExportConfig) -> BundleManifest:
    """Write the bundle and return its manifest.

    Raises InputError where the checkpoint, its data set or the output cannot be used, and where
    the bundle disagrees with the trainer by more than `min_agreement` allows.
    """
    source = open_source(Path(config.checkpoint), config.data_path)
    encoder = load_encoder(source)
    with new_folder(Path(config.output), TOP_LEVEL, config.overwrite) as folder:
        code = write_model(folder, config.format, source.config["model"], encoder)
        parts = write_rows(folder, source.table.blocks(config.block_bytes), config.rows)
        shutil.copyfile(source.data / VOCABULARY, folder / VOCABULARY)
        model = load_written(folder, config.format, source.config["model"], parts)
        parity = compare(model, _probe(source.folder))
        print(f"parity over {parity}")
        if config.rows != "fp32":
            _report_loss(source, encoder, model, config)
        _judge(parity, config)
        files = [sealed(folder, path) for path in (*code, *parts, folder / VOCABULARY)]
        manifest = _manifest(source, encoder, config, parity, files)
        manifest.write(folder)
    return manifest


def open_source(path: Path, data: str | None) -> Source:
    """Find the checkpoint that `path` names and what belongs to it. Raises InputError."""
    folder = find(path)
    damage = find_damage(folder)
    if damage is not None:
        raise InputError(f"checkpoint {folder} is damaged: {damage}; export another one")
    config = _run_config(folder / CONFIG)
    shown = config["data"].get("max_history")
    if shown is not None:
        raise InputError(
            f"{folder} saw data.max_history={shown} events of a history, and scoring reads whole "
            "ones: its figures would not hold; export a run with data.max_history=null"
        )
    place = Path(data or config["data"]["path"])
    if not (place / MANIFEST).exists():
        raise InputError(
            f"the data set {place} that the run trained on is not there; name its new place with "
            "data_path=DIR"
        )
    if hashlib.sha256((place / MANIFEST).read_bytes()).hexdigest() != config["data_sha256"]:
        raise InputError(
            f"{place} is not the data set that {folder} was trained on; name that one with "
            "data_path=DIR"
        )
    dataset, table = Manifest.read(place), StoredTable(folder)
    if table.rows != dataset.table_rows:
        raise InputError(
            f"{folder} has {table.rows} item rows, its data set {place} {dataset.table_rows}; "
            "export another checkpoint"
        )
    Vocabulary.read(place)  # the bundle gets a copy: it must be whole
    return Source(folder, config, table, place, dataset)


def _run_config(path: Path) -> dict[str, Any]:
    """The run's config, with all that the export reads of it."""
    try:
        config = completed(yaml.safe_load(path.read_text()))
        for part, key in (("data", "path"), ("trainer", "targets")):
            config[part][key]
        for key in ("data_sha256", "seed"):
            config[key]
        ModelConfig(**config["model"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} is absent or damaged ({reason(error)}); copy the {CONFIG} of the run's folder "
            "there, or export another checkpoint"
        ) from error
    return config


def load_encoder(source: Source) -> Encoder:
    """The trained encoder, in eval mode. Raises InputError."""
    encoder = Encoder(**asdict(ModelConfig(**source.config["model"])))
    with warnings.catch_warnings():
        # "torch.distributed is disabled": that is what no_dist asks for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                {"model": {"encoder": encoder.state_dict()}},
                storage_reader=Reader(source.folder),
                planner=Planner(),
                no_dist=True,
            )
        except dcp.api.CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            raise InputError(
                f"the encoder in {source.folder} is damaged or not that of its {CONFIG} "
                f"({reason(cause)}); use another checkpoint"
            ) from error
    return encoder.eval()


def write_rows(folder: Path, blocks: Iterable[Tensor], kind: str) -> list[Path]:
    """Write `rows/part-NNNNN.pt`, a file a block; the files in order."""
    (folder / ROWS).mkdir()
    paths = []
    for number, block_RD in enumerate(blocks):
        rows_RD, scales_R = quantise(block_RD, kind)
        part = {"rows": rows_RD} if scales_R is None else {"rows": rows_RD, "scales": scales_R}
        paths.append(folder / ROWS / f"part-{number:05d}.pt")
        torch.save(part, paths[-1])
    return paths


def _probe(folder: Path) -> dict[str, Tensor]:
    path = folder / PROBE
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise InputError(
            f"{path} cannot be read ({reason(error)}); use another checkpoint"
        ) from error


def _report_loss(source: Source, encoder: Encoder, model: Any, config: ExportConfig) -> None:
    """Print what the row format costs in NDCG@10, where fp32 rows fit in memory beside it."""
    size = 4 * source.table.rows * source.table.width
    if size > QUALITY_BYTES:
        print(f"NDCG loss by rows={config.rows} not measured: {size:,} bytes of fp32 rows")
        return
    exact = Scorer(encoder)
    exact.set_rows(list(source.table.blocks(config.block_bytes)), [])
    dataset = HistoryDataset(source.data, source.config.get("data_skipped", []))
    before, after = held_out_ndcg(exact, dataset), held_out_ndcg(model, dataset)
    print(
        f"test NDCG@10, unfiltered, first {min(QUALITY_USERS, len(dataset)):,} users: fp32 rows "
        f"{before:.4f}, {config.rows} rows {after:.4f} ({after - before:+.4f})"
    )


def _judge(parity: Parity, config: ExportConfig) -> None:
    if not parity.overlap >= config.min_agreement:  # NaN is not enough either
        finding = (
            f"agrees with the trainer on {parity.overlap:.4f} of the top {parity.items} items"
            if parity.users
            else "cannot be compared with the trainer, the checkpoint's probe has no user"
        )
        raise InputError(
            f"the bundle {finding}, below min_agreement={config.min_agreement}; nothing was written"
            + ("" if config.rows == "fp32" else "; rows=fp32 is exact")
        )


def _manifest(
    source: Source,
    encoder: Encoder,
    config: ExportConfig,
    parity: Parity,
    files: list[BundleFile],
) -> BundleManifest:
    state = read_state(source.folder)
    figures = [one for one in state.evaluations if one["step"] == state.step]
    return BundleManifest(
        files=files,
        rows=config.rows,
        table_rows=source.table.rows,
        model=source.config["model"],
        data={
            "manifest_sha256": source.config["data_sha256"],
            "options": source.dataset.options,
            "split": source.dataset.split,
            "counts": source.dataset.counts,
        },
        checkpoint={
            "step": state.step,
            "epoch": state.epoch,
            "validation": figures[-1] if figures else None,
            "seed": source.config["seed"],
        },
        protocol={
            "ranking": "all items, exact, fp32",
            "ties": "pessimistic",
            "targets": source.config["trainer"]["targets"],
            "filtered": "items of the target's own history left out",
        },
        parity=asdict(parity),
        versions=versions(),
        encoder_sha256=encoder_hash(source.config["model"], encoder.state_dict()),
        compiled_for=TARGET if config.format == AOTINDUCTOR else None,
    )


@command("export")
def main(options: dict[str, Any]) -> None:
    config = ExportConfig(**options)
    manifest = export(config)
    size = sum(one.bytes for one in manifest.files)
    print(
        f"bundle {config.output}: {manifest.table_rows:,} {manifest.rows} rows, step "
        f"{manifest.checkpoint['step']:,}, {size / 2**20:,.1f} MiB in {len(manifest.files)} files"
    )


if __name__ == "__main__":
    main()
