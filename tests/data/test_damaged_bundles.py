"""Bundles from elsewhere: a damaged one is named, and nothing but TorchScript in one is run."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bundle import Bundle
from data.bundle_manifest import MODEL, BundleManifest, sealed
from data.errors import InputError
from data.schema import MANIFEST
from tests.trained_run import Trained, trained

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def bundle(made, tmp_path_factory) -> Path:
    return shutil.copytree(made.bundle, tmp_path_factory.mktemp("bundle") / "b")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_named(bundle, data):
    files = sorted(one for one in bundle.rglob("*") if one.is_file())
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    fingerprint = BundleManifest.read(bundle).fingerprint
    place = data.draw(st.integers(0, len(whole) - 1))
    content = bytearray(whole)
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        path.write_bytes(content)
        try:
            opened = Bundle.open(bundle, CPU)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:  # a letter of what is only told, of the versions say
            assert path.name == MANIFEST
            assert opened.manifest.fingerprint == fingerprint
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("key", ["encoder_sha256", "model"])
def test_a_manifest_of_another_encoder_is_named(bundle, key):
    """The fingerprint, by which states know their model, is made of it."""
    path = bundle / MANIFEST
    whole = path.read_bytes()
    content = json.loads(whole)
    if key == "model":
        content["model"]["head"] += 1
    else:
        content[key] = content[key][::-1]
    try:
        path.write_text(json.dumps(content))
        with pytest.raises(
            InputError, match=r"its model or encoder_sha256 is not that of model\.pt"
        ):
            Bundle.open(bundle, CPU)
    finally:
        path.write_bytes(whole)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", [MODEL, "rows/part-00000.pt"])
def test_a_pickle_in_a_bundle_is_not_run(made, tmp_path, name):
    folder = shutil.copytree(made.bundle, tmp_path / "b")
    torch.save({"rows": Evil(tmp_path / "mark")}, folder / name)
    manifest = BundleManifest.read(folder)
    files = [sealed(folder, folder / one.path) for one in manifest.files]
    replace(manifest, files=files).write(folder)
    with pytest.raises(InputError, match="cannot be loaded"):
        Bundle.open(folder, CPU)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("path", ["../b/model.pt", "/etc/hostname"])
def test_a_manifest_names_no_file_elsewhere(made, tmp_path, path):
    folder = shutil.copytree(made.bundle, tmp_path / "b")
    manifest = BundleManifest.read(folder)
    replace(manifest, files=[replace(manifest.files[0], path=path)]).write(folder)
    with pytest.raises(InputError, match=f"names {path}, outside its own folder"):
        Bundle.open(folder, CPU)
