"""The end of a run: the best checkpoint on the test split, once, beside popularity."""

import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from configs.environment import versions
from data.evaluation import EvaluationBatches
from data.reader import HistoryDataset
from data.samples import SampleCounts
from data.statistics import describe
from data.vocabulary import Vocabulary
from trainer import checkpoint
from trainer.checkpoint import RunState
from trainer.evaluate import Ranking, evaluate, evaluate_popularity
from trainer.loop import Run
from trainer.report import REPORT, metric_table, write_report, write_summary


def finish(
    run: Run,
    test: EvaluationBatches,
    dataset: HistoryDataset,
    vocabulary: Vocabulary,
    state: RunState,
    samples: SampleCounts,
) -> None:
    """Evaluate the best checkpoint on test, once, and write the summary and the report."""
    best = checkpoint.checkpoint_path(run.run_dir, state.best_step)
    checkpoint.verify(best, run.world)
    checkpoint.load_weights(best, run.sharded)
    users = run.watchdog.over(test, "evaluating on test")
    ranking = evaluate(run.sharded.recommender, users, run.world, run.table_rows)
    popularity = evaluate_popularity(vocabulary.counts, test, run.world)
    if not run.world.is_main:
        return
    figures = next(one for one in state.evaluations if one["step"] == state.best_step)
    first_step_at = run.observer.first_step_at
    summary = {
        "test": test_metrics(ranking, vocabulary.counts),
        "validation": {name: figures[name] for name in ("filtered", "unfiltered")},
        "popularity": {"test": popularity.metrics()},
        "slices": slices({"model": ranking, "popularity": popularity}, vocabulary.counts),
        "data": describe(dataset, vocabulary),
        "best_step": state.best_step,
        "steps": state.step,
        "epochs": state.epochs,
        "skipped_steps": state.skipped,
        "seconds": run.earlier_seconds + time.monotonic() - run.started,
        "training_seconds": state.training_seconds,
        "seconds_to_first_step": first_step_at - run.started if first_step_at else None,
        "tokens_per_second": state.tokens / max(state.training_seconds, 1e-9),
        "world_size": run.world.size,
        "device": device_name(run.world.device),
        "versions": versions(),
        "seed": run.seed,
        "samples": asdict(samples),
        "without_history": test.without_history,
        "evaluations": state.evaluations,
    }
    write_summary(run.run_dir, summary)
    print("\n".join(metric_table(summary)), flush=True)  # drawing the report takes a moment
    write_report(run.run_dir)
    print(f"summary.json and {REPORT} are in {run.run_dir}")


def test_metrics(ranking: Ranking, counts_V: np.ndarray) -> dict[str, Any]:
    """Figures over all targets, and without those that never occur in training, if any."""
    metrics: dict[str, Any] = ranking.metrics()
    known_N = counts_V[ranking.targets_N] > 0
    if not known_N.all():
        metrics["known_targets"] = {
            **ranking.metrics(known_N),
            "targets": len(known_N),
            "unknown": int((~known_N).sum()),
        }
    return metrics


def slices(
    rankings: dict[str, Ranking], counts_V: np.ndarray
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The test figures by the events before a target, and by its item's training events."""
    return {
        "history_length": {
            name: one.by_octave(one.history_length_N) for name, one in rankings.items()
        },
        "training_events": {
            name: one.by_octave(counts_V[one.targets_N]) for name, one in rankings.items()
        },
    }


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
