"""One training step: learning rates, lookups, forward, backward and both updates."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from data.batch import SequenceBatch
from data.loader import Step
from modules.products import fp32_products
from trainer.config import TrainerConfig
from trainer.distributed import seed_step
from trainer.graphs import captured
from trainer.sharding import Sharded, table_kernels
from trainer.world import World


@dataclass(frozen=True)
class Outcome:
    """What a step did on this rank.

    loss: the sum of its losses, detached. norm: of the dense gradients of all ranks before
    clipping, where there is clipping. rate: the dense learning rate. skipped: nothing was updated.
    """

    loss: Tensor
    norm: Tensor | None
    rate: float
    skipped: bool = False


class Stepper:
    """Takes training steps.

    The table stands outside: rows are looked up, what lies behind them gives the gradients to rows
    and dense parameters, and the table's backward pass updates it. Its gradients are averages over
    ranks, as is done here for the dense ones, so this rank's part of the global mean is weighted by
    the number of ranks.

    On CUDA, with `trainer.cuda_graphs`, all between rows and gradients is a CUDA graph, the
    collectives of a full softmax on several ranks included, and the dense update another; they are
    captured at the first step. NCCL waits for such graphs to be gone before a group can end.
    """

    _batch: SequenceBatch
    _rows: tuple[Tensor, Tensor]
    _gradients: list[Tensor]  # of the dense parameters
    _flat: Tensor  # which they are parts of, on several ranks

    def __init__(self, sharded: Sharded, config: TrainerConfig, world: World, seed: int) -> None:
        self.sharded, self.config, self.world, self.seed = sharded, config, world, seed
        optimizers = dict(sharded.optimizer.optimizers)
        self._table_optimizer = optimizers.pop("table")
        self._dense_optimizers = list(optimizers.values())
        self._peaks = [(group, float(group["lr"])) for group in sharded.optimizer.param_groups]
        self._tables = table_kernels(sharded.model)
        self._updates = sharded.updates()
        on_gpu = world.device.type == "cuda"
        self._side = torch.cuda.Stream(world.device, priority=-1) if on_gpu else None
        self._captures = config.cuda_graphs and on_gpu
        self._compiles = on_gpu
        self._replay_gradients: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
        self._replay_update: Callable[[], Tensor | None] | None = None

    def take(self, step: Step, number: int) -> Outcome:
        """Step `number` of the run, counted from 0."""
        rate = self._set_rates(number, step.progress)
        self._place(step.batch)
        self._count_updates()
        rows = self._look_up(step.batch)
        self._place_rows(rows)
        seed_step(self.seed, number, self.world)
        loss, *row_gradients = (self._replay_gradients or self._differentiate)()
        self._average()
        loss = loss.clone()  # a graph's next replay writes in the same place
        if self.config.nonfinite == "skip" and not self._finite([loss, *row_gradients]):
            return Outcome(torch.zeros_like(loss), None, rate, skipped=True)
        torch.autograd.backward(rows, row_gradients)
        self._updates += 1
        norm = self._update()
        return Outcome(loss, None if norm is None else norm.clone(), rate)

    def _set_rates(self, number: int, progress: float) -> float:
        """Set the rates of table and dense parameters, each a share of its own peak; the dense."""
        share = schedule_share(self.config.schedule, self.config.warmup_steps, number, progress)
        for group, peak in self._peaks:
            if isinstance(group["lr"], Tensor):  # which a graph reads
                group["lr"].fill_(peak * share)
            else:
                group["lr"] = peak * share
        self._table_optimizer.zero_grad()  # hands FBGEMM its rate
        return self.config.learning_rate * share

    def _place(self, batch: SequenceBatch) -> None:
        """Bring the batch to the device: into the graph's own tensors, where there is a graph."""
        if self._replay_gradients is None:
            self._batch = batch.to(self.world.device, non_blocking=True)
        else:
            self._batch.overwrite(batch)

    def _count_updates(self) -> None:
        """Tell FBGEMM's Adam, which takes every lookup for an update, an evaluation's too."""
        for table in self._tables:
            table.iter_cpu.fill_(self._updates)
            if not self._updates:
                table.iter.zero_()  # its own count, which it goes by where it is told 0

    def _look_up(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """The rows of this rank's ids, as `ItemTable` returns them. Collective.

        The ids cross between ranks on a stream of their own, where the host's waits for how many
        come do not wait for the step before. The lookups themselves follow it.
        """
        table = self.sharded.recommender.table
        if table.alone:
            rows: tuple[Tensor, Tensor] = table(self._batch.features)
            return rows
        with torch.cuda.stream(self._side):  # None: where we are
            features = batch.features.to(self.world.device, non_blocking=True)
            exchanged = table.exchange(features)
        if self._side is not None:
            here = torch.cuda.current_stream()
            here.wait_stream(self._side)
            exchanged.record_stream(here)
        looked_up: tuple[Tensor, Tensor] = exchanged.rows()
        return looked_up

    def _place_rows(self, rows: tuple[Tensor, Tensor]) -> None:
        """Take the rows as leaves of their own, as `_place` does; compile and capture at first."""
        if self._replay_gradients is not None:
            with torch.no_grad():
                for own, one in zip(self._rows, rows, strict=True):
                    own.copy_(one)
            return
        self._rows = (rows[0].detach().requires_grad_(), rows[1].detach().requires_grad_())
        if self._compiles:
            from modules.kernels.compile import compile_ahead  # Triton comes with a GPU

            compile_ahead(self._differentiate)
            self._compiles = False
        if self._captures:
            self._replay_gradients = captured(self._differentiate)

    def _differentiate(self) -> tuple[Tensor, Tensor, Tensor]:
        """(the sum of this rank's losses, gradients to both kinds of rows), and dense gradients."""
        dense = self.sharded.dense_parameters
        batch = self._batch
        with fp32_products(self.config.precision):
            loss = self.sharded.recommender.loss_of_rows(*self._rows, batch.candidates_C, batch)
            weighted = loss * (self.world.size / batch.step_targets)
            dx_TD, dc_CD, *gradients = torch.autograd.grad(weighted, [*self._rows, *dense])
        self._gradients = gradients if self.world.size == 1 else self._joined(gradients)
        for parameter, gradient in zip(dense, self._gradients, strict=True):
            parameter.grad = gradient
        return loss.detach(), dx_TD, dc_CD

    def _joined(self, gradients: list[Tensor]) -> list[Tensor]:
        """The same as parts of one tensor."""
        self._flat = torch.cat([one.flatten() for one in gradients])
        parts = self._flat.split([one.numel() for one in gradients])
        return [part.view_as(one) for part, one in zip(parts, gradients, strict=True)]

    def _average(self) -> None:
        """The mean of the dense gradients over ranks, in place: one collective a step."""
        if self.world.size == 1:
            return
        dist.all_reduce(self._flat)
        self._flat /= self.world.size

    def _finite(self, values: list[Tensor]) -> bool:
        """Whether these, the dense gradients and their norm are finite on every rank. Collective,
        and waits for the device."""
        norm = torch.nn.utils.get_total_norm(self._gradients)
        finite = torch.stack([torch.isfinite(one).all() for one in (*values, norm)]).all().float()
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite)

    def _update(self) -> Tensor | None:
        """Clip, and move the dense parameters; the norm before clipping."""
        if self._captures and self._replay_update is None:
            self._make_state()
            self._replay_update = captured(self._move, self._moved())
        return (self._replay_update or self._move)()

    def _move(self) -> Tensor | None:
        norm = None
        if most := self.config.clip_norm:
            norm = torch.nn.utils.clip_grad_norm_(self.sharded.dense_parameters, most)
        for optimizer in self._dense_optimizers:
            optimizer.step()
        return norm

    def _moved(self) -> list[Tensor]:
        """What `_move` changes."""
        parameters = [one.detach() for one in self.sharded.dense_parameters]
        return [*parameters, *self._gradients, *self._states()]

    def _states(self) -> list[Tensor]:
        states = [state for one in self._dense_optimizers for state in one.state.values()]
        return [value for state in states for value in state.values()]

    def _make_state(self) -> None:
        """Give AdamW, which makes its state at its first step, one of zeros if it has none."""
        if self._states():
            return
        changed = self._moved()
        kept = [one.clone() for one in changed]
        self._move()
        for one, value in zip(changed, kept, strict=True):
            one.copy_(value)
        for value in self._states():
            value.zero_()


def schedule_share(schedule: str, warmup_steps: int, step: int, progress: float) -> float:
    """Share of the peak learning rate: linear warm-up over steps, then constant or a cosine to 0.

    progress: share of the training done, 0 to 1.
    """
    warm = min(1.0, (step + 1) / (warmup_steps + 1))
    if schedule == "cosine":
        return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return warm
