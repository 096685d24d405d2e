"""A whole run of a rank, as `trainer.main` starts it."""

from contextlib import ExitStack
from pathlib import Path

from data.vocabulary import Vocabulary
from trainer import build, checkpoint
from trainer.checkpoint import RunState
from trainer.compilers import Compilers
from trainer.config import Config, resolve_paths
from trainer.distributed import process_group, quiet_libraries
from trainer.dry_run import report_dry_run
from trainer.finish import finish
from trainer.loop import Run, train
from trainer.open_data import open_data
from trainer.parts import candidates
from trainer.report import REPORT, write_report
from trainer.resolve import candidate_count, resolve
from trainer.run_folder import RunFolder, run_folder
from trainer.saver import Saver
from trainer.sharding import Sharded, describe_plan, plan_table, shard
from trainer.stop import stop_request
from trainer.warm_start import warm_start
from trainer.watchdog import Watchdog
from trainer.world import World


def run(config: Config, compilers: Compilers, started: float) -> None:
    """Join the other ranks, and take part. started: time.monotonic() at this process's start."""
    data_path, run_dir = resolve_paths(config)
    quiet_libraries()
    with process_group(config.trainer.device) as world:
        run_rank(config, data_path, run_dir, world, compilers, started)


def run_rank(
    config: Config,
    data_path: Path,
    run_dir: Path,
    world: World,
    compilers: Compilers,
    started: float,
) -> None:
    """This rank's whole run: plan, resume or begin, train, evaluate, report."""
    dataset = open_data(data_path, config.data, world)
    vocabulary = Vocabulary.read(data_path)
    config = resolve(config, world, dataset)
    drawn = candidates(config, dataset.table_rows, vocabulary, world)
    model = build.recommender(config, dataset.table_rows, world)
    looked_up = candidate_count(config, dataset.table_rows, world)
    failure = compilers.wait()  # they hold memory of the device, which is planned now
    if failure and world.device.type == "cuda":
        print(failure, flush=True)
    plan = plan_table(model, config.embedding, world, config.data.tokens_a_batch, looked_up)
    if world.is_main:
        print("\n".join(describe_plan(plan, config.embedding, world)), flush=True)
    validation = build.evaluation_batches(config, dataset, "validation", world)
    test = build.evaluation_batches(config, dataset, "test", world)
    if config.dry_run:
        report_dry_run(config, model, plan, dataset.table_rows, world)
        return

    with ExitStack() as stack:
        stop = stack.enter_context(stop_request())
        watchdog = stack.enter_context(Watchdog(config.trainer.stall_seconds, world.rank))
        folder = stack.enter_context(run_folder(run_dir, config, dataset, vocabulary, world))
        sharded = shard(model, plan, config.embedding, config.trainer, world, config.seed)
        before = first_state(config, folder, vocabulary, sharded, world)
        steps = stack.enter_context(build.training_steps(config, dataset, drawn, world, before))
        observer = build.observer(config, dataset, run_dir, world, steps, before, stop)
        stack.callback(observer.close)
        saver = Saver(
            run_dir,
            sharded,
            world,
            before,
            folder.config_text,
            config.trainer.keep_checkpoints,
            config.trainer.asynchronous_checkpoints,
            observer.say,
        )
        parts = Run(
            config=config.trainer,
            seed=config.seed,
            run_dir=run_dir,
            world=world,
            sharded=sharded,
            table_rows=dataset.table_rows,
            validation=validation,
            observer=observer,
            saver=stack.enter_context(saver),
            watchdog=watchdog,
            started=started,
            earlier_seconds=before.seconds,
        )
        state = train(parts, steps, before)
        observer.close()
        if state.step > before.step or not folder.finished:
            finish(parts, test, dataset, vocabulary, state, steps.counts)
        elif world.is_main:
            write_report(run_dir)
            print(f"this run is finished: its summary.json and {REPORT} are in {run_dir}")


def first_state(
    config: Config, folder: RunFolder, vocabulary: Vocabulary, sharded: Sharded, world: World
) -> RunState:
    """The newest checkpoint's state, or a new one, with init_from of another run's model."""
    if folder.newest is not None:
        state = checkpoint.load(folder.newest, sharded)
        checkpoint.require_best(folder.path, state, world)
        return state
    if config.init_from:
        report = warm_start(config, vocabulary, sharded, world)
        if world.is_main:
            print(report, flush=True)
    return RunState()
