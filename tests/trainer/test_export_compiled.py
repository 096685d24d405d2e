"""format=aotinductor: answers as TorchScript does, runs only when asked to, refused elsewhere."""

import json
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pyarrow.parquet as pq
import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.exc import CppCompileError, InductorError

from data.bundle import Bundle
from data.bundle_manifest import BundleManifest, sealed
from data.compiled import AOTINDUCTOR, FORWARD, STEP, TARGET, WEIGHTS, is_target
from data.errors import InputError
from data.schema import RESERVED_ROWS
from tests.tools.test_update_states import write_log
from tests.trained_run import Trained, trained
from tools.score_histories import ScoreConfig, score
from tools.update_states import UpdateConfig, update
from trainer.export import ExportConfig, export

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or not is_target() or not hasattr(inductor.cpp, "march"),
    reason="format=aotinductor needs g++, an x86-64 CPU with AVX2 and torch 2.13",
)


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def native(made, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "bundle"
    export(ExportConfig(str(made.run), str(folder), rows="int8", format=AOTINDUCTOR))
    return folder


@pytest.fixture(scope="module")
def pair(made, native, tmp_path_factory) -> tuple[Bundle, Bundle]:
    """The same checkpoint and rows as TorchScript and as native code."""
    folder = tmp_path_factory.mktemp("script") / "bundle"
    export(ExportConfig(str(made.run), str(folder), rows="int8"))
    return Bundle.open(folder, CPU), Bundle.open(native, CPU, native_code=True)


def test_bundle_is_the_same_model(pair):
    script, native = pair
    assert {WEIGHTS, FORWARD, STEP} < {one.path for one in native.manifest.files}
    assert (script.manifest.format, native.manifest.format) == ("torchscript", "aotinductor")
    assert native.manifest.parity["overlap"] >= 0.95
    assert native.manifest.fingerprint == script.manifest.fingerprint


@torch.no_grad()
def test_encoder_answers_at_any_size(pair):
    script, native = (one.model.encoder for one in pair)
    for lengths in ([1], [2], [31], [32], [33], [96], [1285], [5, 27], [1, 31, 63, 1], [3] * 300):
        for padding in (0, 9):
            x_TD = torch.randn(sum(lengths) + padding, 16)
            offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
            read_S = offsets_B1[1:] - 1
            expected_SD = script(x_TD, offsets_B1, read_S)
            torch.testing.assert_close(native(x_TD, offsets_B1, read_S), expected_SD)
    read_S = torch.randperm(900)[:77]
    expected_SD = script(x_TD, offsets_B1, read_S)
    # Strides and integers of another kind than the program was made with.
    strided_TD = x_TD.t().contiguous().t()
    assert not strided_TD.is_contiguous()
    given = strided_TD, offsets_B1.int(), read_S.int()
    torch.testing.assert_close(native(*given), expected_SD)
    with pytest.raises(ValueError, match="answers in fp32, at the tokens that are read"):
        native(x_TD, offsets_B1)


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_scores_equal_torchscripts(pair, exclude_seen):
    script, native = pair
    generator = torch.Generator().manual_seed(1)
    for lengths in ([1], [1, 0], [0, 31, 1, 0], [33, 64], [7] * 50, [400]):
        offsets_B1 = torch.tensor([0, *lengths]).cumsum(0)
        table = (RESERVED_ROWS, script.manifest.table_rows)
        items_T = torch.randint(*table, [sum(lengths)], generator=generator)
        (_, scores_BK), (_, expected_BK) = (
            one.score(items_T, offsets_B1, 10, exclude_seen) for one in (native, script)
        )
        torch.testing.assert_close(scores_BK, expected_BK, rtol=1e-5, atol=1e-5)


def test_states_move_on_as_torchscripts(pair):
    script, native = pair
    for users in (1, 2, 5):
        state_UF, expected_UF = native.new_states(users), script.new_states(users)
        for event in range(3):
            items_U = torch.arange(users) + RESERVED_ROWS + event
            state_UF = native.advance(state_UF, items_U)
            expected_UF = script.advance(expected_UF, items_U)
        torch.testing.assert_close(state_UF, expected_UF, rtol=1e-5, atol=1e-5)
        rows_UK, _ = native.score_states(state_UF, 5)
        assert rows_UK.tolist() == script.score_states(expected_UF, 5)[0].tolist()


def test_scoring_tool_is_asked_by_name(made, native, pair, tmp_path):
    options = {"input": str(made.data), "k": 5, "device": "cpu"}
    with pytest.raises(InputError, match=r"is native code, .* with kernels=aotinductor"):
        score(ScoreConfig(str(native), output=str(tmp_path / "no"), **options))
    with pytest.raises(InputError, match=r"for a bundle of that format, .* is torchscript"):
        score(
            ScoreConfig(
                str(made.bundle), output=str(tmp_path / "no"), kernels=AOTINDUCTOR, **options
            )
        )
    script = pair[0].folder
    score(ScoreConfig(str(script), output=str(tmp_path / "a"), **options))
    summary = score(
        ScoreConfig(str(native), output=str(tmp_path / "b"), kernels=AOTINDUCTOR, **options)
    )
    assert summary is not None
    assert summary["kernels"] == AOTINDUCTOR
    files = [sorted((tmp_path / name).glob("part-*.parquet")) for name in "ab"]
    assert len(files[0]) == len(files[1]) > 0
    for ours, theirs in zip(*files, strict=True):
        a, b = (pq.read_table(one).to_pydict() for one in (ours, theirs))
        assert a["user_id"] == b["user_id"]
        assert torch.allclose(*(torch.tensor(one["scores"]) for one in (a, b)), atol=1e-5)


def test_states_go_on_from_either_format(native, pair, tmp_path):
    days = [
        write_log(tmp_path / f"{day}.parquet", range(5), range(9 + day, 14 + day), [day] * 5)
        for day in range(2)
    ]
    first = {"bundle": str(pair[0].folder), "events": str(days[0]), "device": "cpu"}
    update(UpdateConfig(**first, output=str(tmp_path / "first")))
    both = {"states": str(tmp_path / "first"), "events": str(days[1]), "k": 5, "device": "cpu"}
    with pytest.raises(InputError, match="open it with native_code=true"):
        update(UpdateConfig(str(native), output=str(tmp_path / "no"), **both))
    with pytest.raises(InputError, match="native_code=1 must be true or false"):
        UpdateConfig(str(native), output=str(tmp_path / "no"), native_code=1, **both)
    update(UpdateConfig(str(native), output=str(tmp_path / "a"), native_code=True, **both))
    update(UpdateConfig(str(pair[0].folder), output=str(tmp_path / "b"), **both))
    ours, theirs = (
        pq.read_table(tmp_path / name / "scores").sort_by("user_id").to_pydict() for name in "ab"
    )
    assert ours["item_ids"] == theirs["item_ids"]
    assert len(ours["user_id"]) == 5
    assert torch.allclose(*(torch.tensor(one["scores"]) for one in (ours, theirs)), atol=1e-5)


ALONE = """
import sys, torch
from pathlib import Path
folder = Path(sys.argv[1])
forward = torch._inductor.aoti_load_package(str(folder / "forward.pt2"))
weights = torch.load(folder / "encoder.pt", weights_only=True)
names = forward.get_constant_fqns()
forward.load_constants({name: weights[name] for name in names}, check_full_update=True)
x_KQD = torch.linspace(-1, 1, 3 * 32 * 16).view(3, 32, 16)
h_SD = forward(x_KQD, torch.tensor([0, 50, 96]), torch.tensor([49, 95]))
ours = {"torchrec", "fbgemm_gpu", "trainer", "modules", "data", "configs", "pyarrow"}
assert not ours & set(sys.modules), ours & set(sys.modules)
print(h_SD.tolist())
"""


def test_code_runs_with_torch_alone_from_any_folder(native, pair, tmp_path):
    moved = shutil.copytree(native, tmp_path / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(moved)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    x_TD = torch.linspace(-1, 1, 3 * 32 * 16).view(96, 16)
    expected = pair[0].model.encoder(x_TD, torch.tensor([0, 50, 96]), torch.tensor([49, 95]))
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def rewritten(folder: Path, **changes: object) -> None:
    """The manifest with these fields, and the files as they are."""
    manifest = BundleManifest.read(folder)
    files = [sealed(folder, folder / one.path) for one in manifest.files]
    replace(manifest, files=files, **changes).write(folder)


def refusal(folder: Path, device: str = "cpu", native_code: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        Bundle.open(folder, device, native_code=native_code)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_code_is_not_loaded_where_it_does_not_belong(native, monkeypatch, tmp_path):
    folder = shutil.copytree(native, tmp_path / "b")

    def loaded(*arguments: object) -> None:
        raise AssertionError("the code was loaded")

    monkeypatch.setattr("data.bundle.load_compiled", loaded)
    assert "open it with native_code=true" in refusal(folder, native_code=False)
    assert "for CPUs, not for cuda; use device=cpu" in refusal(folder, "cuda")
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert "for x86_64 CPUs with AVX2, which this machine is not" in refusal(folder)
    versions = BundleManifest.read(folder).versions
    rewritten(folder, versions=versions | {"torch": "2.5.1"})
    assert "compiled by torch 2.5.1, and here is" in refusal(folder)
    rewritten(folder, versions=versions, compiled_for=TARGET | {"instructions": "AVX9"})
    assert re.search("is compiled for .*'AVX9'.*, not for .*'AVX2'", refusal(folder))
    rewritten(folder, compiled_for=TARGET)
    (folder / FORWARD).write_bytes((folder / FORWARD).read_bytes()[:-1] + b"?")
    assert "forward.pt2 is damaged" in refusal(folder)


def test_damage_that_the_hashes_cannot_show_is_named(native, tmp_path):
    folder = shutil.copytree(native, tmp_path / "b")
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    name = "layers.0.norm1.weight"
    torch.save(weights | {name: weights[name] + 1}, folder / WEIGHTS)
    rewritten(folder)
    assert "model or encoder_sha256 is not that of encoder.pt" in refusal(folder)
    torch.save({name: weights[name]}, folder / WEIGHTS)
    rewritten(folder)
    assert "cannot be loaded" in refusal(folder)
    torch.save(weights, folder / WEIGHTS)
    (folder / FORWARD).write_bytes(b"no package")
    rewritten(folder)
    assert "cannot be loaded" in refusal(folder)


def test_where_it_cannot_be_compiled(made, monkeypatch, tmp_path):
    config = ExportConfig(str(made.run), str(tmp_path / "b"), format=AOTINDUCTOR)
    compiler = r"needs a C\+\+ compiler, .* no g\+\+ here; install"
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(InputError, match=compiler),
    ):
        export(config)
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "aarch64")
        with pytest.raises(InputError, match="compiles for x86_64 CPUs with AVX2, and this machin"):
            export(config)
    with monkeypatch.context() as patch:
        patch.setattr(inductor._config["cpp.march"], "hide", True)  # as if it had none
        with pytest.raises(InputError, match=r"for the CPU that it runs on alone, .* torch 2\.13"):
            export(config)
    said = "C++ compile error\nOutput:\na.cpp:1: fatal error: math.h: none\n  1 | #include\n"
    broken = Mock(side_effect=InductorError(CppCompileError(["g++"], said), None))
    monkeypatch.setattr("modules.compiled.compile_encoder", broken)
    with pytest.raises(InputError, match=r"compiler .* \(a.cpp:1: .* math.h: none\); mend it, or"):
        export(config)
    assert not (tmp_path / "b").exists()
    with pytest.raises(InputError, match=r"format=onnx is unknown; choose torchscript \| aotin"):
        ExportConfig("run", "bundle", format="onnx")
