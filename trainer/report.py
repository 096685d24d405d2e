"""The end of a run: summary.json for programs, report.md for people."""

import json
from pathlib import Path
from typing import Any

from data.schema import write_atomically

SUMMARY = "summary.json"
FIGURES = [f"{name}@{k}" for k in (10, 20) for name in ("hr", "ndcg", "mrr")]


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and report.md. For rank 0 alone."""
    write_atomically(run_dir / SUMMARY, json.dumps(summary, indent=1, allow_nan=False).encode())
    write_atomically(run_dir / "report.md", report(summary).encode())


def report(summary: dict[str, Any]) -> str:
    """The summary as Markdown: the final table beside popularity, the curve, the environment."""
    lines = ["# SSD4Rec run", "", "## Test", "", *metric_table(summary), ""]
    unseen = summary["test"].get("known_targets")
    if unseen:
        lines += [
            f"{unseen['unknown']:,} of {unseen['targets']:,} test targets never occur in training; "
            f"without them NDCG@10 is {unseen['filtered']['ndcg@10']:.4f} filtered and "
            f"{unseen['unfiltered']['ndcg@10']:.4f} unfiltered.",
            "",
        ]
    lines += ["## Validation", "", "| step | seconds | filtered NDCG@10 | unfiltered NDCG@10 |"]
    lines += ["|---|---|---|---|"]
    for one in summary["evaluations"]:
        lines.append(
            f"| {one['step']:,} | {one['seconds']:.0f} | {one['filtered']['ndcg@10']:.4f} "
            f"| {one['unfiltered']['ndcg@10']:.4f} |"
        )
    first = summary["seconds_to_first_step"]  # null where a finished run was only evaluated again
    started = "" if first is None else f", first step after {first:.0f} s"
    versions = ", ".join(f"{name} {one}" for name, one in summary["versions"].items())
    lines += [
        "",
        "## Run",
        "",
        f"Best step {summary['best_step']:,} of {summary['steps']:,} ({summary['epochs']:.1f} "
        f"epochs), {summary['seconds']:.0f} s with all restarts, "
        f"{summary['tokens_per_second']:,.0f} tokens/s on "
        f"{summary['world_size']} x {summary['device']}{started}, seed {summary['seed']}; "
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def metric_table(summary: dict[str, Any]) -> list[str]:
    """Test figures of the model beside popularity's, in both protocols, as Markdown lines."""
    lines = ["| protocol | model | " + " | ".join(FIGURES) + " |", "|---" * 8 + "|"]
    for protocol in ("filtered", "unfiltered"):
        for name, figures in (
            ("SSD4Rec", summary["test"]),
            ("popularity", summary["popularity"]["test"]),
        ):
            values = " | ".join(f"{figures[protocol][one]:.4f}" for one in FIGURES)
            lines.append(f"| {protocol} | {name} | {values} |")
    return lines
