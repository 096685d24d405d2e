"""The end of a run: the best checkpoint on the test split, once, beside popularity."""

from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from configs.environment import versions
from data.evaluation import EvaluationBatches
from data.samples import SampleCounts
from data.vocabulary import Vocabulary
from trainer import checkpoint
from trainer.checkpoint import RunState
from trainer.evaluate import Ranking, evaluate, evaluate_popularity
from trainer.loop import Clock, Run
from trainer.report import metric_table, write_summary


def finish(
    run: Run,
    test: EvaluationBatches,
    vocabulary: Vocabulary,
    state: RunState,
    samples: SampleCounts,
) -> None:
    """Evaluate the best checkpoint on test, once, and write the summary."""
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
        "best_step": state.best_step,
        "steps": state.step,
        "epochs": state.epochs,
        "skipped_steps": state.skipped,
        "seconds": Clock(run.started, state).stamp(state).seconds,
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
    print("\n".join(metric_table(summary)))
    print(f"summary.json and report.md are in {run.run_dir}")


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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
