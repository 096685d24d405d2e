"""Several finished runs in one table and one plot.

    python -m tools.compare_runs runs=[DIR,DIR,…] [x=data.max_history] output=FILE.html

Runs of one config with different seeds are one row: mean, sample standard deviation and number of
seeds. What differs between the rows' configs is shown as columns. All options:
configs/compare_runs.yaml.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from configs.command import command
from data.errors import InputError, reason
from data.schema import write_atomically
from trainer import plots
from trainer.checkpoint import CONFIG, checkpoint_path, list_checkpoints
from trainer.page import heading, image, page, paragraph, table
from trainer.report import FIGURES, PROTOCOLS
from trainer.run_folder import SUMMARY, WATCHING_KEYS, flatten

# Of a run's config: what says nothing of its result, or is said by another key or column.
IGNORED = WATCHING_KEYS | {"seed", "vocabulary.items", "vocabulary.sha256", "data.max_sequences"}
DATA_KEYS = {"data.path", "data_sha256", "vocabulary.items", "vocabulary.sha256"}
TOTALS = {"epochs": 1, "seconds": 0, "tokens_per_second": 0}  # and their decimals
SHOWN = [f"{protocol}.{name}" for protocol in PROTOCOLS for name in ("ndcg@10", "hr@10")]


@dataclass(frozen=True)
class CompareConfig:
    """The options of configs/compare_runs.yaml, checked."""

    runs: list[str]
    figure: str = "unfiltered.ndcg@10"
    evaluation: str = "validation"
    x: str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.runs, list) or not self.runs:
            raise InputError(f"runs={self.runs} is no list of run folders; write runs=[DIR,DIR,…]")
        figures = [f"{protocol}.{name}" for protocol in PROTOCOLS for name in FIGURES]
        if self.figure not in figures:
            raise InputError(f"figure={self.figure} is unknown; it is one of {', '.join(figures)}")
        if self.evaluation not in ("validation", "test"):
            raise InputError(f"evaluation={self.evaluation} is unknown; choose validation or test")


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its flat config (`model.width` to its value) and its summary.json."""

    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    def figure(self, split: str, name: str) -> float:
        """`filtered.ndcg@10` of a split, by the best checkpoint."""
        protocol, metric = name.split(".", 1)
        return float(self.summary[split][protocol][metric])

    def curve(self, axis: str, name: str) -> tuple[list[float], list[float]]:
        """A validation figure against the `epochs` or `seconds` of the evaluations."""
        protocol, metric = name.split(".", 1)
        evaluations = self.summary["evaluations"]
        return (
            [float(one[axis]) for one in evaluations],
            [float(one[protocol][metric]) for one in evaluations],
        )


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, and what tells them from the other groups."""

    runs: list[FinishedRun]
    differences: dict[str, Any]

    def label(self, keys: list[str]) -> str:
        """These differences as text; the folder's name where there are none."""
        named = [f"{key}={shown(key, self.differences[key])}" for key in keys]
        return ", ".join(named) or self.runs[0].folder.name

    def figures(self, split: str, name: str) -> list[float]:
        return [run.figure(split, name) for run in self.runs]

    def totals(self, name: str) -> list[float]:
        """A number of the runs' summaries."""
        return [float(run.summary[name]) for run in self.runs]


def read_run(folder: Path) -> FinishedRun:
    """Raises InputError for a folder that is no run, unfinished, or damaged."""
    if not (folder / CONFIG).exists():
        raise InputError(f"{folder} is no run folder: it has no {CONFIG}; name a run_dir")
    if not (folder / SUMMARY).exists():
        raise InputError(
            f"{folder} has no {SUMMARY}: the run is not finished; its command again resumes it"
        )
    run = _read(folder)
    if any(one > checkpoint_path(folder, run.summary["steps"]) for one in list_checkpoints(folder)):
        raise InputError(
            f"{folder} trained on after its {SUMMARY} and is not finished; its command again "
            "resumes it"
        )
    return run


def _read(folder: Path) -> FinishedRun:
    """The files of a run, with all that is read of them later."""
    try:
        config = flatten(yaml.safe_load((folder / CONFIG).read_text()))
        run = FinishedRun(folder, config, json.loads((folder / SUMMARY).read_bytes()))
        for split in ("validation", "test"):
            for name in SHOWN:
                run.figure(split, name)
        for axis in ("epochs", "seconds"):
            run.curve(axis, SHOWN[0])
        column_values(run)
        for name in TOTALS:
            float(run.summary[name])
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder}: {CONFIG} or {SUMMARY} is damaged or of another version of this program "
            f"({reason(error)}); leave it out, or train it again"
        ) from error
    return run


def column_values(run: FinishedRun) -> dict[str, Any]:
    """What may tell one group from another: the config, the data and the device."""
    values = {key: value for key, value in run.config.items() if key not in IGNORED}
    data = run.summary["data"]["folder"]
    values["data"] = f"{data} {values.pop('data_sha256')[:8]}"
    device = f"{run.summary['world_size']} × {run.summary['device']}"
    return values | {"device": device}


def group_runs(folders: list[str]) -> list[Group]:
    """The runs in groups, in the order of the first of each. Raises InputError."""
    paths = [Path(one).resolve() for one in folders]
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise InputError(f"runs names {path} twice; name it once")
    runs = [read_run(path) for path in paths]
    values = [column_values(run) for run in runs]
    keys = list(dict.fromkeys(key for one in values for key in one))
    differing = [key for key in keys if len({json.dumps(one.get(key)) for one in values}) > 1]
    groups: dict[str, Group] = {}
    for run, one in zip(runs, values, strict=True):
        differences = {key: one.get(key) for key in differing}
        groups.setdefault(json.dumps(differences), Group([], differences)).runs.append(run)
    return list(groups.values())


def table_of(groups: list[Group], split: str) -> tuple[list[str], list[list[str]], int]:
    """Header, rows, and how many columns from the left are words."""
    keys = list(groups[0].differences)
    header = [*(keys or ["run"]), "seeds", "n"]
    header += [title(name) for name in SHOWN]
    header += ["epochs", "seconds", "tokens/s"]
    rows = []
    for group in groups:
        words = [shown(key, group.differences[key]) for key in keys] or [group.label([])]
        seeds = sorted(run.summary["seed"] for run in group.runs)
        rows.append(
            [
                *words,
                " ".join(map(str, seeds)),
                str(len(group.runs)),
                *(spread(group.figures(split, name)) for name in SHOWN),
                *(spread(group.totals(name), digits) for name, digits in TOTALS.items()),
            ]
        )
    return header, rows, max(1, len(keys)) + 1


def title(figure: str) -> str:
    """`filtered.ndcg@10` as words."""
    protocol, metric = figure.split(".", 1)
    return f"{protocol} {metric.upper()}"


def spread(values: list[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation; a single value alone."""
    text = f"{mean(values):,.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {stdev(values):,.{digits}f}"


def shown(key: str, value: Any) -> str:
    if key == "data.max_history" and value is None:
        return "all"
    return value if isinstance(value, str) else json.dumps(value)


def naming_keys(groups: list[Group], first: str | None) -> list[str]:
    """A few differences that tell the groups apart, `first` among them if it is one."""

    def distinct(keys: list[str]) -> int:
        return len({json.dumps([one.differences[key] for key in keys]) for one in groups})

    keys = sorted(groups[0].differences, key=lambda key: (key != first, -distinct([key])))
    chosen: list[str] = []
    for key in keys:
        if distinct([*chosen, key]) > distinct(chosen):
            chosen.append(key)
    return chosen


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """The table as Markdown, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return [
        "| " + " | ".join(f"{one:<{w}}" for one, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]


def curves_plot(groups: list[Group], config: CompareConfig) -> bytes:
    """A validation figure of every run against epochs and against seconds."""
    keys = naming_keys(groups, config.x)
    panels = {
        axis: [
            (group.label(keys), [run.curve(axis, config.figure) for run in group.runs])
            for group in groups
        ]
        for axis in ("epochs", "seconds")
    }
    return plots.comparison(panels, f"validation, {title(config.figure)}")


def values_plot(groups: list[Group], key: str, config: CompareConfig) -> bytes:
    """The figure against a key of the config, a line for each set of the other differences. What
    differs with that key alone, as an overlap that is half of it, makes no line of its own."""
    keys = [one for one in naming_keys(groups, key) if one != key]
    lines: dict[str, dict[str, list[float]]] = {}
    for group in groups:
        line = lines.setdefault(group.label(keys) if keys else "", {})
        value = shown(key, group.differences[key])
        line[value] = group.figures(config.evaluation, config.figure)
    values = list(dict.fromkeys(shown(key, group.differences[key]) for group in groups))
    return plots.against(values, lines, key, f"{config.evaluation}, {title(config.figure)}")


def in_order_of(groups: list[Group], key: str) -> list[Group]:
    """The groups by a key of their config: numbers by size, then words, then null.

    Raises InputError for a key that no config has, that is not compared, or is equal in all runs.
    """
    if not any(key in run.config for group in groups for run in group.runs):
        raise InputError(f"x={key} is no key of the runs' config, such as data.max_history")
    if key in IGNORED | DATA_KEYS:
        why = "it says nothing of a result"
        if key in DATA_KEYS:
            why = "of data sets the content is, as the column data"
        elif key == "seed":
            why = "runs that differ in it alone are one row"
        raise InputError(f"x={key} is not compared, {why}; leave x out")
    if key not in groups[0].differences:
        raise InputError(f"x={key} does not differ between the runs; leave x out")

    def place(group: Group) -> tuple[int, float, str]:
        value = group.differences[key]
        if value is None:
            return (2, 0.0, "")
        if isinstance(value, int | float):
            return (0, float(value), "")
        return (1, 0.0, str(value))

    return sorted(groups, key=place)


def as_page(groups: list[Group], config: CompareConfig) -> str:
    """The table and the plots as one HTML page."""
    runs = [run for group in groups for run in group.runs]
    data = ", ".join(dict.fromkeys(run.summary["data"]["folder"] for run in runs))
    header, rows, words = table_of(groups, config.evaluation)
    body = [
        paragraph(
            f"{len(runs)} runs on {data}. Figures of the {config.evaluation} split at each run's "
            "best checkpoint; mean ± sample standard deviation over the n runs that differ in "
            "nothing but the seed."
        ),
        table(header, rows, words),
        heading("Validation curves"),
        image(curves_plot(groups, config), f"Validation {title(config.figure)} of every run."),
    ]
    if config.x is not None:
        what = f"{title(config.figure)} against {config.x}"
        body += [heading(what), image(values_plot(groups, config.x, config), what)]
        if any(len(group.runs) > 1 for group in groups):
            body.append(paragraph("Bars are one sample standard deviation; dots are runs."))
    return page("Comparison of runs", body)


@command("compare_runs")
def main(options: dict[str, Any]) -> None:
    config = CompareConfig(**options)
    groups = group_runs(config.runs)
    if config.x is not None:
        groups = in_order_of(groups, config.x)
    header, rows, _ = table_of(groups, config.evaluation)
    print(
        f"{config.evaluation} figures at each run's best checkpoint, mean ± sample deviation of n"
    )
    print("\n".join(markdown(header, rows)))
    if config.output is not None:
        path = Path(config.output)
        try:
            write_atomically(path, as_page(groups, config).encode())
        except OSError as error:
            raise InputError(
                f"cannot write output={path}: {error.strerror}; name a writable place"
            ) from error
        print(f"written to {path}")


if __name__ == "__main__":
    main()
