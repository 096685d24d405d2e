"""What a person sees of a run: a progress bar, one log line an interval, TensorBoard.

Only rank 0 shows and writes anything. The one collective is the sum of the losses, at an interval
that the config fixes, so all ranks agree on it.
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
from trainer.config import ModelConfig
from trainer.distributed import World
from trainer.evaluate import DIVERGED

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
    ) -> None:
        self.world, self.every = world, log_every_steps
        self.flops_a_token = flops_a_token
        self.first_step_at: float | None = None  # time.monotonic() after this process's first step
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self._targets = self._tokens = self._steps = 0
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

    def step(self, step: int, loss_sum: Tensor, tokens: int, targets: int, rate: float) -> None:
        """Record one step. `loss_sum` is this rank's; tokens and targets are over all ranks."""
        self._loss += loss_sum.double()
        self._tokens += tokens
        self._targets += targets
        self._steps += 1
        if self.first_step_at is None:
            float(loss_sum)  # wait for it
            self.first_step_at = time.monotonic()
        if self._bar is not None:
            self._bar.update()
        if step % self.every == 0:
            self._show(step, rate)

    def _show(self, step: int, rate: float) -> None:
        dist.all_reduce(self._loss)
        loss = float(self._loss) / max(1, self._targets)
        seconds = time.perf_counter() - self._since
        speed = self._tokens / seconds
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} by step {step}; {DIVERGED}")
        numbers = {
            "loss": loss,
            "tokens_per_second": speed,
            "step_seconds": seconds / self._steps,
            "learning_rate": rate,
        }
        line = (
            f"step {step:>6,}  loss {loss:.4f}  {speed:>11,.0f} tokens/s  "
            f"{1e3 * seconds / self._steps:7.1f} ms/step"
        )
        utilisation = self._utilisation(speed)
        if utilisation is not None:
            numbers["mfu"] = utilisation
            line += f"  MFU {utilisation:.1%}"
        self.say(line)
        self.scalars(step, numbers, "train")
        self._loss.zero_()
        self._targets = self._tokens = self._steps = 0
        self._since = time.perf_counter()

    def _utilisation(self, tokens_per_second: float) -> float | None:
        if self.world.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.world.device)
        for key, peak in PEAK_FLOPS.items():
            if key in name:
                return tokens_per_second * self.flops_a_token / (peak * self.world.size)
        return None

    def require_finite(self, step: int) -> None:
        """Raise InputError when a loss since the last line was not finite. Collective."""
        pending = self._loss.clone()
        dist.all_reduce(pending)
        if not math.isfinite(float(pending)):
            raise InputError(f"the loss is {float(pending)} by step {step}; {DIVERGED}")

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
