"""Checkpoints: damage is found and named, nothing in one runs, a full disk ends nothing."""

import json
import os
import pickle
import resource
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from data.errors import InputError
from modules.losses import FullSoftmax
from tests.distributed.worker import build, step
from trainer import checkpoint
from trainer.checkpoint import (
    RunState,
    checkpoint_path,
    list_checkpoints,
    load,
    require_best,
    state_tensors,
)
from trainer.checkpoint_files import (
    MANIFEST,
    METADATA,
    Planner,
    Reader,
    find_damage,
    read_metadata,
)
from trainer.run_folder import _compare, _compare_last_start, newest_whole
from trainer.saver import Saver, host_copy


@pytest.fixture
def sharded(one_rank):
    one = build(one_rank, "row_wise", FullSoftmax(0))
    step(one, one_rank, 0, sampled=False)
    return one


@pytest.fixture
def said() -> list[str]:
    return []


def saver(run_dir, sharded, world, said, asynchronous=False, keep=9) -> Saver:
    return Saver(run_dir, sharded, world, RunState(), "seed: 1", keep, asynchronous, said.append)


def save(writer: Saver, number: int) -> RunState:
    writer.save(RunState(step=number), {})
    return writer.settle(RunState(step=number))


@pytest.fixture
def two(tmp_path, sharded, one_rank, said) -> tuple[Path, Path]:
    """Two checkpoints, the older first."""
    with saver(tmp_path, sharded, one_rank, said) as writer:
        save(writer, 1)
        save(writer, 2)
    older, newer = list_checkpoints(tmp_path)
    return older, newer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut, flip, os.unlink])
@pytest.mark.parametrize("name", [METADATA, "__0_0.distcp", "state.json", MANIFEST])
def test_damaged_checkpoint_is_named_and_the_one_before_it_used(two, one_rank, name, harm, capsys):
    older, newer = two
    harm(newer / name)
    assert newest_whole(older.parent.parent, one_rank) == older
    said = capsys.readouterr().out
    assert f"checkpoint {newer} is damaged" in said
    assert name in said or name == MANIFEST
    assert (older.parent / "step-00000002.damaged1").is_dir(), "kept for a person to look at"
    assert find_damage(older) is None


def test_run_without_a_whole_checkpoint_does_not_begin_anew(two, one_rank):
    older, newer = two
    for one in two:
        flip(one / "__0_0.distcp")
    with pytest.raises(InputError, match=r"none of the 2 checkpoints in .* is whole"):
        newest_whole(older.parent.parent, one_rank)
    assert older.exists()
    assert newer.exists()


def test_best_checkpoint_is_looked_at_when_a_run_resumes(two, one_rank):
    older, _ = two
    state = RunState(step=2, best_step=1)
    require_best(older.parent.parent, state, one_rank)
    flip(older / "__0_0.distcp")
    with pytest.raises(InputError, match=r"best checkpoint .* is lost .*checksum"):
        require_best(older.parent.parent, state, one_rank)
    with pytest.raises(InputError, match=r"best checkpoint .* is lost \(.*files\.json is absent\)"):
        require_best(older.parent.parent, state.with_(best_step=7), one_rank)


def test_file_that_cannot_be_read_is_not_called_damaged(two, one_rank, monkeypatch):
    _, newer = two

    def failing(paths):
        raise OSError(5, "Input/output error", "f.distcp")

    monkeypatch.setattr("trainer.checkpoint_files.checksums", failing)
    with pytest.raises(InputError, match=r"f.distcp cannot be read \(Input/output error\)"):
        newest_whole(newer.parent.parent, one_rank)
    assert newer.exists()


def test_manifest_cannot_name_files_elsewhere(two):
    _, newer = two
    manifest = json.loads((newer / MANIFEST).read_text())
    manifest["files"]["../../secret"] = {"bytes": 1, "sha256": ""}
    (newer / MANIFEST).write_text(json.dumps(manifest))
    assert "is not in its own folder" in find_damage(newer)


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_metadata_that_would_run_something_is_refused(two, sharded, tmp_path):
    _, newer = two
    with_planner_data(newer, Evil(tmp_path / "mark"))
    with pytest.raises(InputError, match=r"names posix\.mkdir, which no checkpoint .* does"):
        load(newer, sharded)
    assert not (tmp_path / "mark").exists()


class Named:
    """Unpickled, `name` of `kind` by getattr: how Python 3.11.2 writes an enumeration's member."""

    def __init__(self, kind: type, name: str) -> None:
        self.of = kind, name

    def __reduce__(self):
        return getattr, self.of


def with_planner_data(folder: Path, value) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    metadata.planner_data = value
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def test_getattr_in_metadata_gives_members_of_enumerations_alone(two, sharded):
    _, newer = two
    member = next(iter(_MEM_FORMAT_ENCODING))
    with_planner_data(newer, Named(_MEM_FORMAT_ENCODING, member.name))
    assert read_metadata(newer).planner_data is member
    for kind, name in [(_MEM_FORMAT_ENCODING, "__call__"), (Metadata, "__init__")]:
        with_planner_data(newer, Named(kind, name))
        with pytest.raises(InputError, match=rf"asks for {name} of .*; it was not given"):
            load(newer, sharded)


def test_entry_that_is_a_pickle_is_refused(sharded, tmp_path, one_rank):
    target = checkpoint.state_tensors(sharded)
    name = next(iter(target["model"]))
    dcp.save({"model": {name: Evil(tmp_path / "mark")}}, checkpoint_id=tmp_path / "evil")
    with pytest.raises(dcp.api.CheckpointException, match="is no tensor but a pickle"):
        dcp.load(
            {"model": {name: target["model"][name]}},
            storage_reader=Reader(tmp_path / "evil"),
            planner=Planner(),
        )
    assert not (tmp_path / "mark").exists()


def test_metadata_cannot_name_files_elsewhere(two, sharded):
    _, newer = two
    metadata = pickle.loads((newer / METADATA).read_bytes())
    for one in metadata.storage_data.values():
        one.relative_path = "../../elsewhere.distcp"
    (newer / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(InputError, match="is not in its own folder"):
        load(newer, sharded)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_flipped_or_missing_byte_of_metadata_is_one_sentence_or_harmless(two, data):
    """Even without the checksums, which name it first."""
    _, newer = two
    whole = (newer / METADATA).read_bytes()
    content = bytearray(whole)
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    (newer / METADATA).write_bytes(content)
    try:
        assert find_damage(newer) is not None
        with suppress(InputError):
            Reader(newer).read_metadata()
    finally:
        (newer / METADATA).write_bytes(whole)


@contextmanager
def no_room():
    """As on a full disk: no file can grow beyond 1,000 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_fails_the_save_and_not_the_run(tmp_path, sharded, one_rank, said, asynchronous):
    best = {"best_step": 1, "best_value": 0.5, "evaluations": [{"step": 1}]}
    with saver(tmp_path, sharded, one_rank, said, asynchronous) as writer:
        first = RunState(step=1, **best)
        writer.save(first, {})
        assert writer.settle(first) == first
        second = first.with_(
            step=2, best_step=2, best_value=0.6, evaluations=[{"step": 1}, {"step": 2}]
        )
        with no_room():
            writer.save(second, {})
            after = writer.settle(second)
        assert "the checkpoint of step 2 was not written" in said[0]
        assert (after.best_step, after.best_value, after.evaluations_since_best) == (1, 0.5, 1)
        with pytest.raises(InputError, match=r"of step 2, could not be written .* from step 1"):
            writer.require_written(after)
        assert [one.name for one in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
        writer.save(after, {})
        writer.settle(after)
        writer.require_written(after)
    assert len(list_checkpoints(tmp_path)) == 2


def test_asynchronous_save_holds_the_state_of_its_step(tmp_path, sharded, one_rank, said):
    with saver(tmp_path, sharded, one_rank, said, asynchronous=True) as writer:
        before = [one.detach().clone() for one in sharded.recommender.encoder.parameters()]
        rows = sharded.recommender.table.state_dict()
        (name, table), *_ = rows.items()
        kept = table.local_shards()[0].tensor.clone()
        writer.save(RunState(step=1), {})
        with torch.no_grad():
            for one in sharded.recommender.encoder.parameters():
                one.zero_()
            table.local_shards()[0].tensor.zero_()
        writer.settle(RunState(step=1))
    load(checkpoint_path(tmp_path, 1), sharded)
    for one, value in zip(sharded.recommender.encoder.parameters(), before, strict=True):
        assert torch.equal(one, value)
    assert torch.equal(sharded.recommender.table.state_dict()[name].local_shards()[0].tensor, kept)


def test_the_next_copy_takes_the_memory_of_the_last(sharded):
    first = host_copy(state_tensors(sharded))
    with torch.no_grad():
        for one in sharded.recommender.encoder.parameters():
            one.add_(1.0)
    state = state_tensors(sharded)
    places = {name: one.data_ptr() for name, one in tensors_of(first).items()}
    second = host_copy(state, first)
    now = tensors_of(state)
    for name, one in tensors_of(second).items():
        assert torch.equal(one, now[name])
        assert one.data_ptr() == places[name] != now[name].data_ptr()
    wider = host_copy({"a": torch.ones(3)}, {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert {name: one.tolist() for name, one in wider.items()} == {"a": [1.0, 1.0, 1.0]}


def tensors_of(value, name=""):
    """All tensors of a state by their paths, those of local shards for a ShardedTensor."""
    if isinstance(value, dict):
        parts = [tensors_of(one, f"{name}/{key}") for key, one in value.items()]
        return {key: one for part in parts for key, one in part.items()}
    if isinstance(value, ShardedTensor):
        return {f"{name}/{i}": one.tensor for i, one in enumerate(value.local_shards())}
    return {name: value} if isinstance(value, torch.Tensor) else {}


def test_newest_and_the_best_of_each_are_kept(tmp_path, sharded, one_rank, said):
    """Had the newest to be given up, the one before it would want the best of its time."""
    with saver(tmp_path, sharded, one_rank, said, keep=2) as writer:
        for number, best in [(1, 1), (2, 2), (3, 2), (4, 2), (5, 5)]:
            state = RunState(step=number, best_step=best)
            writer.save(state, {})
            writer.settle(state)
    assert [one.name[-1] for one in list_checkpoints(tmp_path)] == ["2", "4", "5"]
    assert not said


def test_state_that_is_absent_or_damaged_is_named(two, sharded):
    older, newer = two
    (older / "state.json").unlink()
    with pytest.raises(InputError, match=r"is no finished checkpoint, it has no state\.json; copy"):
        load(older, sharded)
    cut(newer / "state.json")
    with pytest.raises(InputError, match=r"state\.json is damaged \(.*; use an earlier checkpoint"):
        checkpoint.find(newer.parent.parent)


def test_verify_names_the_checkpoint_and_the_file(two, one_rank):
    flip(two[0] / "state.json")
    with pytest.raises(
        InputError, match=r"step-00000001 is damaged: .*state\.json.*; copy it again"
    ):
        checkpoint.verify(two[0], one_rank)


@pytest.mark.parametrize("text", ["a: [", "", "7"])
def test_damaged_config_of_a_run_is_named(two, text):
    run_dir = two[0].parent.parent
    (run_dir / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml is damaged; copy"):
        _compare_last_start(run_dir, {"seed": 1})


def test_a_run_of_before_goes_on_with_what_its_missing_keys_stood_for(tmp_path):
    added = {"loss": {"smoothing": 0.0}, "data": {"reorder_ratio": 0.0}}
    now = {"model": {"width": 8, "repeats": False}, "seed": 1, **added}
    before = {"model": {"width": 8}, "loss": {}, "data": {}, "seed": 1}
    _compare(tmp_path, before, now)
    now["model"]["repeats"] = True
    with pytest.raises(InputError, match=r"model\.repeats was False, now True"):
        _compare(tmp_path, before, now)
