"""`init_from`: a new run from another's weights, also when items have joined the vocabulary since.

Rows keep their numbers when a vocabulary grows, so old rows and their optimizer state are read in
place and new rows stay as `fill_rows` made them, by (seed, row) alone, with empty optimizer state.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint import LoadPlan
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorStorageMetadata,
)

from data.errors import InputError
from data.schema import RESERVED_ROWS
from data.vocabulary import Vocabulary
from modules.item_table import TABLE
from trainer import checkpoint
from trainer.checkpoint_files import Planner
from trainer.config import Config, completed
from trainer.sharding import Sharded
from trainer.world import World


def warm_start(config: Config, vocabulary: Vocabulary, sharded: Sharded, world: World) -> str:
    """Load what `init_from` names: weights, and with `init_optimizer` all optimizer state.

    Collective. Returns a line that says how many items kept their rows and how many are new. Raises
    InputError when the rows of the checkpoint are not the first rows of this vocabulary, or when
    its optimizer is another.
    """
    folder = checkpoint.find(Path(str(config.init_from)))
    before = completed(yaml.safe_load((folder / checkpoint.CONFIG).read_text()))
    _require_same_model(before, config)
    items = _old_items(before, config, vocabulary)
    if config.init_optimizer:
        _require_same_optimizer(before, config)
    checkpoint.verify(folder, world)
    planner = GrownTable(RESERVED_ROWS + items, vocabulary.table_rows)
    kept = "rows"
    if config.init_optimizer:
        checkpoint.load(folder, sharded, planner)
        kept = "rows and their optimizer state"
    else:
        checkpoint.load_weights(folder, sharded, planner)
    unseen = int((vocabulary.counts[RESERVED_ROWS:] == 0).sum())
    return (
        f"init_from={folder}: {items:,} items keep their {kept}, {vocabulary.size - items:,} are "
        f"new; {unseen:,} of all have no training event"
    )


def _old_items(before: dict[str, Any], config: Config, vocabulary: Vocabulary) -> int:
    """How many items the checkpoint has, which must be this vocabulary's first ones."""
    old = before.get("vocabulary", {})
    items = old.get("items", 0)
    if not 0 < items <= vocabulary.size or vocabulary.digest(items) != old["sha256"]:
        raise InputError(
            f"init_from={config.init_from} was trained with another vocabulary than "
            f"{config.data.path}: its rows are other items; convert the log with vocabulary= the "
            "data set of that run, which keeps its rows and appends new items"
        )
    return int(items)


def _require_same_model(before: dict[str, Any], config: Config) -> None:
    was, now = ({**one, "dropout": None} for one in (before["model"], asdict(config.model)))
    keys = [
        f"model.{key} was {was.get(key)}, now {now[key]}" for key in now if was.get(key) != now[key]
    ]
    if keys:
        raise InputError(
            f"init_from={config.init_from} is of another model ({'; '.join(keys)}); weights mean "
            "something only in their own: use its values, or start without init_from"
        )


def _require_same_optimizer(before: dict[str, Any], config: Config) -> None:
    was, now = before["embedding"]["optimizer"], config.embedding.optimizer
    if was != now:
        raise InputError(
            f"init_from={config.init_from} holds the state of embedding.optimizer={was}, which "
            f"{now} cannot use; set embedding.optimizer={was}, or init_optimizer=false for a fresh "
            "optimizer"
        )


class GrownTable(Planner):
    """Reads tensors of `before` rows into the first rows of tensors of `now` rows.

    Under column-wise sharding a row-wise optimizer's state is one number a row and column shard,
    the shards' columns of numbers one behind the other: each grows at its own end.
    """

    def __init__(self, before: int, now: int) -> None:
        super().__init__()
        self.before, self.now = before, now
        self._stored: dict[MetadataIndex, MetadataIndex] = {}

    def create_local_plan(self) -> LoadPlan:
        stored = self.metadata
        assert stored is not None
        grown = {name: self._grow(name, one) for name, one in stored.state_dict_metadata.items()}
        self.metadata = replace(stored, state_dict_metadata=grown)
        plan = super().create_local_plan()
        self.metadata = stored
        items = [
            replace(one, storage_index=self._stored.get(one.storage_index, one.storage_index))
            for one in plan.items
        ]
        return replace(plan, items=items)

    def _grow(self, name: str, stored: Any) -> Any:
        """The metadata of a stored tensor as if its rows stood in the larger table's."""
        if f"embeddings.{TABLE}." not in name or not isinstance(stored, TensorStorageMetadata):
            return stored
        shards = stored.size[0] // self.before
        wanted = torch.Size([shards * self.now, *stored.size[1:]])
        chunks = []
        for chunk in stored.chunks:
            column, row = divmod(chunk.offsets[0], self.before)
            offsets = torch.Size([column * self.now + row, *chunk.offsets[1:]])
            self._stored[MetadataIndex(name, offsets)] = MetadataIndex(name, chunk.offsets)
            chunks.append(replace(chunk, offsets=offsets))
        return replace(stored, size=wanted, chunks=chunks)
