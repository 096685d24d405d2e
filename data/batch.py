"""SequenceBatch: the one type that crosses from data to model.

Legend: T tokens, B sequences, S read positions (where a hidden state is read), C candidates.
Every shape follows from the config alone, so kernels, caches and graphs see one shape a run.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from data.packing import PackArrays
from data.positions import Positions

HISTORY = "history"
CANDIDATES = "candidates"
# FBGEMM's sequence kernels give one warp to a (feature, sample) pair, which copies its ids' rows
# one after the other: as one sample, 16,384 tokens took 7 ms on an H100.
IDS_A_SAMPLE = 4


@dataclass
class SequenceBatch(Positions, Pipelineable):
    """Packed histories and the candidates that they are scored against.

    features: KeyedJaggedTensor with the keys HISTORY (T ids) and CANDIDATES (C ids), both looked up
        in the one item table. Masked items already carry MASK_ROW; tokens behind the last history
        and unused candidates carry PADDING_ROW. Its samples are even shares of the ids and mean
        nothing: sequences are in `offsets_B1`.
    The other fields are those of `Positions`.
    step_targets: float32 scalar, the number of targets in this step's batches of all ranks.
    """

    features: KeyedJaggedTensor
    step_targets: Tensor

    @property
    def candidates_C(self) -> Tensor:
        """The candidates' ids, int64."""
        return self.features[CANDIDATES].values()

    @classmethod
    def build(
        cls,
        history_T: Tensor,
        candidates_C: Tensor,
        offsets_B1: Tensor,
        targets_S: Tensor,
        read_positions_S: Tensor | None = None,
        log_counts_C: Tensor | None = None,
        items_T: Tensor | None = None,
        step_targets: float = 0.0,
    ) -> "SequenceBatch":
        """A batch from int64 id vectors; see the class for what each holds.

        items_T: where they are not history_T itself.
        """
        counts = (history_T.numel(), candidates_C.numel())
        samples = max(1, -(-max(counts) // IDS_A_SAMPLE))
        features = KeyedJaggedTensor(
            keys=[HISTORY, CANDIDATES],
            values=torch.cat([history_T, candidates_C]),
            lengths=torch.cat([_even_shares(count, samples) for count in counts]),
            stride=samples,
            length_per_key=list(counts),  # else TorchRec reads it from the device, and waits
        )
        total = torch.tensor(step_targets, dtype=torch.float32)
        items_T = history_T if items_T is None else items_T
        return cls(offsets_B1, targets_S, read_positions_S, log_counts_C, items_T, features, total)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SequenceBatch":
        return self._map(lambda value: value.to(device=device, non_blocking=non_blocking))

    def overwrite(self, other: "SequenceBatch") -> None:
        """Copy another batch of equal shapes into this one's tensors, without waiting.

        The shares of the ids follow from the shapes, so they are the same already.
        """
        self.features.values().copy_(other.features.values(), non_blocking=True)
        for one in fields(self):
            own, value = getattr(self, one.name), getattr(other, one.name)
            if isinstance(own, Tensor):
                own.copy_(value, non_blocking=True)

    def pin_memory(self) -> "SequenceBatch":
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        self._map(lambda value: value.record_stream(stream))

    def _map(self, act) -> "SequenceBatch":  # type: ignore[no-untyped-def]
        values = (getattr(self, one.name) for one in fields(self))
        return SequenceBatch(*(None if value is None else act(value) for value in values))


def to_batch(
    pack: PackArrays,
    candidates_C: np.ndarray,
    log_counts_C: np.ndarray | None,
    step_targets: int,
) -> SequenceBatch:
    """A pack with its candidates, as tensors on the same memory."""
    return SequenceBatch.build(
        torch.from_numpy(pack.history_T),
        torch.from_numpy(candidates_C),
        torch.from_numpy(pack.offsets_B1),
        torch.from_numpy(pack.targets_S),
        None if pack.read_positions_S is None else torch.from_numpy(pack.read_positions_S),
        None if log_counts_C is None else torch.from_numpy(log_counts_C),
        torch.from_numpy(pack.items_T),
        float(step_targets),
    )


def _even_shares(count: int, samples: int) -> Tensor:
    """`samples` lengths that add up to `count` and differ by 1 at most, int32."""
    lengths = torch.full((samples,), count // samples, dtype=torch.int32)
    lengths[: count % samples] += 1
    return lengths
