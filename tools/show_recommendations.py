"""A few users' histories and recommendations side by side, so that a person can judge the model.

    python -m tools.show_recommendations scores=DIR histories=DIR items=PARQUET output=FILE.html

Prints a table a user and, with `output`, writes the same as one static HTML page without outside
resources. All options: configs/show.yaml.
"""

import html
import random
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.command import command
from data.errors import InputError, check_whole
from data.schema import MANIFEST, Manifest, write_atomically
from data.score_output import SUMMARY
from data.user_states import SCORES
from data.vocabulary import Vocabulary

COLUMNS = 100  # of the terminal
MARGIN = "  "
SCORE_WIDTH = 8
MORE = 8  # times as many users are drawn again where too few have a history


@dataclass(frozen=True)
class ShowConfig:
    """The options of configs/show.yaml, checked."""

    scores: str
    histories: str
    items: str | None = None
    output: str | None = None
    users: int | list[Any] = 5
    seed: int = 1
    items_shown: int = 10

    def __post_init__(self) -> None:
        if isinstance(self.users, bool) or not isinstance(self.users, int | list):
            raise InputError(f"users={self.users} must be a number of users or a list [ID,ID,…]")
        if isinstance(self.users, int):
            check_whole("users", self.users, 1)
        check_whole("items_shown", self.items_shown, 1)
        check_whole("seed", self.seed, 0)


@dataclass(frozen=True)
class UserView:
    """What is shown of one user; titles, or raw ids where there are none."""

    user: str
    events: int
    history: list[str]  # the newest, oldest first
    recommended: list[tuple[str, float]]  # best first


def views(config: ShowConfig) -> list[UserView]:
    """The chosen users. Raises InputError for inputs that are absent, unfinished or other ones."""
    parts = _parts(Path(config.scores))
    data = Path(config.histories)
    manifest, vocabulary = Manifest.read(data), Vocabulary.read(data)
    files = [data / one.path for one in manifest.histories]
    chosen = _chosen(parts, files, config)
    histories = _rows_of(files, chosen, ["user_id", "items"])
    scores = _rows_of(parts, chosen, ["user_id", "item_ids", "scores"])
    absent = [user for user in chosen if user not in histories]
    if absent:
        raise InputError(f"user {absent[0]} is scored but not in {data}; name the data set scored")
    shown: dict[str, list[Any]] = {}
    for user in chosen:
        items = histories[user]["items"][-config.items_shown :]
        shown[user] = vocabulary.raw(items).to_pylist()
    wanted = [one for ids in shown.values() for one in ids]
    wanted += [one for user in chosen for one in scores[user]["item_ids"][: config.items_shown]]
    titles = _titles(config.items, wanted)
    return [
        UserView(
            user,
            len(histories[user]["items"]),
            [titles.get(one, str(one)) for one in shown[user]],
            [
                (titles.get(one, str(one)), score)
                for one, score in zip(
                    scores[user]["item_ids"][: config.items_shown],
                    scores[user]["scores"],
                    strict=False,  # the scores go on behind what is shown
                )
            ],
        )
        for user in chosen
    ]


def _parts(folder: Path) -> list[Path]:
    """The files of finished scores: tools.score_histories', or those beside states."""
    beside_states = (folder / MANIFEST).exists() and (folder / SCORES).is_dir()
    if not beside_states and not (folder / SUMMARY).exists():
        raise InputError(
            f"{folder} holds no finished scores; make them with tools.score_histories, or with "
            "tools.update_states k=…"
        )
    return sorted((folder / SCORES if beside_states else folder).glob("part-*.parquet"))


def _chosen(parts: list[Path], histories: list[Path], config: ShowConfig) -> list[str]:
    """The users to show, as text."""
    if not isinstance(config.users, list):
        return _drawn(parts, histories, config.users, config)
    chosen = list(dict.fromkeys(str(one) for one in config.users))
    absent = sorted(set(chosen) - _rows_of(parts, chosen, ["user_id"]).keys())
    if absent:
        raise InputError(
            f"user {absent[0]} is not among the scores in {config.scores}; leave that user out"
        )
    return chosen


def _drawn(parts: list[Path], histories: list[Path], users: int, config: ShowConfig) -> list[str]:
    """Random users, by their place among all scored; those without a history are drawn in vain."""
    counts = [pq.read_metadata(path).num_rows for path in parts]
    total = sum(counts)
    if total == 0:
        raise InputError(f"{config.scores} holds no user's scores; score histories with events")
    wanted = drawn = min(users, total)
    while True:
        places = random.Random(config.seed).sample(range(total), drawn)
        user_at = _users_at(parts, counts, sorted(places))
        known = _rows_of(histories, list(user_at.values()), ["user_id"])
        found = [place for place in places if user_at[place] in known][:wanted]
        if len(found) == wanted or drawn == total:
            break
        drawn = min(MORE * drawn, total)
    if not found:
        raise InputError(
            f"no user who is scored is in {config.histories}; name the data set scored"
        )
    return [user_at[place] for place in sorted(found)]


def _users_at(parts: list[Path], counts: list[int], places: list[int]) -> dict[int, str]:
    """The users at ascending places among all scored. counts: the rows of each part."""
    users: dict[int, str] = {}
    before = 0
    for path, count in zip(parts, counts, strict=True):
        here = places[bisect_left(places, before) : bisect_left(places, before + count)]
        if here:
            column = pq.read_table(path, columns=["user_id"])["user_id"]
            ids = column.take(pa.array([place - before for place in here])).to_pylist()
            users |= dict(zip(here, map(str, ids), strict=True))
        before += count
    return users


def _rows_of(paths: list[Path], users: list[str], columns: list[str]) -> dict[str, dict[str, Any]]:
    """The rows of some users, a row group at a time."""
    wanted = pa.array(users, pa.string())
    found = {}
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                ids = file.read_row_group(group, columns=["user_id"])["user_id"]
                inside = pc.is_in(ids.cast(pa.string()), value_set=wanted)
                if pc.any(inside).as_py():
                    rows = file.read_row_group(group, columns=columns).filter(inside)
                    found.update({str(row["user_id"]): row for row in rows.to_pylist()})
    return found


def _titles(items: str | None, wanted: list[Any]) -> dict[Any, str]:
    """Titles of the wanted raw ids; an id without a title is left out."""
    if items is None:
        return {}
    path = Path(items)
    if not path.is_file():
        raise InputError(f"items={items} does not exist; give a Parquet file or leave it out")
    try:
        names = pq.read_schema(path).names
        missing = [name for name in ("item_id", "title") if name not in names]
        if missing:
            raise InputError(f"{items} has no column {missing[0]}, only {', '.join(names)}")
        table = pq.read_table(path, columns=["item_id", "title"])
        ids = pa.array(wanted)
        if len(ids):
            table = table.filter(pc.is_in(table["item_id"].cast(ids.type), value_set=ids))
        keys = table["item_id"].cast(ids.type).to_pylist()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{items} cannot be read as items ({reason}); give a Parquet file of item_id, title"
        ) from error
    pairs = zip(keys, table["title"].to_pylist(), strict=True)
    return {one: str(title) for one, title in pairs if title is not None}


def as_text(view: UserView) -> list[str]:
    """Lines of at most COLUMNS characters."""
    side = (COLUMNS - len(MARGIN) - SCORE_WIDTH - 1) // 2
    left = [f"last {len(view.history)} of {view.events:,} events", *reversed(view.history)]
    right = [("recommended", "score")]
    right += [(title, f"{score:.3f}") for title, score in view.recommended]
    lines = [f"user {view.user}"[:COLUMNS], "-" * COLUMNS]
    for place in range(max(len(left), len(right))):
        old = left[place] if place < len(left) else ""
        title, score = right[place] if place < len(right) else ("", "")
        line = f"{_fit(old, side)}{MARGIN}{_fit(title, side)} {score:>{SCORE_WIDTH}}"
        lines.append(line.rstrip())
    return lines


def _fit(text: str, width: int) -> str:
    text = " ".join(text.split())
    return f"{text[: width - 1]}…" if len(text) > width else f"{text:<{width}}"


STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;
color:#1b1b1b;background:#fff}h1{font-size:1.4rem}section{margin:2rem 0}h2{font-size:1.1rem;
border-bottom:1px solid #bbb;padding-bottom:.3rem}.pair{display:grid;grid-template-columns:1fr 1fr;
gap:2rem}h3{font-size:.95rem;color:#555;margin:.4rem 0}table{border-collapse:collapse;width:100%}
td{padding:.15rem .4rem;border-bottom:1px solid #eee;overflow-wrap:anywhere}
td:first-child{color:#888;width:2.2rem;text-align:right}td.score{text-align:right;
font-variant-numeric:tabular-nums;white-space:nowrap}
@media(max-width:40rem){.pair{grid-template-columns:1fr}}
@media(prefers-color-scheme:dark){body{color:#e6e6e6;background:#161616}
td{border-color:#2c2c2c}h3{color:#aaa}}"""


def as_page(shown: list[UserView]) -> str:
    """One HTML page, everything escaped, nothing from outside."""
    sections = "\n".join(_section(view) for view in shown)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Recommendations</title><style>{STYLE}</style></head><body>\n"
        f"<h1>Histories and recommendations</h1>\n{sections}\n</body></html>\n"
    )


def _section(view: UserView) -> str:
    newest = [f"<tr><td>{n}</td><td>{_text(one)}</td></tr>" for n, one in _numbered(view.history)]
    best = [
        f'<tr><td>{place}</td><td>{_text(title)}</td><td class="score">{score:.3f}</td></tr>'
        for place, (title, score) in enumerate(view.recommended, 1)
    ]
    return (
        f"<section><h2>User {_text(view.user)}</h2>"
        f'<div class="pair"><div><h3>History, newest first (last {len(view.history)} of '
        f"{view.events:,} events)</h3><table>{''.join(newest)}</table></div>"
        f"<div><h3>Recommended</h3><table>{''.join(best)}</table></div></div></section>"
    )


def _numbered(history: list[str]) -> list[tuple[int, str]]:
    return list(enumerate(reversed(history), 1))


def _text(value: str) -> str:
    return html.escape(value, quote=True)


@command("show")
def main(options: dict[str, Any]) -> None:
    config = ShowConfig(**options)
    shown = views(config)
    for view in shown:
        print("\n".join(as_text(view)), end="\n\n")
    if config.output is not None:
        path = Path(config.output)
        try:
            write_atomically(path, as_page(shown).encode())
        except OSError as error:
            raise InputError(
                f"cannot write output={path}: {error.strerror}; name a writable place"
            ) from error
        print(f"written to {path}")


if __name__ == "__main__":
    main()
