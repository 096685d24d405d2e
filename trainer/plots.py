"""The plots of reports and comparisons, as PNG bytes.

matplotlib's objects alone, never pyplot: no window system, no global state. Colours are Okabe and
Ito's, which colour-blind readers tell apart, and no two lines differ by colour alone.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":")  # where there are more lines than colours
GREY = "#767676"
LEGEND_CHARACTERS = 120  # of a legend's row under a plot
DPI = 150
MIN_TARGETS = 10  # of a slice that is drawn: the mean of fewer says little
WIDTH, HEIGHT = 9.6, 3.6  # inches, of a row of two panels

Curve = tuple[Sequence[float], Sequence[float]]


def learning(
    loss: Curve | None, evaluations: list[dict[str, Any]], best_step: int, monitor: str
) -> bytes:
    """Training loss against steps (None: not recorded), validation figures against epochs."""
    figure, (left, right) = _row()
    if loss is None:
        left.text(0.5, 0.5, "no logged step in tensorboard/", ha="center", color=GREY)
        left.set(xticks=[], yticks=[])
    else:
        left.plot(*loss, color=COLOURS[0], linewidth=1.2)
        left.set(xlabel="step", ylabel="training loss, nats a target")
        _thousands(left.xaxis)
    epochs = [one["epochs"] for one in evaluations]
    for place, protocol in enumerate(("filtered", "unfiltered")):
        values = [one[protocol]["ndcg@10"] for one in evaluations]
        _line(right, epochs, values, place, f"seen {protocol}" if not place else protocol)
    best = next(one for one in evaluations if one["step"] == best_step)
    label = f"best {monitor.removeprefix('validation.')}"
    right.axvline(best["epochs"], color=GREY, linestyle=":", label=label)
    right.set(xlabel="epochs", ylabel="validation NDCG@10", ylim=(0, None))
    right.legend(framealpha=1, edgecolor="none", loc="lower right")
    return _png(figure)


def quality(slices: dict[str, dict[str, list[dict[str, Any]]]]) -> bytes:
    """Test NDCG@10 by history length and by the target's training events, with standard errors,
    above the number of targets."""
    figure = _figure(HEIGHT * 1.35)
    axes = figure.subplots(2, 2, sharex="col", height_ratios=[3, 1])
    names = {
        "history_length": "events in the history before the target",
        "training_events": "training events of the target item",
    }
    for column, (name, title) in enumerate(names.items()):
        upper, lower = axes[0, column], axes[1, column]
        shown = enough(slices[name]["model"])
        records = [slices[name]["model"][one] for one in shown]
        places = np.arange(len(records))
        for place, (who, protocol, label) in enumerate(
            (
                ("model", "filtered", "SSD4Rec, seen filtered"),
                ("model", "unfiltered", "SSD4Rec, unfiltered"),
                ("popularity", "filtered", "popularity, seen filtered"),
            )
        ):
            figures = [slices[name][who][one][protocol] for one in shown]
            errors = [one["ndcg@10_error"] or 0.0 for one in figures]
            upper.errorbar(
                places,
                [one["ndcg@10"] for one in figures],
                errors,
                color=COLOURS[place] if who == "model" else GREY,
                marker=MARKERS[place],
                linestyle="-" if who == "model" else "--",
                label=label,
                markersize=4.5,
                linewidth=1.4,
                capsize=2,
            )
        upper.set(ylabel="test NDCG@10" if column == 0 else "", ylim=(0, None))
        lower.bar(places, [one["targets"] for one in records], color=GREY, width=0.7)
        lower.set(xlabel=title, ylabel="targets" if column == 0 else "")
        _thousands(lower.yaxis)
        lower.set_xticks(places, [octave(one) for one in records], rotation=45)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside upper center", ncols=3)
    return _png(figure)


def data(description: dict[str, Any]) -> bytes:
    """Users by history length, and how much of the training events the popular items have."""
    figure, (left, right) = _row()
    records = description["history_length"]["users"]
    first = next(place for place, one in enumerate(records) if one["users"])
    records = records[first:]
    places = np.arange(len(records))
    left.bar(places, [one["users"] for one in records], color=COLOURS[0], width=0.8)
    left.set_xticks(places, [octave(one) for one in records], rotation=45)
    left.set(xlabel="events of a user", ylabel="users")
    _thousands(left.yaxis)
    items, events = np.array(description["popularity"]).T
    _line(right, 100 * items, 100 * events, 0, "")
    right.plot(
        100 * items, 100 * items, color=GREY, linestyle="--", label="if all items were alike"
    )
    right.set(
        xscale="log",
        xlabel="share of the items, most popular first, %",
        ylabel="share of training events, %",
        ylim=(0, 103),
    )
    right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.legend(frameon=False, loc="upper left")
    return _png(figure)


def throughput(speed: Curve, mean: float) -> bytes:
    """Training tokens a second over all ranks, each log interval, against steps."""
    figure = _figure(HEIGHT * 0.75)
    axes = figure.subplots()
    axes.plot(*speed, color=COLOURS[0], linewidth=1.2, label="each log interval")
    axes.axhline(mean, color=GREY, linestyle="--", label="the run's mean")
    axes.set(xlabel="step", ylabel="tokens a second", ylim=(0, None))
    _thousands(axes.xaxis)
    _thousands(axes.yaxis)
    axes.legend(frameon=False, loc="lower right", ncols=2)
    return _png(figure)


def enough(records: list[dict[str, Any]]) -> list[int]:
    """The places of the octaves with MIN_TARGETS targets, or of all where none has."""
    shown = [place for place, one in enumerate(records) if one["targets"] >= MIN_TARGETS]
    return shown or list(range(len(records)))


def comparison(panels: Mapping[str, Sequence[tuple[str, Sequence[Curve]]]], ylabel: str) -> bytes:
    """A panel an x axis; in each the curves of every group, in one colour a group."""
    figure = _figure(HEIGHT * 1.25)
    row = figure.subplots(1, len(panels), sharey=True)
    for axes, (xlabel, groups) in zip(row, panels.items(), strict=True):
        for place, (label, curves) in enumerate(groups):
            for number, curve in enumerate(curves):
                _line(axes, *curve, place, "" if number else label)
        axes.set(xlabel=xlabel)
    row[0].set(ylabel=ylabel)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = max(1, LEGEND_CHARACTERS // (6 + max(map(len, labels))))
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)
    return _png(figure)


def against(
    values: list[str], lines: dict[str, dict[str, list[float]]], xlabel: str, ylabel: str
) -> bytes:
    """Figures of runs against a value of their config, at equal distances in the order of `values`.

    lines: for each label {value: figures of its runs}, drawn as means with sample standard
    deviations, and each run as a small dot.
    """
    figure = _figure(HEIGHT)
    axes = figure.subplots()
    for place, (label, points) in enumerate(lines.items()):
        shift = 0.06 * (place - (len(lines) - 1) / 2)
        x = [values.index(one) + shift for one in points]
        means = [float(np.mean(one)) for one in points.values()]
        deviations = [float(np.std(one, ddof=1)) if len(one) > 1 else 0 for one in points.values()]
        _line(axes, x, means, place, label)
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(x, means, deviations, color=colour, linestyle="none", capsize=4)
        for at, runs in zip(x, points.values(), strict=True):
            axes.plot([at + 0.05] * len(runs), runs, ".", color=colour, alpha=0.5)
    axes.margins(y=0.25)
    axes.set_xticks(range(len(values)), values)
    axes.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.5, len(values) - 0.5))
    if any(lines):
        axes.legend(framealpha=1, edgecolor="none", loc="lower right")
    return _png(figure)


def octave(record: dict[str, Any]) -> str:
    """The values of an octave, as 8–15."""
    first, last = record["from"], record["to"]
    return f"{first:,}" if first == last else f"{first:,}–{last:,}"


def _line(axes: Axes, x: Any, y: Any, place: int, label: str) -> None:
    axes.plot(
        x,
        y,
        color=COLOURS[place % len(COLOURS)],
        marker=MARKERS[place % len(MARKERS)],
        label=label or "_nolegend_",
        markersize=4.5,
        linewidth=1.4,
        linestyle=LINES[place // len(COLOURS) % len(LINES)],
    )


def _row() -> tuple[Figure, np.ndarray]:
    figure = _figure(HEIGHT)
    return figure, figure.subplots(1, 2)


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _thousands(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
