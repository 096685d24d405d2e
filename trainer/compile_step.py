"""A process that compiles a share of the training step's kernels into Triton's cache on the disk.

    python -m trainer.compile_step '{"parent": …, "config": …, "number": 0, "of": 4, "threads": 4}'

`trainer.compilers` starts some beside the imports of a run. It makes encoder, loss and batch as the
run does, with made-up ids, so the kernels are those of the run's first step. It imports neither
FBGEMM nor TorchRec, whose imports it is there to overlap.

Legend: T tokens, C candidates, D width.
"""

import json
import sys

from trainer.compilers import end_with

if __name__ == "__main__":
    end_with(json.loads(sys.argv[1])["parent"])  # before the imports, which take seconds

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.packing import assemble
from data.positions import Positions
from data.prefetch import NOBODY
from data.reader import HistoryDataset
from data.samples import NO_SAMPLES
from data.schema import RESERVED_ROWS
from data.vocabulary import Vocabulary
from modules import softmax_memory
from modules.behind_table import BehindTable
from modules.products import DTYPES, fp32_products
from trainer.config import Config
from trainer.parts import candidates, encoder_and_loss
from trainer.resolve import OBJECTIVES, logits_of_step, resolve
from trainer.world import World

# A batch is cut to about so many tokens, and more where rows are narrow: above these sizes no
# kernel's constants depend on them (`head_groups` of modules.kernels.ssd).
MOST_TOKENS, MOST_NUMBERS = 40_960, 1 << 22
# By multiples of this: 16 chunks, so that slices of tensors stay aligned as they were.
CUT = 1_024
# Of a full softmax: but for `kept_share` no constant depends on the number of candidates.
MOST_ROWS = 32_768


def cut_tokens(tokens: int, width: int) -> int:
    """The tokens of a batch that has the same kernels as one of `tokens`."""
    most = max(MOST_TOKENS, MOST_NUMBERS // width)
    return tokens if tokens <= most else most + (tokens - most) % CUT


def cut_rows(table_rows: int, world: World) -> int:
    return min(table_rows, MOST_ROWS * world.size)


def kept_share(config: Config, table_rows: int, world: World) -> float:
    """A share of memory with which a softmax here keeps its exponentials if the run's does."""
    number_bytes = DTYPES[config.trainer.precision].itemsize
    needed = number_bytes * logits_of_step(config, table_rows, world)
    return math.inf if softmax_memory.keeps_exponentials(needed, world.device) else 0.0


def step_of(config: Config, table_rows: int, world: World) -> Callable[[], object]:
    """Forward and backward of a step behind the lookups, on made-up ids of a resolved config."""
    tokens = cut_tokens(config.data.tokens_a_batch, config.model.width)
    rows = cut_rows(table_rows, world)
    model = BehindTable(*encoder_and_loss(config, world))
    counts_V = np.ones(rows, dtype=np.int64)
    counts_V[:RESERVED_ROWS] = 0
    drawn = candidates(config, rows, Vocabulary(pa.nulls(0), counts_V), world)
    read_last = OBJECTIVES[config.data.samples] == "prefix"
    sequences = config.data.max_sequences or 1
    pack = assemble(NOBODY, NO_SAMPLES, tokens, sequences, read_last)
    candidates_C, log_counts_C = drawn.for_pack(0, pack.targets_S)

    def placed(ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids).to(world.device)

    batch = Positions(
        placed(pack.offsets_B1),
        placed(pack.targets_S),
        None if pack.read_positions_S is None else placed(pack.read_positions_S),
        None if log_counts_C is None else placed(log_counts_C),
        placed(pack.items_T),
    )
    # As in a run, ids and rows of history and candidates are parts of one tensor.
    parts = [tokens, len(candidates_C)]
    ids = placed(np.concatenate([pack.history_T, candidates_C]))
    both = torch.zeros(sum(parts), config.model.width, device=world.device)
    x_TD, c_CD = (one.detach().requires_grad_() for one in both.split(parts))

    def step() -> object:
        with fp32_products(config.trainer.precision):
            loss = model.loss_of_rows(x_TD, c_CD, ids[tokens:], batch)
            return torch.autograd.grad(loss, [x_TD, c_CD, *model.parameters()])

    return step


def compile_share(config: Config, number: int, of: int, threads: int) -> None:
    """Compile share `number` of `of`, for the GPU of this host's first rank.

    Raises whatever the run itself will raise for this config.
    """
    from modules.kernels.compile import Share, compile_ahead  # Triton comes with a GPU

    # The run itself has a place there too, already.
    torch.cuda.set_per_process_memory_fraction(1 / (of + 1))
    size = int(os.environ.get("WORLD_SIZE", 1))
    world = World(0, size, 0, 1, torch.device("cuda", 0))
    dataset = HistoryDataset(Path(config.data.path))
    config = resolve(config, world, dataset)
    softmax_memory.KEPT_SHARE = kept_share(config, dataset.table_rows, world)
    step = step_of(config, dataset.table_rows, world)
    compile_ahead(step, Share(number, of), threads)


if __name__ == "__main__":
    what = json.loads(sys.argv[1])
    compile_share(Config.of(what["config"]), what["number"], what["of"], what["threads"])
