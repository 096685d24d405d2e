"""What a person sees of a run: a progress bar, one log line an interval, TensorBoard.

Only rank 0 shows and writes anything. Nothing waits for the device or another rank but at the
interval that the config fixes: there the ranks sum their losses, and agree to stop when asked to.
"""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data.errors import InputError
from data.loader import Step
from trainer.config import ModelConfig
from trainer.evaluate import DIVERGED
from trainer.stepper import Outcome
from trainer.stop import StopRequest
from trainer.world import World

# Dense bf16 matmul rates of the data sheets, FLOP/s; MFU is shown for these devices only.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


class Observer:
    """Counts steps, targets and losses and shows them every `log_every_steps`."""

    def __init__(
        self,
        run_dir: Path,
        world: World,
        total_steps: int,
        first_step: int,
        log_every_steps: int,
        flops_a_token: float,
        stop: StopRequest,
    ) -> None:
        self.world, self.every, self._stop = world, log_every_steps, stop
        self.flops_a_token = flops_a_token
        self.first_step_at: float | None = None  # time.monotonic() after this process's first step
        self._recent: list[tuple[int, int, Outcome]] = []  # (step, position, outcome) to be shown
        self._targets = self._tokens = 0
        self._since = time.perf_counter()
        self._writer: SummaryWriter | None = None
        self._bar: tqdm | None = None
        if world.is_main:
            self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
            self._bar = tqdm(
                total=max(total_steps, first_step),
                initial=first_step,
                unit="step",
                disable=None,
                dynamic_ncols=True,
                smoothing=0.05,
            )

    def step(self, number: int, step: Step, outcome: Outcome) -> int:
        """Record step `number`. Collective at a log line, where the ranks agree on a stop request.

        Returns the signal that asks to stop, 0 without. Raises InputError when a loss or gradient
        since the last line was not finite.
        """
        self._recent.append((number, step.position, outcome))
        self._tokens += step.tokens
        self._targets += 0 if outcome.skipped else step.targets
        if self.first_step_at is None:
            float(outcome.loss)  # wait for it
            self.first_step_at = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        if outcome.skipped:
            self.say(f"step {number:>6,}  skipped: its loss or gradient is not finite")
        return self._show(number, outcome.rate) if number % self.every == 0 else 0

    def _show(self, number: int, rate: float) -> int:
        loss_sum, signal = self._agree(number)
        loss = loss_sum / max(1, self._targets)
        seconds, steps = time.perf_counter() - self._since, len(self._recent)
        speed = self._tokens / seconds
        numbers = {
            "loss": loss,
            "tokens_per_second": speed,
            "step_seconds": seconds / steps,
            "learning_rate": rate,
        }
        line = (
            f"step {number:>6,}  loss {loss:.4f}  {speed:>11,.0f} tokens/s  "
            f"{1e3 * seconds / steps:7.1f} ms/step"
        )
        utilisation = self._utilisation(speed)
        if utilisation is not None:
            numbers["mfu"] = utilisation
            line += f"  MFU {utilisation:.1%}"
        self.say(line)
        self.scalars(number, numbers, "train")
        self._recent = []
        self._targets = self._tokens = 0
        self._since = time.perf_counter()
        return signal

    def _agree(self, number: int) -> tuple[float, int]:
        """(sum of the losses since the last line over all ranks, signal to stop by or 0)."""
        losses = [one.loss for _, _, one in self._recent]
        norms = [one.norm for _, _, one in self._recent if one.norm is not None]
        asked = torch.tensor(self._stop.number, dtype=torch.float64)
        sums = torch.stack([_sum(losses), _sum(norms), asked]).to(self.world.device)
        dist.all_reduce(sums)
        loss, norm, signals = sums.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise InputError(
                f"{self._first_bad()} is not finite, seen at step {number}; {DIVERGED}"
            )
        if not signals:
            return loss, 0
        numbers: list[int] = [0] * self.world.size
        dist.all_gather_object(numbers, self._stop.number)
        return loss, max(numbers)

    def _first_bad(self) -> str:
        """The first loss or gradient since the last line that is not finite. Collective."""
        bad: tuple[int, int, int, str, float] | None = None
        for number, position, outcome in self._recent:
            for what, value in (("loss", outcome.loss), ("gradient's norm", outcome.norm)):
                if bad is None and value is not None and not math.isfinite(float(value)):
                    bad = (number, position, self.world.rank, what, float(value))
        every: list[tuple[int, int, int, str, float] | None] = [None] * self.world.size
        dist.all_gather_object(every, bad)
        found = [one for one in every if one is not None]
        if not found:  # finite numbers that together are too large
            return "the sum of losses"
        number, position, rank, what, figure = min(found)
        first = max(0, position - self.world.size)
        return (
            f"the {what} of step {number:,} on rank {rank} ({figure}; packs {first:,} to "
            f"{position - 1:,} of the run)"
        )

    def _utilisation(self, tokens_per_second: float) -> float | None:
        if self.world.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.world.device)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return tokens_per_second * self.flops_a_token / (peak * self.world.size)
        return None

    def require_finite(self, number: int) -> None:
        """Raise InputError when a loss or gradient since the last line was not. Collective."""
        self._agree(number)

    def pause(self) -> float:
        """Start of what is not training (evaluation, checkpoint); pass the answer to `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> float:
        """Keep what lies between out of the interval's speed; the seconds that it took."""
        away = time.perf_counter() - paused
        self._since += away
        return away

    def say(self, line: str) -> None:
        """A line above the bar, from rank 0."""
        if self._bar is not None:
            tqdm.write(line)

    def scalars(self, step: int, numbers: dict[str, float], prefix: str) -> None:
        if self._writer is not None:
            for name, value in numbers.items():
                self._writer.add_scalar(f"{prefix}/{name}", value, step)
            self._writer.flush()  # a killed run keeps every line up to its checkpoint

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()


def _sum(numbers: list[Tensor]) -> Tensor:
    """Their sum in fp64 on the host, which waits for the device."""
    if not numbers:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(numbers).double().sum().cpu()


def flops_per_token(model: ModelConfig, candidates: int, targets_per_token: float) -> float:
    """Model FLOPs of one training token: forward and twice as much backward.

    Matrix products of projections, feed-forward and loss, and the recurrence's own 4 E N a token;
    what a kernel computes beyond that (chunked products, recomputation) does not count as useful.
    """
    D, E, N = model.width, model.expand * model.width, model.state
    mixer = 2 * D * (2 * E + 2 * N + E // model.head) + 2 * E * D
    mixer += 2 * model.conv * (E + 2 * N) + 4 * E * N
    directions = 2 if model.kind == "bidirectional" else 1
    layer = directions * mixer + 2 * 8 * D * D
    return 3.0 * (model.layers * layer + targets_per_token * 2 * D * candidates)


def read_scalars(run_dir: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The recorded figures of a run: {tag: (steps, values)}, each step once.

    TensorBoard's own reader drops what a killed process recorded beyond its last checkpoint, which
    the resumed one recorded again. Empty where nothing was recorded.
    """
    folder = run_dir / "tensorboard"
    if not folder.is_dir():
        return {}
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # 0: all
    log.Reload()
    curves = {}
    for tag in log.Tags()["scalars"]:
        events = log.Scalars(tag)
        curves[tag] = ([one.step for one in events], [one.value for one in events])
    return curves
