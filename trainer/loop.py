"""The training loop: its steps, and the cadence of evaluation and checkpoints."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.evaluation import EvaluationBatches
from data.loader import Step, TrainingSteps
from trainer.checkpoint import RunState
from trainer.config import TrainerConfig
from trainer.evaluate import evaluate, top_items
from trainer.observe import Observer
from trainer.saver import Saver
from trainer.sharding import Sharded
from trainer.stepper import Stepper
from trainer.stop import signal_name
from trainer.watchdog import Watchdog
from trainer.world import World

PROBE_USERS = 64
PROBE_ITEMS = 20


@dataclass(frozen=True)
class Run:
    """What a run is made of, assembled once in `trainer.run`."""

    config: TrainerConfig
    seed: int
    run_dir: Path
    world: World
    sharded: Sharded
    table_rows: int
    validation: EvaluationBatches
    observer: Observer
    saver: Saver
    watchdog: Watchdog
    started: float  # time.monotonic() at this process's start
    earlier_seconds: float  # of the run's earlier processes


def train(run: Run, steps: TrainingSteps, state: RunState) -> RunState:
    """Train from `state` to the end, or until patience is spent; the last state.

    Every rank takes the same steps: the loader plans them from lengths alone, and the figures
    that end a run early are equal on every rank. Raises SystemExit once it has saved what a stop
    request asked it to.
    """
    stepper = Stepper(run.sharded, run.config, run.world, run.seed)
    clock = Clock(run.started, state)
    for step in steps if not out_of_patience(run, state) else ():
        run.watchdog.beat(f"taking step {state.step + 1:,}")
        outcome = stepper.take(step, state.step)
        state = clock.stamp(
            state.with_(
                step=state.step + 1,
                position=step.position,
                epoch=step.epoch,
                epoch_start=step.epoch_start,
                epochs=step.progress * run.config.max_epochs,
                tokens=state.tokens + step.tokens,
                skipped=state.skipped + outcome.skipped,
            )
        )
        signal = run.observer.step(state.step, step, outcome)
        evaluates, saves = due(run.config, step, state.step)
        if evaluates or saves or signal:
            paused = run.observer.pause()
            run.observer.require_finite(state.step)
            run.watchdog.beat("waiting for the checkpoint under way")
            state = run.saver.settle(state)
            if evaluates:
                state = evaluate_and_judge(run, state)
            store(run, state)
            clock.away += run.observer.resume(paused)
        if signal:
            stop(run, state, signal)
        if out_of_patience(run, state):
            break
    run.watchdog.beat("waiting for the checkpoint under way")
    state = run.saver.settle(state)
    if not state.best_step and state.step:  # resumed with fewer epochs than one evaluation takes
        state = evaluate_and_judge(run, state)
        store(run, state)
        state = run.saver.settle(state)
    run.saver.require_written(state)
    return state


def stop(run: Run, state: RunState, signal: int) -> NoReturn:
    """End the process as a stop request asks, with the state on the disk."""
    run.saver.require_written(run.saver.settle(state))
    name = signal_name(signal)
    run.observer.say(f"stopped by {name} after step {state.step:,}; the same command goes on there")
    raise SystemExit(128 + signal)


def due(config: TrainerConfig, step: Step, number: int) -> tuple[bool, bool]:
    """(evaluate, save) after this step; both hold at the end of training."""
    over = step.progress >= 1.0
    evaluates = step.ends_epoch and (step.epoch + 1) % config.evaluate_every_epochs == 0
    every = config.checkpoint_every_steps
    return evaluates or over, bool(every) and number % every == 0


def out_of_patience(run: Run, state: RunState) -> bool:
    """Whether the monitored figure has not risen for `patience` evaluations."""
    patience = run.config.patience
    if not patience or state.evaluations_since_best < patience:
        return False
    run.observer.say(f"stopped: {run.config.monitor} has not risen for {patience} evaluations")
    return True


class Clock:
    """Seconds of the whole run, over all its processes: `stamp` writes them into the state."""

    def __init__(self, started: float, state: RunState) -> None:
        """started: time.monotonic() at this process's start."""
        self.wall_zero = started - state.seconds
        self.training_zero = time.monotonic() - state.training_seconds
        self.away = 0.0  # evaluation and checkpoints of this process

    def stamp(self, state: RunState) -> RunState:
        now = time.monotonic()
        return state.with_(
            seconds=now - self.wall_zero, training_seconds=now - self.training_zero - self.away
        )


def evaluate_and_judge(run: Run, state: RunState) -> RunState:
    """Evaluate on validation, record the figures and compare them with the best so far."""
    started = time.perf_counter()
    users = run.watchdog.over(run.validation, "evaluating on validation")
    ranking = evaluate(run.sharded.recommender, users, run.world, run.table_rows)
    figures = ranking.metrics()
    value = figure({"validation": figures}, run.config.monitor)
    better = state.best_value is None or value > state.best_value
    for protocol, numbers in figures.items():
        run.observer.scalars(state.step, numbers, f"validation_{protocol}")
    run.observer.say(
        f"step {state.step:>6,}  validation  "
        + "  ".join(
            f"{protocol} NDCG@10 {numbers['ndcg@10']:.4f} HR@10 {numbers['hr@10']:.4f}"
            for protocol, numbers in figures.items()
        )
        + f"  ({time.perf_counter() - started:.1f} s)"
        + ("  best" if better else "")
    )
    record = {"step": state.step, "epochs": state.epochs, "seconds": state.seconds, **figures}
    return state.with_(
        evaluations=[*state.evaluations, record],
        best_value=value if better else state.best_value,
        best_step=state.step if better else state.best_step,
        evaluations_since_best=0 if better else state.evaluations_since_best + 1,
    )


def figure(metrics: dict[str, Any], name: str) -> float:
    """`validation.unfiltered.ndcg@10` of nested metrics."""
    for part in name.split("."):
        metrics = metrics[part]
    return float(metrics)  # type: ignore[arg-type]


def store(run: Run, state: RunState) -> None:
    """Write a checkpoint, or begin to."""
    run.watchdog.beat(f"saving the checkpoint of step {state.step:,}")
    run.saver.save(state, probe(run))


@torch.no_grad()
def probe(run: Run) -> dict[str, Any]:
    """What the model answers for rank 0's first validation users, by this run's own kernels and
    sharded table: the export compares the bundle with it. Collective."""
    recommender = run.sharded.recommender
    recommender.eval()
    first = next(iter(run.validation)).batch
    h_SD, _ = recommender.hidden(first.to(run.world.device))
    recommender.train()
    users = min(PROBE_USERS, first.targets_S.numel())
    rows, scores = top_items(recommender, h_SD[:users], PROBE_ITEMS, run.world, run.table_rows)
    real = int((first.targets_S[:users] != 0).sum())
    offsets = first.offsets_B1[: real + 1]
    return {
        "history": first.features["history"].values()[: int(offsets[-1])].clone(),
        "offsets": offsets.clone(),
        "items": rows[:real].cpu(),
        "scores": scores[:real].cpu(),
    }
