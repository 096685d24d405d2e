"""The training loop: one step, the schedule, and the cadence of evaluation and checkpoints."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.evaluation import EvaluationBatches
from data.loader import Step, TrainingSteps
from trainer.checkpoint import RunState, prune, save
from trainer.config import TrainerConfig
from trainer.distributed import World, seed_step
from trainer.evaluate import evaluate, top_items
from trainer.observe import Observer
from trainer.sharding import Sharded

PROBE_USERS = 64
PROBE_ITEMS = 20


@dataclass(frozen=True)
class Run:
    """What a run is made of, assembled once in `trainer.main`."""

    config: TrainerConfig
    config_text: str  # the resolved config.yaml, stored with every checkpoint
    seed: int
    run_dir: Path
    world: World
    sharded: Sharded
    table_rows: int
    validation: EvaluationBatches
    observer: Observer
    started: float  # time.monotonic() at this process's start
    earlier_seconds: float  # of the run's earlier processes


def train(run: Run, steps: TrainingSteps, state: RunState) -> RunState:
    """Train from `state` to the end, or until patience is spent; the last state.

    Every rank takes the same steps: the loader plans them from lengths alone, and the figures
    that end a run early are equal on every rank.
    """
    rates = Rates(run.sharded, run.config)
    clock = Clock(run.started, state)
    for step in steps if not out_of_patience(run, state) else ():
        rate = rates.set(state.step, step.progress)
        loss = train_step(run, step, state.step)
        state = clock.stamp(
            state.with_(
                step=state.step + 1,
                position=step.position,
                epoch=step.epoch,
                epoch_start=step.epoch_start,
                epochs=step.progress * run.config.max_epochs,
                tokens=state.tokens + step.tokens,
            )
        )
        run.observer.step(state.step, loss, step.tokens, step.targets, rate)
        evaluates, saves = due(run.config, step, state.step)
        if evaluates or saves:
            paused = run.observer.pause()
            run.observer.require_finite(state.step)
            if evaluates:
                state = evaluate_and_judge(run, state)
            store(run, state)
            clock.away += run.observer.resume(paused)
        if out_of_patience(run, state):
            break
    if not state.best_step and state.step:  # resumed with fewer epochs than one evaluation takes
        state = evaluate_and_judge(run, state)
        store(run, state)
    return state


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


def train_step(run: Run, step: Step, number: int) -> Tensor:
    """One forward, backward and update; the sum of this rank's losses, detached.

    DDP and TorchRec average gradients over ranks, so this rank's part of the global mean is
    weighted by the number of ranks. The table is updated inside `backward`, and takes its learning
    rate at `zero_grad`.
    """
    seed_step(run.seed, number, run.world.rank)
    batch = step.batch.to(run.world.device, non_blocking=True)
    # Not zeroed in place: a captured graph returns its own buffers, which would add to themselves.
    run.sharded.optimizer.zero_grad(set_to_none=True)
    loss = run.sharded.model(batch)
    (loss * (run.world.size / batch.step_targets)).backward()
    if run.config.clip_norm:
        torch.nn.utils.clip_grad_norm_(run.sharded.dense_parameters, run.config.clip_norm)
    run.sharded.optimizer.step()
    return loss.detach().clone()  # a captured graph writes the next step's loss in the same place


class Rates:
    """Sets the learning rates of table and dense parameters, each a share of its own peak."""

    def __init__(self, sharded: Sharded, config: TrainerConfig) -> None:
        self.config = config
        self.peaks = [(group, group["lr"]) for group in sharded.optimizer.param_groups]

    def set(self, step: int, progress: float) -> float:
        """Set the rates of the coming step, before its `zero_grad`; the dense rate."""
        share = schedule_share(self.config.schedule, self.config.warmup_steps, step, progress)
        for group, peak in self.peaks:
            group["lr"] = peak * share
        return self.config.learning_rate * share


def schedule_share(schedule: str, warmup_steps: int, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up over steps, then constant or a cosine to 0.

    progress: share of the training done, 0 to 1.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "cosine":
        return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm


def evaluate_and_judge(run: Run, state: RunState) -> RunState:
    """Evaluate on validation, record the figures and compare them with the best so far."""
    started = time.perf_counter()
    ranking = evaluate(run.sharded.recommender, run.validation, run.world, run.table_rows)
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
    """Write a checkpoint and delete those that are neither among the newest nor the best."""
    save(run.run_dir, run.sharded, state, run.world, run.config_text, probe(run))
    if run.world.is_main:
        prune(run.run_dir, state, run.config.keep_checkpoints)


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
