"""The parts of a run that need neither FBGEMM nor TorchRec, made from the config."""

from dataclasses import asdict

import torch

from data.negatives import Candidates, FullCandidates, SampledCandidates
from data.vocabulary import Vocabulary
from modules.behind_table import Loss
from modules.encoder import Encoder
from modules.losses import FullSoftmax, SampledSoftmax
from modules.products import DTYPES
from trainer.config import Config
from trainer.world import World


def encoder_and_loss(config: Config, world: World) -> tuple[Encoder, Loss, torch.dtype]:
    """What `BehindTable` is made of. Seeds torch's generators."""
    torch.manual_seed(config.seed)
    with torch.device(world.device):
        encoder = Encoder(**asdict(config.model))
    loss: Loss
    if config.loss.kind == "full":
        loss = FullSoftmax(world.rank, smoothing=config.loss.smoothing)
    else:
        loss = SampledSoftmax(config.loss.negatives, config.loss.in_batch, config.loss.logq)
    return encoder, loss, DTYPES[config.trainer.precision]


def candidates(config: Config, table_rows: int, counts: Vocabulary, world: World) -> Candidates:
    """Each rank's slice of the rows for the full softmax, draws for the sampled one."""
    if config.loss.kind == "full":
        return FullCandidates(table_rows, world.rank, world.size)
    return SampledCandidates(
        config.loss.distribution,
        config.loss.negatives,
        counts.counts,
        config.loss.in_batch,
        config.seed,
    )
