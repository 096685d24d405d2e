"""The item table as a checkpoint stores it, read in blocks of rows without a process group.

Legend: V table rows, D width, R rows of one block.

torch.distributed.checkpoint reads a stored shard whole, however little of it is wanted, so a table
that one rank saved would have to fit in memory at once. Here the stored shards are mapped and a
block is copied out of them: memory is one block, for row-, table- and column-wise shards of any
number of ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from data.errors import InputError, reason
from modules.item_table import TABLE
from trainer.checkpoint_files import read_metadata

TABLE_NAME = f"model.table.collection.embeddings.{TABLE}.weight"


@dataclass(frozen=True)
class _Shard:
    """A part of the table, mapped: it starts at (first_row, first_column)."""

    first_row: int
    first_column: int
    values: Tensor


class StoredTable:
    """The table of a checkpoint folder. Raises InputError where the folder holds none."""

    def __init__(self, folder: Path, name: str = TABLE_NAME) -> None:
        metadata = read_metadata(folder)
        table = metadata.state_dict_metadata.get(name)
        if not isinstance(table, TensorStorageMetadata):
            raise InputError(f"{folder} holds no item table ({name}); give a checkpoint of a run")
        self.rows, self.width = table.size
        self._shards: list[_Shard] = []
        for index, stored in (metadata.storage_data or {}).items():
            if index.fqn == name:
                first_row, first_column = index.offset or (0, 0)
                path = folder / stored.relative_path
                self._shards.append(
                    _Shard(first_row, first_column, _mapped(path, stored.offset, stored.length))
                )
        stored_numbers = sum(shard.values.numel() for shard in self._shards)
        if stored_numbers != self.rows * self.width:
            raise InputError(
                f"{folder} stores {stored_numbers} of the item table's {self.rows * self.width} "
                "numbers; use another checkpoint"
            )

    def blocks(self, block_bytes: int) -> Iterator[Tensor]:
        """All rows in order, fp32 [R, D] in blocks of at most `block_bytes`."""
        step = max(1, block_bytes // (4 * self.width))
        for start in range(0, self.rows, step):
            yield self.block(start, min(start + step, self.rows))

    def block(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, fp32 [R, D]."""
        block_RD = torch.empty(stop - start, self.width)
        for shard in self._shards:
            low = max(start, shard.first_row)
            high = min(stop, shard.first_row + shard.values.shape[0])
            if low < high:
                columns = slice(shard.first_column, shard.first_column + shard.values.shape[1])
                part = shard.values[low - shard.first_row : high - shard.first_row]
                block_RD[low - start : high - start, columns] = part.float()
        return block_RD


def _mapped(path: Path, offset: int, length: int) -> Tensor:
    """The tensor that `torch.save` wrote at `offset` of a file, its storage mapped.

    Loading under FakeTensorMode reads the description alone and notes where the storage lies.
    """
    try:
        with path.open("rb") as file, FakeTensorMode():
            saved = cast(IO[bytes], _create_file_view(file, offset, length))
            described = torch.load(saved, map_location="cpu", weights_only=True)
        storage = described.untyped_storage()
        mapped = np.memmap(
            path,
            mode="c",  # copy on write: torch wants a writable array, and nobody writes
            offset=offset + storage._checkpoint_offset,
            shape=(storage.nbytes(),),
        )
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise InputError(f"{path} is damaged ({reason(error)}); use another checkpoint") from error
    numbers = torch.from_numpy(mapped).view(described.dtype)
    return numbers.as_strided(described.shape, described.stride(), described.storage_offset())
