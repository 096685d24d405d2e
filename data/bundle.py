"""The exported bundle: a folder that scores with torch alone.

    model.pt             TorchScript (modules/scorer.py): forward(items, offsets, k, exclude_seen)
    rows/part-NNNNN.pt   the item rows in order, {"rows": [R, D]} and for int8 {"scales": [R]}
    vocabulary.parquet   item_id (raw), item (table row), count
    manifest.json        what it is, versions, hashes, metrics; written last

Nothing of ours is needed to use one:

    model = torch.jit.load("BUNDLE/model.pt")
    parts = [torch.load(p, weights_only=True) for p in sorted(Path("BUNDLE/rows").iterdir())]
    model.set_rows([p["rows"] for p in parts], [p["scales"] for p in parts if "scales" in p])
    rows, scores = model(items, offsets, 100, True)

forward also takes pairs (item, sequence) to leave out and a mask of allowed rows; a causal model
has `advance(state, item)`, see modules/scorer.py. With format=aotinductor the encoder is native
code in place of model.pt, see data/compiled.py.
This module does the same and checks what it reads. It needs torch and pyarrow, not TorchRec.
"""

import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from data.bundle_manifest import AGAIN, MODEL, ROWS, BundleManifest, check_file, encoder_hash
from data.compiled import WEIGHTS, check_allowed, check_runs_here, load_compiled
from data.cores import on_all_cores
from data.errors import InputError
from data.schema import MANIFEST
from data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. `model` is `modules.scorer.Scorer` with its rows, scripted or compiled."""

    folder: Path
    manifest: BundleManifest
    vocabulary: Vocabulary
    model: Any
    device: torch.device

    @classmethod
    def open(
        cls,
        folder: Path | str,
        device: torch.device | str,
        hashes: bool = True,
        native_code: bool = False,
    ) -> "Bundle":
        """Open a bundle. `hashes`: compare every file's content too, not its size alone.

        native_code: also open one of format=aotinductor, which runs code that whoever wrote the
        bundle chose.
        Raises InputError for a bundle that is absent, unfinished, damaged, or does not fit here.
        """
        folder, device = Path(folder), torch.device(device)
        manifest = BundleManifest.read(folder)
        if manifest.compiled_for is not None:
            check_allowed(folder, native_code)
            made_with = manifest.versions.get("torch", "unknown")
            check_runs_here(folder, manifest.compiled_for, made_with, device)
        on_all_cores(lambda one: check_file(folder / one.path, one, hashes), manifest.files)
        parts = [folder / one.path for one in manifest.files if one.path.startswith(f"{ROWS}/")]
        try:
            if manifest.compiled_for is None:
                model = load_model(folder / MODEL, parts, device)
            else:
                model = with_rows(load_compiled(folder, manifest.model), parts, device)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            if "out of memory" in reason:
                raise InputError(
                    f"bundle {folder} does not fit on {device} ({reason}); use device=cpu, or "
                    "export it with smaller rows=fp16|int8"
                ) from error
            raise InputError(f"bundle {folder} cannot be loaded ({reason}); {AGAIN}") from error
        except pickle.UnpicklingError as error:  # its text advises to load the file unsafely
            raise InputError(
                f"bundle {folder} cannot be loaded: its rows or weights are not plain tensors, "
                f"and nothing in them was run; {AGAIN}"
            ) from error
        vocabulary = Vocabulary.read(folder)
        if not model.table_rows == manifest.table_rows == vocabulary.table_rows:
            raise InputError(
                f"bundle {folder} has {model.table_rows} rows, but its vocabulary has "
                f"{vocabulary.table_rows}; {AGAIN}"
            )
        if encoder_hash(manifest.model, model.encoder.state_dict()) != manifest.encoder_sha256:
            of = MODEL if manifest.compiled_for is None else WEIGHTS
            raise InputError(
                f"{folder / MANIFEST} is damaged: its model or encoder_sha256 is not that of "
                f"{of}; {AGAIN}"
            )
        return cls(folder, manifest, vocabulary, model, device)

    @torch.no_grad()
    def score(
        self,
        items_T: Tensor,
        offsets_B1: Tensor,
        k: int,
        exclude_seen: bool = True,
        excluded: tuple[Tensor, Tensor] | None = None,
        allowed_V: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(table rows [B, k], scores [B, k]) on the CPU; see `modules.scorer.Scorer.forward`.

        excluded: pairs (item, sequence) to leave out. Threads may call it at the same time.
        Raises InputError for a model that answers NaN or infinity.
        """
        items_N, sequences_N = self._here(excluded)
        return self._answer(
            *self.model(
                items_T.to(self.device),
                offsets_B1.to(self.device),
                k,
                exclude_seen,
                items_N,
                sequences_N,
                None if allowed_V is None else allowed_V.to(self.device),
            )
        )

    def check_k(self, k: int) -> None:
        """Raise InputError for more items than there are."""
        if k > self.vocabulary.size:
            raise InputError(
                f"k={k} is more than the bundle's {self.vocabulary.size} items; lower it"
            )

    def new_states(self, users: int) -> Tensor:
        """States of users without an event, fp32 [U, F]. Raises InputError for a model without."""
        if self.model.state_numbers == 0:
            raise InputError(
                f"the encoder of bundle {self.folder} is bidirectional and reads whole histories; "
                "only a causal one (model=causal) has a state to carry forward"
            )
        return torch.zeros(users, self.model.state_numbers)

    @torch.no_grad()
    def advance(
        self, state_UF: Tensor, items_N: Tensor, users_E: list[int] | None = None
    ) -> Tensor:
        """The states, on the CPU, after one more event of each user, or several: `Scorer.advance`.

        users_E: how many users have an e-th event, those of the first rows, and all have a first
        one; None for one event of all. items_N: all first events, all second ones, and so on. On a
        GPU the states stay there meanwhile, a few times their bytes.
        """
        state_UF = state_UF.to(self.device)
        for items_U in items_N.to(self.device).split(users_E or [len(items_N)]):
            moved_UF = self.model.advance(state_UF[: len(items_U)], items_U)
            if len(moved_UF) == len(state_UF):
                state_UF = moved_UF
            else:  # not the first event: these are our own states
                state_UF[: len(moved_UF)] = moved_UF
        return state_UF.cpu()

    @torch.no_grad()
    def score_states(
        self,
        state_UF: Tensor,
        k: int,
        excluded: tuple[Tensor, Tensor] | None = None,
        allowed_V: Tensor | None = None,
        seen: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`score` for states of users with an event, who have no history here.

        excluded, seen: pairs (item, user) that are left out, and pairs that are recommended as
        repeats. What a user has seen belongs in one of them.
        """
        items_N, users_N = self._here(excluded)
        h_UD = state_UF[:, state_UF.shape[1] - self.model.width :].to(self.device)
        allowed_V = None if allowed_V is None else allowed_V.to(self.device)
        pairs = items_N, users_N, allowed_V, *self._here(seen)
        return self._answer(*self.model.top(h_UD, k, *pairs))

    def _here(self, pairs: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(0, dtype=torch.int64)
        items_N, sequences_N = (nothing, nothing) if pairs is None else pairs
        return items_N.to(self.device), sequences_N.to(self.device)

    def _answer(self, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return self.checked(rows.cpu(), scores.cpu())

    def checked(self, rows: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """An answer of this model. Raises InputError for NaN or infinity."""
        if not all_numbers(scores):
            raise InputError(
                f"bundle {self.folder} answers NaN or infinite scores; export another checkpoint"
            )
        return rows, scores


def all_numbers(scores: Tensor) -> bool:
    """Whether no score is NaN or +inf; -inf stands where fewer than k items remain."""
    return bool((scores < torch.inf).all())


def load_model(model: Path | IO[bytes], parts: Iterable[Path], device: torch.device) -> Any:
    """The scripted scorer with the rows of `parts`."""
    with warnings.catch_warnings():
        # Deprecated since torch 2.13, and the one format that needs nothing but torch anywhere.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+.* is deprecated")
        scorer = torch.jit.load(
            str(model) if isinstance(model, Path) else model, map_location=device
        )
    return with_rows(scorer, parts, device)


def with_rows(scorer: Any, parts: Iterable[Path], device: torch.device) -> Any:
    """The scorer with the rows of `parts` set. On a CPU the rows are mapped, not read."""
    loaded = [
        torch.load(path, weights_only=True, mmap=device.type == "cpu", map_location=device)
        for path in parts
    ]
    scorer.set_rows(
        [part["rows"] for part in loaded], [part["scales"] for part in loaded if "scales" in part]
    )
    return scorer
