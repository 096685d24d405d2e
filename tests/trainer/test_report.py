"""The report of a run: whole without outside resources, and honest about published figures."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest

from tests.trained_run import Trained, trained
from trainer import published
from trainer.page import page, paragraph, table
from trainer.report import metric_table, write_report


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run's folder, to spoil."""
    folder = tmp_path / "my run <1>"
    shutil.copytree(made.run, folder)
    return folder


def drawn(run) -> str:
    write_report(run)
    return (run / "report.html").read_text()


def change(run, **data) -> dict:
    """Another data set's description in the run's summary."""
    summary = json.loads((run / "summary.json").read_text())
    summary["data"] |= data
    (run / "summary.json").write_text(json.dumps(summary))
    return summary


def test_the_page_stands_alone(run):
    content = drawn(run)
    assert "SSD4Rec run my run &lt;1&gt;" in content
    assert "<1>" not in content
    assert not re.search(r"(href|url|@import)\s*[=(]|src=\"(?!data:)|<script", content)
    for heading in ("Test", "Training", "Where the quality is", "Data", "Throughput"):
        assert f"<h2>{heading}</h2>" in content
    assert "model.width" in content
    assert "Published figures" not in content


def test_every_plot_is_a_picture_with_words(run):
    pictures = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', drawn(run))
    assert len(pictures) == 4
    for words, data in pictures:
        assert len(words) > 20
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(data)))
        assert pixels.shape[1] == 1440
        assert np.ptp(pixels[..., :3]) == 1.0


def test_figures_are_those_of_the_summary(run):
    summary = json.loads((run / "summary.json").read_text())
    content = drawn(run)
    for protocol in ("filtered", "unfiltered"):
        for source in (summary["test"], summary["popularity"]["test"]):
            assert f">{source[protocol]['ndcg@10']:.4f}<" in content
    lines = metric_table(summary)
    assert len(lines) == 6
    assert lines[2].startswith(
        f"| seen filtered | SSD4Rec | {summary['test']['filtered']['hr@10']:.4f}"
    )


def test_a_run_without_its_log_says_so_and_has_its_other_plots(run):
    shutil.rmtree(run / "tensorboard")
    assert drawn(run).count("<img") == 3


def test_published_figures_need_the_published_split(run):
    known = published.DATA_SETS[0]
    sizes = {"users": known.users, "items": known.items, "events": known.events}
    change(run, **sizes)
    other = drawn(run)
    assert f"events of {known.name}, but other events are held out" in other
    assert "gSASRec" not in other
    change(run, training_counts_sha256=known.training_counts_sha256)
    same = drawn(run)
    assert "published leave-one-out split" in same
    assert "gSASRec" in same
    assert same.count("this run") >= 2
    assert "sees which items the history holds" in same
    temporal = change(run, split="temporal")
    assert not known.has_the_split_of(temporal["data"])


def test_one_data_set_is_not_taken_for_another():
    first, second = published.DATA_SETS
    described = {"users": first.users, "items": first.items, "events": first.events}
    assert published.look_alike(described) is first
    assert not replace(first, events=second.events).looks_like(described)


def test_targets_that_training_never_saw_are_named(run):
    summary = json.loads((run / "summary.json").read_text())
    metrics = {one: summary["test"][one] for one in ("filtered", "unfiltered")}
    summary["test"]["known_targets"] = {**metrics, "targets": 70, "unknown": 3}
    summary["without_history"] = 2
    (run / "summary.json").write_text(json.dumps(summary))
    content = drawn(run)
    assert "3 of 70 test targets never occur in training" in content
    assert "2 test targets have no event before them" in content


def test_tables_and_text_are_escaped():
    made = page("a & b", [table(["<h>"], [["<script>"]]), paragraph("1 < 2")])
    assert "<script>" not in made
    assert "&lt;h&gt;" in made
    assert "1 &lt; 2" in made
