"""Train SSD4Rec: torchrun --nproc_per_node=N trainer/main.py experiment=NAME data.path=… run_dir=…

The same command again resumes the run from its newest checkpoint.
"""

import time

STARTED = time.monotonic()  # before the imports, which cost seconds too

# ruff: noqa: E402
from configs.environment import check_versions, versions

check_versions()  # a mismatch would break the imports below

from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.command import command
from data.loader import TrainingSteps
from data.reader import HistoryDataset
from data.vocabulary import Vocabulary
from trainer import build, checkpoint
from trainer.checkpoint import RunState
from trainer.config import Config, resolve_paths
from trainer.distributed import World, process_group, quiet_libraries
from trainer.evaluate import Ranking, evaluate, evaluate_popularity
from trainer.loop import Run, train
from trainer.observe import Observer, flops_per_token
from trainer.report import metric_table, write_summary
from trainer.sharding import describe_plan, plan_table, shard, table_bytes


@command("train")
def main(plain: dict[str, Any]) -> None:
    config = Config.of(plain)
    data_path, run_dir = resolve_paths(config)
    quiet_libraries()
    with process_group(config.trainer.device) as world:
        dataset = HistoryDataset(data_path)
        vocabulary = Vocabulary.read(data_path)
        config = build.resolve(config, world, dataset)
        drawn = build.candidates(config, dataset.table_rows, vocabulary, world)
        model = build.recommender(config, dataset.table_rows, world)
        looked_up = build.candidate_count(config, dataset.table_rows, world)
        plan = plan_table(model, config.embedding, world, config.data.batch_tokens, looked_up)
        if world.is_main:
            for line in describe_plan(plan):
                print(line)
            print(
                f"item table with optimizer state ({config.embedding.optimizer}): "
                f"{table_bytes(model, config.embedding, world.device) / 2**20:,.1f} MiB over "
                f"{world.size} x {world.device.type}",
                flush=True,
            )
        if config.dry_run:
            return

        newest = checkpoint.list_checkpoints(run_dir)[-1:]
        text = build.prepare_run_folder(config, run_dir, dataset, world, resumes=bool(newest))
        if config.trainer.cuda_graphs and world.device.type == "cuda":
            model.capture(build.sample_batch(config, drawn).to(world.device))
        sharded = shard(model, plan, config.embedding, config.trainer, world, config.seed)
        state = RunState()
        if newest:
            state = checkpoint.load(newest[0], sharded)
        elif config.init_from:
            checkpoint.load_weights(checkpoint.find(Path(config.init_from)), sharded)

        with build.training_steps(config, dataset, drawn, world, state) as steps:
            observer = observe(config, run_dir, world, dataset, steps, state)
            if newest:
                observer.say(f"resuming at step {state.step:,} from {newest[0]}")
            run = Run(
                config=config.trainer,
                config_text=text,
                seed=config.seed,
                run_dir=run_dir,
                world=world,
                sharded=sharded,
                table_rows=dataset.table_rows,
                validation=build.evaluation_batches(config, dataset, "validation", world),
                observer=observer,
            )
            state = train(run, steps, state)
        observer.close()
        finish(run, config, dataset, vocabulary, state)


def observe(
    config: Config,
    run_dir: Path,
    world: World,
    dataset: HistoryDataset,
    steps: TrainingSteps,
    state: RunState,
) -> Observer:
    scored = dataset.table_rows if config.loss.kind == "full" else config.loss.negatives
    targets_a_token = steps.counts.targets / steps.counts.tokens
    return Observer(
        run_dir,
        world,
        steps.estimated_steps(),
        state.step,
        config.trainer.log_every_steps,
        flops_per_token(config.model, scored, targets_a_token),
    )


def finish(
    run: Run, config: Config, dataset: HistoryDataset, vocabulary: Vocabulary, state: RunState
) -> None:
    """Evaluate the best checkpoint on test, once, and write the summary."""
    checkpoint.load_weights(checkpoint.checkpoint_path(run.run_dir, state.best_step), run.sharded)
    batches = build.evaluation_batches(config, dataset, "test", run.world)
    ranking = evaluate(run.sharded.recommender, batches, run.world, run.table_rows)
    popularity = evaluate_popularity(vocabulary.counts, batches, run.world)
    if not run.world.is_main:
        return
    best = next(one for one in state.evaluations if one["step"] == state.best_step)
    first_step_at = run.observer.first_step_at
    summary = {
        "test": test_metrics(ranking, vocabulary.counts),
        "validation": {name: best[name] for name in ("filtered", "unfiltered")},
        "popularity": {"test": popularity.metrics()},
        "best_step": state.best_step,
        "steps": state.step,
        "epochs": state.epoch + 1,
        "seconds": time.monotonic() - STARTED,
        "training_seconds": state.seconds,
        "seconds_to_first_step": first_step_at - STARTED if first_step_at else None,
        "tokens_per_second": state.tokens / max(state.seconds, 1e-9),
        "world_size": run.world.size,
        "device": device_name(run.world.device),
        "versions": versions(),
        "seed": config.seed,
        "without_history": batches.without_history,
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


if __name__ == "__main__":
    main()
