"""Batch scoring by the trainer's encoder and kernels instead of the scripted model's references.

The same weights, from the bundle's own model: on a GPU the encoder runs on the Triton kernels, its
products in bf16 or fp32, and `modules.catalogue` ranks. Work is launched without waiting, so that
the host prepares a batch and handles another while the device computes a third.

Legend: T packed tokens, B sequences, N pairs to leave out, D width, K = k.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from modules.catalogue import Catalogue, RepeatPairs
from modules.encoder import Encoder
from modules.ssd import sequence_of_tokens

# Tokens and users of a batch on a GPU are padded to one of 8 and 16 sizes an octave: cuBLAS takes a
# while over each size of a product that is new to it.
TOKEN_BITS, USER_BITS = 3, 4
Pairs = tuple[Tensor, Tensor]  # items (table rows) and users (of a batch), int64


def rounded_up(number: int, bits: int) -> int:
    """The next number, itself included, that is 0 behind its leading bit and `bits` more.

    That adds one part in 2^bits at most.
    """
    step = 1 << max(0, (number - 1).bit_length() - 1 - bits)
    return -(-number // step) * step


class KernelScorer:
    """`modules.scorer.Scorer.forward` for histories of at least one item each, in batches.

    model: a bundle's scripted scorer, whose row blocks become one, which both then use. While they
    do the device holds the table twice; afterwards once, and two bytes a number more.
    config: of `modules.encoder.Encoder`, as the bundle's manifest has it. precision: bf16 | fp32.
    allowed_V: as in `top`.
    On CUDA torch's switches for exact sums of fp32 numbers are set, for the whole process.
    rescored: users whom the catalogue could not prove, and whom `model.top` ranked again.
    """

    def __init__(
        self,
        model: Any,
        config: dict[str, Any],
        device: torch.device,
        precision: str,
        allowed_V: Tensor | None = None,
    ) -> None:
        self.model, self.device, self.bf16 = model, device, precision == "bf16"
        if device.type == "cuda":
            # Triton launches on the current device.
            torch.cuda.set_device(torch.cuda.current_device() if device.index is None else device)
            # `Catalogue` counts on fp32, also for sums that cuBLAS splits.
            torch.set_float32_matmul_precision("highest")
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self.pads = device.type == "cuda"
        self.encoder = Encoder(**config).to(device).eval()
        self.encoder.load_state_dict(model.encoder.state_dict())
        rows_VD = torch.cat(model.rows)
        scales_V = torch.cat(model.scales) if model.scales else None
        model.set_rows([rows_VD], [] if scales_V is None else [scales_V])
        self.allowed_V = None if allowed_V is None else allowed_V.to(device)
        self.catalogue = Catalogue(rows_VD, scales_V, self.allowed_V)
        self.rescored = 0

    @torch.no_grad()
    def hidden(self, items_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """The user vectors, fp32 [B, D]: the encoder's output at each last token."""
        items_T, offsets_B1 = self._here(items_T), self._here(offsets_B1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            x_TD, last_B = self.catalogue.look_up(items_T), offsets_B1[1:] - 1
            return self.encoder(x_TD, offsets_B1, last_B, read_last=True)

    @torch.no_grad()
    def launch(
        self,
        items_T: Tensor,
        offsets_B1: Tensor,
        k: int,
        exclude_seen: bool,
        excluded: tuple[Tensor, Tensor] | None = None,
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start scoring a batch; the call that it returns waits for the answer, on the CPU.

        items_T: int32 or int64, rows of the table, unchecked. offsets_B1: int64. Both on the CPU,
        as are the pairs `excluded` (item, sequence). No sequence may be empty.
        """
        tokens, users = len(items_T), len(offsets_B1) - 1
        items_T, offsets_B1 = map(self._here, self._padded(items_T, offsets_B1))
        h_BD = self.hidden(items_T, offsets_B1)
        items_N, users_N = items_T[:tokens].long(), sequence_of_tokens(offsets_B1, tokens)
        seen = None
        if not exclude_seen:
            seen = (items_N, users_N) if self.encoder.repeats else None
            items_N, users_N = items_N[:0], users_N[:0]
        if excluded is not None:
            items_N = torch.cat([items_N, self._here(excluded[0])])
            users_N = torch.cat([users_N, self._here(excluded[1])])
        return self._rank(h_BD, k, (items_N, users_N), seen, users)

    @torch.no_grad()
    def top(
        self, h_BD: Tensor, k: int, exclude_items_N: Tensor, exclude_users_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`modules.scorer.Scorer.top` without repeat scores, the answer on the CPU."""
        pairs = self._here(exclude_items_N), self._here(exclude_users_N)
        return self._rank(h_BD, k, pairs, None, len(h_BD))()

    def _rank(
        self, h_BD: Tensor, k: int, left_out: Pairs, seen: Pairs | None, users: int
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """Start ranking; the answer is that of the first `users`.

        seen: pairs that get the encoder's repeat score.
        """
        answer = self.catalogue.top(h_BD, k, *left_out, self._repeats(h_BD, seen))
        rows_BK, scores_BK, proved_B = (one[:users].to("cpu", non_blocking=True) for one in answer)
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()

        def wait() -> tuple[Tensor, Tensor]:
            if done is not None:
                done.synchronize()
            if not proved_B.all():
                some_R = (~proved_B).nonzero().squeeze(1)
                again = self._rank_all(h_BD, some_R.to(self.device), k, left_out, seen)
                for answered, part in zip((rows_BK, scores_BK), again, strict=True):
                    answered[some_R] = part.cpu()
            return rows_BK, scores_BK

        return wait

    def _repeats(self, h_BD: Tensor, seen: Pairs | None) -> RepeatPairs | None:
        if seen is None:
            return None
        items_P, users_P = seen
        keys_P = (users_P * len(self.catalogue.rows_VD) + items_P).sort().values
        return RepeatPairs(items_P, users_P, self.encoder.repeat_score(h_BD), keys_P)

    @torch.no_grad()
    def _rank_all(
        self, h_BD: Tensor, some_R: Tensor, k: int, left_out: Pairs, seen: Pairs | None
    ) -> tuple[Tensor, Tensor]:
        """The answers of the users `some_R` by fp32 scores of all items."""
        self.rescored += len(some_R)
        place_B = torch.full([len(h_BD)], -1, device=self.device)
        place_B[some_R] = torch.arange(len(some_R), device=self.device)

        def of_these(pairs: Pairs) -> Pairs:
            place_N = place_B[pairs[1]]
            return pairs[0][place_N >= 0], place_N[place_N >= 0]

        repeated = () if seen is None else of_these(seen)
        return self.model.top(h_BD[some_R], k, *of_these(left_out), self.allowed_V, *repeated)

    def _padded(self, items_T: Tensor, offsets_B1: Tensor) -> tuple[Tensor, Tensor]:
        """With padding tokens and empty sequences at the end where `pads` is set."""
        if not self.pads:
            return items_T, offsets_B1
        tokens, users = len(items_T), len(offsets_B1) - 1
        more_T = rounded_up(tokens, TOKEN_BITS) - tokens
        more_B = rounded_up(users, USER_BITS) - users
        return pad(items_T, (0, more_T)), pad(offsets_B1, (0, more_B), value=tokens)

    def _here(self, x: Tensor) -> Tensor:
        """On the device, without waiting for what runs there."""
        if self.device.type != "cuda" or x.is_cuda:
            return x
        return x.pin_memory().to(self.device, non_blocking=True)
