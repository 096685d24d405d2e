"""The end of a run: summary.json for programs, report.html for people.

The report is made of the run's folder alone (summary.json, config.yaml, tensorboard/), so it can be
drawn again at any time: the same command on a finished run does.
"""

import json
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from data.schema import write_atomically
from trainer import plots
from trainer.checkpoint import CONFIG
from trainer.observe import read_scalars
from trainer.page import folded, heading, image, page, paragraph, table
from trainer.published import PublishedDataSet, look_alike
from trainer.run_folder import SUMMARY, flatten

REPORT = "report.html"
PROTOCOLS = {"filtered": "seen filtered", "unfiltered": "unfiltered"}
FIGURES = [f"{name}@{k}" for k in (10, 20) for name in ("hr", "ndcg", "mrr")]
TITLES = [one.upper() for one in FIGURES]


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json. For rank 0 alone."""
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=1, allow_nan=False).encode())


def write_report(run_dir: Path) -> None:
    """Write report.html of a folder that has its summary.json. For rank 0 alone."""
    summary = json.loads((run_dir / SUMMARY).read_bytes())
    config = flatten(yaml.safe_load((run_dir / CONFIG).read_text()))
    content = report(run_dir.name, summary, config, read_scalars(run_dir))
    write_atomically(run_dir / REPORT, content.encode())


def report(
    name: str,
    summary: dict[str, Any],
    config: dict[str, Any],
    scalars: dict[str, tuple[list[int], list[float]]],
) -> str:
    """The page. config: flat, `model.width` to its value; scalars: as `read_scalars`."""
    return page(
        f"SSD4Rec run {name}",
        [
            *_outcome(summary, config),
            *_published(summary, config),
            *_training(summary, config, scalars),
            *_slices(summary),
            *_data(summary),
            *_throughput(summary, scalars),
            *_environment(summary),
            heading("Configuration"),
            folded(
                f"{len(config)} values, as config.yaml",
                table(["key", "value"], [(key, _plain(one)) for key, one in config.items()], 2),
            ),
        ],
    )


def metric_table(summary: dict[str, Any]) -> list[str]:
    """Test figures of the model beside popularity's, in both protocols, as Markdown lines."""
    lines = ["| protocol | model | " + " | ".join(TITLES) + " |", "|---" * 8 + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in _metric_rows(summary)]
    return lines


def _metric_rows(summary: dict[str, Any]) -> list[list[str]]:
    sources = (("SSD4Rec", summary["test"]), ("popularity", summary["popularity"]["test"]))
    return [
        [PROTOCOLS[protocol], name, *(f"{figures[protocol][one]:.4f}" for one in FIGURES)]
        for protocol in PROTOCOLS
        for name, figures in sources
    ]


def _outcome(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    test, popularity = summary["test"], summary["popularity"]["test"]
    best = next(one for one in summary["evaluations"] if one["step"] == summary["best_step"])
    against = "; ".join(
        f"{name} {test[protocol]['ndcg@10']:.4f} / {test[protocol]['hr@10']:.4f} "
        f"(popularity {popularity[protocol]['ndcg@10']:.4f} / {popularity[protocol]['hr@10']:.4f})"
        for protocol, name in PROTOCOLS.items()
    )
    parts = [
        paragraph(f"Test NDCG@10 / HR@10 on {summary['data']['folder']}: {against}.", lead=True),
        paragraph(
            f"The checkpoint with the best {config['trainer.monitor']}: step "
            f"{summary['best_step']:,} of {summary['steps']:,}, epoch {best['epochs']:.1f} of "
            f"{summary['epochs']:.1f}. Exact ranks over all items; ties are pessimistic. Seen "
            "filtered leaves out the items of a user's history, other than the target."
        ),
        heading("Test"),
        table(["protocol", "model", *TITLES], _metric_rows(summary), 2, ours=(0, 2)),
    ]
    unseen = test.get("known_targets")
    if unseen:
        parts.append(
            paragraph(
                f"{unseen['unknown']:,} of {unseen['targets']:,} test targets never occur in "
                f"training; without them NDCG@10 is {unseen['filtered']['ndcg@10']:.4f} filtered "
                f"and {unseen['unfiltered']['ndcg@10']:.4f} unfiltered."
            )
        )
    if summary["without_history"]:
        parts.append(
            paragraph(
                f"{summary['without_history']:,} test targets have no event before them, and are "
                "not evaluated."
            )
        )
    return parts


def _published(summary: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Other papers' figures, where the data set and its split are theirs."""
    known = look_alike(summary["data"])
    if known is None:
        return []
    if not known.has_the_split_of(summary["data"]):
        return [
            heading("Published figures"),
            paragraph(
                f"The data set has the users, items and events of {known.name}, but other events "
                "are held out than in the published leave-one-out split (another order of equal "
                "times is enough), so published figures are no measure for this run."
            ),
        ]
    repeats = (
        "This run's model sees which items the history holds (model.repeats), which theirs do not: "
        "where nothing repeats, that alone lifts the unfiltered figures to the filtered ones."
    )
    return [
        heading("Published figures"),
        paragraph(
            f"Recognised by its sizes and training counts as {known.name}, with the published "
            "leave-one-out split. RecBole, where most unfiltered figures come from, reorders "
            "events closer than 64 s."
        ),
        *([paragraph(repeats)] if config.get("model.repeats") else []),
        *(_published_table(known, summary, protocol) for protocol in PROTOCOLS),
    ]


def _published_table(known: PublishedDataSet, summary: dict[str, Any], protocol: str) -> str:
    rows = [
        (one.model, one.hr_10, one.ndcg_10) for one in known.figures if one.protocol == protocol
    ]
    figures = summary["test"][protocol]
    rows.append(("this run", figures["hr@10"], figures["ndcg@10"]))
    rows.sort(key=lambda row: -row[2])
    return table(
        [PROTOCOLS[protocol], "HR@10", "NDCG@10"],
        [(name, f"{hr:.4f}", f"{ndcg:.4f}") for name, hr, ndcg in rows],
        ours=[place for place, row in enumerate(rows) if row[0] == "this run"],
    )


def _training(
    summary: dict[str, Any],
    config: dict[str, Any],
    scalars: dict[str, tuple[list[int], list[float]]],
) -> list[str]:
    evaluations, best_step = summary["evaluations"], summary["best_step"]
    plot = plots.learning(
        scalars.get("train/loss"), evaluations, best_step, config["trainer.monitor"]
    )
    rows = [
        [
            f"{one['step']:,}",
            f"{one['epochs']:.1f}",
            f"{one['seconds']:,.0f}",
            *(f"{one[protocol][name]:.4f}" for protocol in PROTOCOLS for name in FIGURES[:2]),
        ]
        for one in evaluations
    ]
    header = ["step", "epochs", "seconds"]
    header += [f"{protocol} {name}" for protocol in PROTOCOLS for name in TITLES[:2]]
    ours = [place for place, one in enumerate(evaluations) if one["step"] == best_step]
    return [
        heading("Training"),
        image(plot, "Training loss against steps; validation NDCG@10 against epochs."),
        folded(f"evaluations on validation: {len(rows)}", table(header, rows, 0, ours)),
    ]


def _slices(summary: dict[str, Any]) -> list[str]:
    plot = plots.quality(summary["slices"])
    return [
        heading("Where the quality is"),
        image(plot, "Test NDCG@10 by history length and by the target's training events."),
        paragraph(
            "Bars about a point are one standard error of the mean on each side. Slices of fewer "
            f"than {plots.MIN_TARGETS} targets are in the tables alone."
        ),
        *(
            folded(
                f"in figures: {title}",
                table(
                    [title, "targets", *(f"{one} NDCG@10" for one in PROTOCOLS), *_POPULARITY],
                    _slice_rows(summary["slices"][name]),
                ),
            )
            for name, title in (
                ("history_length", "events before the target"),
                ("training_events", "training events of the target item"),
            )
        ),
    ]


_POPULARITY = [f"popularity, {one}" for one in PROTOCOLS]


def _slice_rows(part: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    rows = []
    for model, popularity in zip(part["model"], part["popularity"], strict=True):
        figures = [who[one]["ndcg@10"] for who in (model, popularity) for one in PROTOCOLS]
        counts = [plots.octave(model), f"{model['targets']:,}"]
        rows.append(counts + [f"{one:.4f}" for one in figures])
    return rows


def _data(summary: dict[str, Any]) -> list[str]:
    data, samples = summary["data"], summary["samples"]
    lengths = data["history_length"]
    names = {"0.0": "shortest", "0.5": "median", "1.0": "longest"}
    quantiles = ", ".join(
        f"{names.get(share, f'{float(share):.0%} quantile')} {value:,}"
        for share, value in lengths["quantiles"].items()
    )
    share = dict(data["popularity"])
    facts = [
        ("users", f"{data['users']:,}"),
        ("items", f"{data['items']:,}, {data['items_without_training']:,} without training events"),
        ("events", f"{data['events']:,}, {data['train_events']:,} for training; {data['split']}"),
        ("events of a user", f"mean {lengths['mean']:.1f}; {quantiles}"),
        *(
            (f"training events of the top {items:.0%} of the items", f"{events:.1%}")
            for items, events in share.items()
            if 0.009 < items < 0.011 or 0.09 < items < 0.11
        ),
        (
            "an epoch",
            f"{samples['samples']:,} samples, {samples['tokens']:,} tokens, "
            f"{samples['targets']:,} targets",
        ),
    ]
    if samples["windowed_histories"] or samples["truncated_histories"]:
        facts.append(
            (
                "long histories",
                f"{samples['windowed_histories']:,} in windows "
                f"({samples['repeated_tokens']:,} tokens read again), "
                f"{samples['truncated_histories']:,} truncated "
                f"({samples['dropped_tokens']:,} tokens dropped)",
            )
        )
    return [
        heading("Data"),
        table([data["folder"], ""], facts, 2),
        image(plots.data(data), "Users by history length; concentration of popularity."),
    ]


def _throughput(
    summary: dict[str, Any], scalars: dict[str, tuple[list[int], list[float]]]
) -> list[str]:
    first = summary["seconds_to_first_step"]  # null where a finished run was only evaluated again
    facts = [
        ("tokens a second in training", f"{summary['tokens_per_second']:,.0f}"),
        ("seconds, all starts included", f"{summary['seconds']:,.0f}"),
        ("seconds in training steps", f"{summary['training_seconds']:,.0f}"),
        (
            "seconds until the first step of the last start",
            "–" if first is None else f"{first:,.0f}",
        ),
        ("steps", f"{summary['steps']:,}"),
        ("epochs", f"{summary['epochs']:.1f}"),
    ]
    _, utilisation = scalars.get("train/mfu", ([], []))
    if utilisation:
        facts.append(("MFU, median of the log intervals", f"{median(utilisation):.1%}"))
    parts = [heading("Throughput"), table(["", ""], facts, 2)]
    speed = scalars.get("train/tokens_per_second")
    if speed:
        plot = plots.throughput(speed, summary["tokens_per_second"])
        parts.append(image(plot, "Tokens a second against steps."))
    return parts


def _environment(summary: dict[str, Any]) -> list[str]:
    facts = [
        ("device", f"{summary['world_size']} × {summary['device']}"),
        ("seed", str(summary["seed"])),
        *summary["versions"].items(),
    ]
    return [heading("Environment"), table(["", ""], facts, 2)]


def _plain(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
