"""Runs side by side: seeds of one config as one row, differences as columns, clear refusals."""

import json
import shutil
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml

from data.errors import InputError
from tests.trained_run import Trained, run_command, trained
from tools.compare_runs import (
    CompareConfig,
    as_page,
    group_runs,
    in_order_of,
    main,
    markdown,
    naming_keys,
    table_of,
)
from trainer.checkpoint import FOLDER


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


SHOWS_10 = {"data__max_history": 10, "data__overlap_tokens": 5}


def variant(made: Trained, folder: Path, seed: int, gain: float = 0.0, **changes) -> str:
    """A run folder as the trained one, with another seed, figures and config (`data__key`)."""
    folder.mkdir()
    config = yaml.safe_load((made.run / "config.yaml").read_text())
    for name, value in {**changes, "seed": seed, "run_dir": str(folder)}.items():
        part, _, key = name.partition("__")
        (config[part] if key else config)[key or part] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    summary = json.loads((made.run / "summary.json").read_text())
    summary["seed"] = seed
    for split in ("validation", "test"):
        for protocol in ("filtered", "unfiltered"):
            summary[split][protocol] = dict.fromkeys(summary[split][protocol], 0.1 + gain)
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


@pytest.fixture
def sweep(made, tmp_path) -> list[str]:
    """Two seeds each of max_history 50, null and 10, the overlap half of it."""
    runs = []
    for shown, gain in ((50, 0.02), (None, 0.04), (10, 0.0)):
        for seed in (1, 2):
            folder = tmp_path / f"length-{shown}-{seed}"
            options = {"data__max_history": shown, "data__overlap_tokens": (shown or 0) // 2}
            runs.append(variant(made, folder, seed, gain + 0.001 * seed, **options))
    return runs


def test_seeds_of_a_config_are_one_row(sweep):
    groups = group_runs(sweep)
    assert [len(group.runs) for group in groups] == [2, 2, 2]
    header, rows, words = table_of(groups, "test")
    assert header[:4] == ["data.max_history", "data.overlap_tokens", "seeds", "n"]
    assert words == 3
    values = [0.121, 0.122]
    assert rows[0][:5] == ["50", "25", "1 2", "2", f"{mean(values):.4f} ± {stdev(values):.4f}"]
    assert [row[0] for row in rows] == ["50", "all", "10"]


def test_lines_of_the_terminal_are_aligned(sweep):
    header, rows, _ = table_of(group_runs(sweep), "validation")
    assert len({len(line) for line in markdown(header, rows)}) == 1


def test_one_group_is_named_by_its_folder(made, tmp_path):
    groups = group_runs([variant(made, tmp_path / "alone", 7)])
    header, rows, _ = table_of(groups, "validation")
    assert header[:3] == ["run", "seeds", "n"]
    assert rows[0][:4] == ["alone", "7", "1", "0.1000"]


def test_groups_stand_in_the_order_of_x(sweep):
    groups = in_order_of(group_runs(sweep), "data.max_history")
    assert [group.differences["data.max_history"] for group in groups] == [10, 50, None]
    assert naming_keys(groups, "data.max_history") == ["data.max_history"]


def test_a_second_difference_makes_a_second_line(made, sweep, tmp_path):
    wide = variant(made, tmp_path / "wide", 1, 0.1, model__width=32, **SHOWS_10)
    groups = group_runs([*sweep, wide])
    assert naming_keys(groups, "data.max_history") == ["data.max_history", "model.width"]
    config = CompareConfig([*sweep, wide], x="data.max_history")
    content = as_page(in_order_of(groups, "data.max_history"), config)
    assert content.count("<img") == 2


def test_the_device_and_the_data_are_differences(made, tmp_path):
    runs = [variant(made, tmp_path / name, 1) for name in "ab"]
    summary = json.loads((Path(runs[1]) / "summary.json").read_text())
    summary["world_size"] = 2
    (Path(runs[1]) / "summary.json").write_text(json.dumps(summary))
    assert list(group_runs(runs)[0].differences) == ["device"]
    other = variant(made, tmp_path / "c", 1, data_sha256="f" * 64)
    assert list(group_runs([runs[0], other])[0].differences) == ["data"]


def test_command_prints_and_writes(made, sweep, tmp_path):
    output = tmp_path / "page.html"
    runs = f"runs=[{','.join([str(made.run), *sweep])}]"
    printed = run_command(
        "tools.compare_runs", runs, "evaluation=test", "x=data.max_history", f"output={output}"
    )
    assert "0.1015 ± 0.0007" in printed
    content = output.read_text()
    assert "7 runs on data" in content
    assert content.count("data:image/png") == 2
    assert "unfiltered NDCG@10 against data.max_history" in content


def test_refusals(made, sweep, tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it has no config\.yaml; name a"):
        group_runs([str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="twice; name it once"):
        group_runs([sweep[0], f"{sweep[0]}/../{Path(sweep[0]).name}"])
    with pytest.raises(InputError, match=r"x=model\.depth is no key"):
        in_order_of(group_runs(sweep), "model.depth")
    with pytest.raises(InputError, match=r"x=model\.width does not differ between the runs"):
        in_order_of(group_runs(sweep), "model.width")
    for key, why in (
        ("data.path", "of data sets the content is, as the column data"),
        ("data_sha256", "of data sets the content is"),
        ("seed", "runs that differ in it alone are one row"),
        ("run_dir", "it says nothing of a result"),
    ):
        with pytest.raises(InputError, match=f"x={key} is not compared, {why}.*; leave x out"):
            in_order_of(group_runs(sweep), key)
    for options, message in (
        ({"figure": "hr@10"}, "figure=hr@10 is unknown"),
        ({"evaluation": "train"}, "evaluation=train is unknown"),
        ({"runs": "a"}, "is no list of run folders"),
    ):
        with pytest.raises(InputError, match=message):
            CompareConfig(**{"runs": sweep} | options)
    summary = Path(sweep[0]) / "summary.json"
    content = json.loads(summary.read_text())
    del content["evaluations"][0]["epochs"]
    summary.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"damaged or of another version .*; leave it out"):
        group_runs(sweep)
    summary.unlink()
    with pytest.raises(InputError, match="not finished; its command again resumes it"):
        group_runs(sweep)


def test_a_run_that_trains_on_is_unfinished(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made.run, run)
    newest = max((run / FOLDER).iterdir())
    shutil.copytree(newest, run / FOLDER / "step-00099999")
    with pytest.raises(InputError, match=r"trained on after its summary\.json"):
        group_runs([str(run)])


def test_output_that_cannot_be_written(made, tmp_path, monkeypatch, capsys):
    output = tmp_path / "none" / "page.html"
    options = [f"runs=[{made.run}]", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["compare_runs", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert f"cannot write output={output}: No such file or directory; name a writable" in said
