"""Export: the bundle answers as the trainer, loads with torch alone, and is refused when off."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from data.bundle import Bundle
from data.bundle_manifest import BundleManifest
from data.bundle_manifest import sealed as bundle_file
from data.errors import InputError
from data.schema import VOCABULARY, Manifest
from tests.trained_run import Trained, run_command, trained
from trainer.checkpoint import find
from trainer.checkpoint_files import checksums, write_manifest
from trainer.export import ExportConfig, export
from trainer.parity import compare
from trainer.stored_rows import TABLE_NAME, StoredTable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


def test_bundle_answers_as_the_trainer(made):
    bundle = Bundle.open(made.bundle, CPU)
    parity = bundle.manifest.parity
    assert parity["users"] > 10
    assert parity["overlap"] == parity["top1"] == 1.0
    assert parity["score_error"] < 1e-5
    assert bundle.manifest.checkpoint["validation"]["unfiltered"]["ndcg@10"] > 0
    assert bundle.manifest.data["options"]["log"]["deduplicate"] == "none"
    assert (made.bundle / VOCABULARY).read_bytes() == (made.data / VOCABULARY).read_bytes()


@pytest.mark.parametrize("rows", ["fp16", "int8"])
def test_smaller_rows_pass_the_gate_and_print_their_loss(made, rows, tmp_path, capsys):
    # Many small blocks: the same rows in many files.
    config = ExportConfig(
        str(made.run), str(tmp_path / "b"), rows, min_agreement=0.8, block_bytes=1500
    )
    manifest = export(config)
    assert f"{rows} rows" in capsys.readouterr().out
    assert len([one for one in manifest.files if one.path.startswith("rows/")]) == 3
    small, exact = Bundle.open(tmp_path / "b", CPU), Bundle.open(made.bundle, CPU)
    every = torch.arange(manifest.table_rows)
    bound = 2**-10 if rows == "fp16" else 0.51 / 127
    values = exact.model.look_up(every)
    off = (small.model.look_up(every) - values).abs()
    assert (off <= bound * values.abs().amax(1, keepdim=True)).all()


ALONE = """
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
model = torch.jit.load(str(folder / "model.pt"))
parts = [torch.load(p, weights_only=True) for p in sorted((folder / "rows").iterdir())]
model.set_rows([p["rows"] for p in parts], [p["scales"] for p in parts if "scales" in p])
rows, scores = model(torch.tensor([8, 9, 10, 11]), torch.tensor([0, 3, 4]), 5, True)
ours = {"torchrec", "fbgemm_gpu", "trainer", "modules", "data", "configs", "pyarrow"}
assert not ours & set(sys.modules), ours & set(sys.modules)
print(rows.tolist())
"""


def test_bundle_loads_with_torch_alone_from_any_folder(made, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(made.bundle, moved)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(moved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    items, offsets = torch.tensor([8, 9, 10, 11]), torch.tensor([0, 3, 4])
    expected, _ = Bundle.open(made.bundle, CPU).score(items, offsets, 5, True)
    assert json.loads(done.stdout) == expected.tolist()


def test_bundle_module_needs_no_torchrec():
    code = "import data.bundle, sys; print({'torchrec', 'trainer', 'modules'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


class ShardsPlanner(DefaultSavePlanner):
    """Saves parts of one table, by their (row, column), as the ranks of a sharded run would."""

    def __init__(self, whole: Tensor, shards: dict[tuple[int, int], tuple[int, int]]) -> None:
        super().__init__()
        self.whole, self.shards = whole, shards

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(
                index=MetadataIndex(TABLE_NAME, torch.Size(offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(torch.Size(offset), torch.Size(size)),
                    TensorProperties.create_from_tensor(self.whole),
                    self.whole.size(),
                ),
            )
            for offset, size in self.shards.items()
        ]
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        row, column = index.offset
        rows, columns = self.shards[row, column]
        return self.whole[row : row + rows, column : column + columns]


@pytest.mark.parametrize(
    "shards",
    [
        {(0, 0): (40, 6)},
        {(0, 0): (25, 6), (25, 0): (15, 6)},
        {(0, 0): (40, 4), (0, 4): (40, 2)},
        {(0, 0): (13, 4), (13, 0): (27, 4), (0, 4): (13, 2), (13, 4): (27, 2)},
    ],
    ids=["whole", "row_wise", "column_wise", "grid"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_stored_rows_of_any_sharding(shards, dtype, tmp_path):
    whole = torch.randn(40, 6).to(dtype)
    dcp.save({}, checkpoint_id=tmp_path, planner=ShardsPlanner(whole, shards), no_dist=True)
    table = StoredTable(tmp_path)
    assert (table.rows, table.width) == (40, 6)
    for block_bytes in (1, 24 * 7, 1 << 20):
        assert torch.equal(torch.cat(list(table.blocks(block_bytes))), whole.float())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_without_the_whole_table_is_refused(tmp_path):
    dcp.save({"model": torch.ones(3)}, checkpoint_id=tmp_path / "none", no_dist=True)
    with pytest.raises(
        InputError, match=r"none holds no item table .*; give a checkpoint of a run"
    ):
        StoredTable(tmp_path / "none")
    planner = ShardsPlanner(torch.randn(40, 6), {(0, 0): (25, 6)})
    dcp.save({}, checkpoint_id=tmp_path / "part", planner=planner, no_dist=True)
    with pytest.raises(
        InputError, match=r"stores 150 of the item table's 240 numbers; use another"
    ):
        StoredTable(tmp_path / "part")


def seal(folder: Path) -> None:
    """Give the checkpoint the checksums of its files, to try what lies behind them."""
    files = [one for one in folder.iterdir() if one.name != "files.json"]
    write_manifest(folder, checksums(files))


def test_a_model_that_is_off_is_refused(made, tmp_path):
    """A probe that another model answered: nothing is written."""
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    probe = torch.load(folder / "probe.pt", weights_only=True)
    probe["items"] = probe["items"].roll(1, 0)
    torch.save(probe, folder / "probe.pt")
    seal(folder)
    with pytest.raises(InputError, match=r"below min_agreement=0\.95"):
        export(ExportConfig(str(folder), str(tmp_path / "b")))
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_a_model_that_answers_nan_is_refused(made, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    config = ExportConfig(str(folder), str(tmp_path / "b"), min_agreement=0.0)
    broken = lambda table, _: iter([torch.full((table.rows, table.width), torch.nan)])  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(StoredTable, "blocks", broken)
        with pytest.raises(InputError, match=r"exported model answers NaN .*rows=fp32"):
            export(config)
    probe = torch.load(folder / "probe.pt", weights_only=True)
    probe["scores"][2, 3] = torch.nan
    torch.save(probe, folder / "probe.pt")
    seal(folder)
    with pytest.raises(InputError, match=r"checkpoint's model answers NaN .*an earlier checkpoint"):
        export(config)
    probe["scores"][2] = -torch.inf  # no item at all: the mean overlap is NaN
    torch.save(probe, folder / "probe.pt")
    seal(folder)
    with pytest.raises(InputError, match="below min_agreement"):
        export(config)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_parity_counts_what_differs(made):
    bundle = Bundle.open(made.bundle, CPU)
    probe = torch.load(find(made.run) / "probe.pt", weights_only=True)
    probe["items"][:, 0], probe["items"][:, 1] = probe["items"][:, 1], probe["items"][:, 0].clone()
    probe["items"][:, 19] = 0
    parity = compare(bundle.model, probe)
    assert parity.top1 == 0.0
    assert parity.overlap == pytest.approx(0.95)
    assert 0 < parity.score_error < 1


def test_refusals(made, tmp_path):
    there = str(made.bundle)
    with pytest.raises(InputError, match="already exists"):
        export(ExportConfig(str(made.run), there))
    with pytest.raises(InputError, match="block_bytes=0 must be a whole number, 1 or more"):
        ExportConfig(str(made.run), there, block_bytes=0)
    with pytest.raises(InputError, match="rows=int4 is unknown"):
        ExportConfig(str(made.run), there, rows="int4")
    with pytest.raises(InputError, match=r"min_agreement=1\.5 is outside \[0, 1\]"):
        ExportConfig(str(made.run), there, min_agreement=1.5)
    with pytest.raises(InputError, match="overwrite=yes must be true or false"):
        ExportConfig(str(made.run), there, overwrite="yes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds 'histories'"):
        export(ExportConfig(str(made.run), str(made.data), overwrite=True))
    with pytest.raises(InputError, match="no checkpoint and no run"):
        export(ExportConfig(str(tmp_path), str(tmp_path / "b")))
    with pytest.raises(InputError, match=r"is not there; name its new place with data_path=DIR"):
        export(ExportConfig(str(made.run), str(tmp_path / "b"), data_path=str(tmp_path)))


def test_another_data_set_is_refused(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    data = shutil.copytree(made.data, tmp_path / "data")
    manifest = Manifest.read(data)
    replace(manifest, table_rows=manifest.table_rows + 1).write(data)
    config = ExportConfig(str(folder), str(tmp_path / "b"), data_path=str(data))
    with pytest.raises(InputError, match=r"/data is not the data set that .*data_path=DIR"):
        export(config)
    old, new = (
        hashlib.sha256((one / "manifest.json").read_bytes()).hexdigest()
        for one in (made.data, data)
    )
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(old, new))
    seal(folder)
    with pytest.raises(InputError, match=r"has 58 item rows, its data set .*/data 59; export ano"):
        export(config)
    assert not (tmp_path / "b").exists()


def truncate(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def garble_start(path: Path) -> None:
    """The encoder stands before the table."""
    content = path.read_bytes()
    path.write_bytes(b"x" * 500 + content[500:])


def other_width(path: Path) -> None:
    path.write_text(path.read_text().replace("width: 16", "width: 24"))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("config.yaml", Path.unlink, "config.yaml is absent or damaged .*the run's folder"),
        (
            "config.yaml",
            lambda path: path.write_text("a: [b\nc: }"),
            "config.yaml is absent or dam",
        ),
        ("config.yaml", lambda path: path.write_text("model: {}"), r"config.yaml .*\('data'\)"),
        ("config.yaml", lambda path: path.write_text(""), "config.yaml is absent or damaged"),
        ("*.distcp", Path.unlink, "distcp is damaged .*use another checkpoint"),
        ("*.distcp", lambda path: path.write_bytes(b""), "distcp is damaged .*another checkpoint"),
        ("*.distcp", lambda path: truncate(path, 0.05), "is damaged .*another checkpoint"),
        ("*.distcp", garble_start, "the encoder in .*/run is damaged .*use another checkpoint"),
        ("config.yaml", other_width, r"the encoder in .*/run is damaged or not that of its config"),
        ("*.distcp", lambda path: path.write_bytes(b"x" * 99_999), "is damaged .*another check"),
        (".metadata", lambda path: path.write_bytes(b"x" * 99), ".metadata is damaged"),
        ("probe.pt", Path.unlink, "probe.pt cannot be read .*another checkpoint"),
        ("probe.pt", lambda path: path.write_bytes(b"x" * 99), "probe.pt cannot be read .*another"),
        ("probe.pt", lambda path: truncate(path, 0.5), "probe.pt cannot be read .*another"),
    ],
)
def test_damaged_checkpoints_are_named(made, tmp_path, name, spoil, message):
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    (path,) = folder.glob(name)
    spoil(path)
    with pytest.raises(InputError, match=rf"is damaged: .*{re.escape(path.name)}"):
        export(ExportConfig(str(folder), str(tmp_path / "b")))
    seal(folder)
    with pytest.raises(InputError, match=message) as raised:
        export(ExportConfig(str(folder), str(tmp_path / "b")))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "b").exists()


def test_a_run_that_saw_part_of_the_histories_is_not_exported(made, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("max_history: null", "max_history: 9"))
    seal(folder)
    with pytest.raises(InputError, match=r"saw data\.max_history=9 events of a history"):
        export(ExportConfig(str(folder), str(tmp_path / "b")))


def test_a_data_set_that_moved_is_named_on_the_command_line(made, tmp_path):
    """As the config of a run that was started in another folder with a relative path."""
    folder = tmp_path / "run"
    shutil.copytree(find(made.run), folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(made.data), "elsewhere/data"))
    seal(folder)
    command = ["trainer.export", f"checkpoint={folder}", f"output={tmp_path / 'b'}"]
    line = run_command(*command, fails=True)
    assert "elsewhere/data" in line
    assert "data_path=DIR" in line
    assert "overlap 1.0000" in run_command(*command, f"data_path={made.data}")


def test_command_replaces_a_bundle_when_told(made, tmp_path):
    output = tmp_path / "b"
    shutil.copytree(made.bundle, output)
    (output / "model.pt").write_bytes(b"old")
    done = run_command(
        "trainer.export", f"checkpoint={made.run}", f"output={output}", "overwrite=true"
    )
    assert "overlap 1.0000" in done
    assert Bundle.open(output, CPU).manifest.rows == "fp32"


def spoil_size(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"short")


def spoil_content(folder: Path) -> None:
    path = folder / "rows" / "part-00000.pt"
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))


def spoil_place(folder: Path) -> None:
    manifest = BundleManifest.read(folder)
    files = [replace(manifest.files[0], path="../model.pt"), *manifest.files[1:]]
    replace(manifest, files=files).write(folder)


def spoil_model(folder: Path) -> None:
    (folder / "model.pt").write_bytes(b"no TorchScript")
    manifest = BundleManifest.read(folder)
    files = [bundle_file(folder, folder / one.path) for one in manifest.files]
    replace(manifest, files=files).write(folder)


def spoil_version(folder: Path) -> None:
    replace(BundleManifest.read(folder), bundle_version=99).write(folder)


def spoil_list(folder: Path) -> None:
    manifest = BundleManifest.read(folder)
    files = [one for one in manifest.files if one.path != "model.pt"]
    replace(manifest, files=files).write(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_list, r"manifest\.json is damaged: it does not list model\.pt; .*export"),
        (spoil_size, "bytes, the bundle's manifest says"),
        (spoil_content, "hash is not the manifest's"),
        (spoil_version, "bundle version 99"),
        (spoil_place, r"names \.\./model\.pt, outside its own folder; .*export"),
        (spoil_model, r"bundle .* cannot be loaded \(.*\); .*export"),
        (lambda folder: (folder / "manifest.json").unlink(), "no finished bundle"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
        (lambda folder: (folder / VOCABULARY).unlink(), "absent"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_damaged_bundles_are_named(made, tmp_path, spoil, message):
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    spoil(folder)
    with pytest.raises(InputError, match=message):
        Bundle.open(folder, CPU)


def test_a_bundle_of_the_version_before_opens(made, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundle, folder)
    raw = json.loads((folder / "manifest.json").read_text())
    del raw["compiled_for"]
    (folder / "manifest.json").write_text(json.dumps(raw | {"bundle_version": 3}))
    before = Bundle.open(folder, CPU)
    assert before.manifest.fingerprint == Bundle.open(made.bundle, CPU).manifest.fingerprint


def test_a_bundle_that_a_card_cannot_hold_is_named(made, monkeypatch):
    def load(*of):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 48.00 GiB.")

    monkeypatch.setattr("data.bundle.load_model", load)
    sentence = r"does not fit on cuda:0 \(CUDA out of memory.*\); use device=cpu, or .*rows=fp16"
    with pytest.raises(InputError, match=sentence):
        Bundle.open(made.bundle, "cuda:0")


def test_a_data_set_is_no_bundle(made):
    with pytest.raises(InputError, match="is no bundle"):
        Bundle.open(made.data, CPU)
