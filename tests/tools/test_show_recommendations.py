"""The look at recommendations: right titles, a table that fits, a page that is safe."""

import re
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.errors import InputError
from data.schema import HISTORIES, RESERVED_ROWS
from tests.data.datasets import write_dataset
from tests.trained_run import ITEMS, Trained, run_command, trained
from tools.score_histories import ScoreConfig, score
from tools.show_recommendations import COLUMNS, ShowConfig, as_page, as_text, main, views
from tools.update_states import UpdateConfig, update


@pytest.fixture(scope="module")
def made() -> Trained:
    return trained()


@pytest.fixture(scope="module")
def scores(made, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("scores") / "s"
    options = {"bundle": str(made.bundle), "input": str(made.data), "device": "cpu"}
    score(ScoreConfig(**options, output=str(output), k=12, part_users=20))
    return output


def write_items(folder: Path) -> Path:
    """Titles that are long, hostile, wide, or missing (i9)."""
    titles = {f"i{row}": f"Film {row}" for row in range(8, 58)}
    titles |= {
        "i10": "A very long title " * 8,
        "i11": "<script>alert('x')</script> & co",
        "i9": None,
    }
    path = folder / "items.parquet"
    pq.write_table(pa.table({"item_id": list(titles), "title": list(titles.values())}), path)
    return path


def config(made: Trained, scores: Path, **changes) -> ShowConfig:
    return ShowConfig(**{"scores": str(scores), "histories": str(made.data)} | changes)


def test_shows_the_newest_history_and_the_best_items_by_title(made, scores, tmp_path):
    items = str(write_items(tmp_path))
    chosen = ["u5", "u61"]
    shown = views(config(made, scores, users=chosen, items=items, items_shown=4))
    assert [view.user for view in shown] == chosen
    for view in shown:
        history = made.histories[int(view.user[1:])]
        assert view.events == len(history)
        assert len(view.history) == min(4, len(history))
        assert len(view.recommended) == 4
        for title, row in zip(view.history, history[-4:], strict=True):
            special = {9: "i9", 10: "A very long", 11: "<script>"}
            assert title.startswith(special.get(row, f"Film {row}"))


def test_random_users_depend_on_the_seed_alone(made, scores):
    drawn = [[v.user for v in views(config(made, scores, users=6, seed=n))] for n in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6
    assert len(views(config(made, scores, users=1000))) == len(made.histories)


def test_random_users_are_those_of_the_data_set(made, scores, tmp_path):
    """Of a raw log more users are scored than a data set made from it has."""
    few = write_dataset(tmp_path / "few", made.histories[:3], table_rows=RESERVED_ROWS + ITEMS)
    here = {"histories": str(few)}
    for seed in range(10):
        users = [view.user for view in views(config(made, scores, users=2, seed=seed, **here))]
        assert len(set(users)) == 2
        assert set(users) <= {"u0", "u1", "u2"}
    assert len(views(config(made, scores, users=5, **here))) == 3
    (part,) = (few / HISTORIES).iterdir()
    table = pq.read_table(part)
    pq.write_table(table.set_column(0, "user_id", pa.array(["a", "b", "c"])), part)
    with pytest.raises(InputError, match=r"no user who is scored is in .*few; name the data set"):
        views(config(made, scores, **here))


def test_scores_beside_states_are_shown(made, scores, tmp_path):
    """All users' states of the whole log: their items are those of their histories' scores."""
    log = tmp_path / "log.parquet"
    events = [(n, row) for n, history in enumerate(made.histories) for row in history]
    columns = {
        "user_id": [f"u{user}" for user, _ in events],
        "item_id": [f"i{row}" for _, row in events],
        "timestamp": range(len(events)),
    }
    pq.write_table(pa.table(columns), log)
    options = {"bundle": str(made.bundle), "events": str(log), "device": "cpu"}
    update(UpdateConfig(**options, output=str(tmp_path / "states"), k=12))
    chosen = {"users": ["u5", "u61", "u0"]}
    shown = views(config(made, tmp_path / "states", **chosen))
    for got, expected in zip(shown, views(config(made, scores, **chosen)), strict=True):
        assert (got.user, got.history) == (expected.user, expected.history)
        assert [item for item, _ in got.recommended] == [item for item, _ in expected.recommended]
    assert len(views(config(made, tmp_path / "states", users=1000))) == len(made.histories)
    update(UpdateConfig(**options, output=str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"none holds no finished scores; .*update_states k=…"):
        views(config(made, tmp_path / "none"))


def test_the_table_fits_and_the_page_escapes_everything(made, scores, tmp_path):
    items = str(write_items(tmp_path))
    shown = views(config(made, scores, users=1000, items=items))
    lines = [line for view in shown for line in as_text(view)]
    assert max(map(len, lines)) == COLUMNS
    page = as_page(shown)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; co" in page
    assert not re.search(r"(src|href|url|@import)\s*[=(]", page)
    assert page.count("<section>") == page.count("</section>") == len(shown)


def test_command_prints_and_writes(made, scores, tmp_path):
    output = tmp_path / "look.html"
    printed = run_command(
        "tools.show_recommendations",
        f"scores={scores}",
        f"histories={made.data}",
        f"items={write_items(tmp_path)}",
        f"output={output}",
        "users=[u3,u4]",
    )
    assert "user u3" in printed
    assert max(map(len, printed.splitlines())) <= max(COLUMNS, len(f"written to {output}"))
    assert "User u4" in output.read_text()


def test_refusals(made, scores, tmp_path):
    with pytest.raises(InputError, match=r"user nobody is not among the scores .*; leave"):
        views(config(made, scores, users=["nobody"]))
    with pytest.raises(InputError, match="holds no finished scores"):
        views(config(made, tmp_path))
    with pytest.raises(InputError, match="does not exist"):
        views(config(made, scores, items=str(tmp_path / "none.parquet")))
    pq.write_table(pa.table({"item_id": ["i8"], "name": ["x"]}), tmp_path / "items.parquet")
    with pytest.raises(InputError, match="has no column title, only item_id, name"):
        views(config(made, scores, items=str(tmp_path / "items.parquet")))
    for option, value in (("users", 0), ("items_shown", "foo"), ("items_shown", 0), ("seed", "x")):
        with pytest.raises(InputError, match=f"{option}={value} must be a whole number"):
            config(made, scores, **{option: value})
    with pytest.raises(InputError, match=r"users=True must be a number of users or a list \[ID,"):
        config(made, scores, users=True)
    (tmp_path / "items.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match=r"cannot be read as items \(.*; give a Parquet file of"):
        views(config(made, scores, items=str(tmp_path / "items.parquet")))
    other = write_dataset(tmp_path / "other", [[8, 9, 10]])
    with pytest.raises(InputError, match=r"user u5 is scored but not in .*; name the data set sco"):
        views(config(made, scores, users=["u5"], histories=str(other)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "_summary.json").write_text("{}")
    with pytest.raises(InputError, match=r"empty holds no user's scores; score histories with"):
        views(config(made, tmp_path / "empty"))


def test_output_that_cannot_be_written(made, scores, tmp_path, monkeypatch, capsys):
    output = tmp_path / "none" / "look.html"
    options = [f"scores={scores}", f"histories={made.data}", f"output={output}"]
    monkeypatch.setattr(sys, "argv", ["show", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == (
        f"error: cannot write output={output}: No such file or directory; name a writable place\n"
    )
