"""The encoder as native code for CPUs: compiled by AOTInductor, and run in the encoder's place.

Legend: T packed tokens, Q = CHUNK, K = T / Q chunks, B sequences or users, S read tokens, D width,
F numbers of a user's state.

torch.export takes two programs from the encoder, `forward` at read tokens and, of a causal one,
`step`, whose sizes B, S and K stay open. AOTInductor makes a library of each, in a package that
`torch._inductor.aoti_load_package` opens without any code of ours. The weights are no part of the
code: they are given to it once, under the names of the encoder's state dict.

    forward.pt2   (x [K, Q, D] fp32, offsets [B + 1] int64, read [S] int64) -> h [S, D]
    step.pt2      (x [B, D] fp32, state [B, F] fp32) -> (h [B, D], the next state [B, F])

with K and B + 1 at least 3, S and B of `step` at least 2, and all inputs contiguous.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.pt2_archive._package import AOTICompiledModel

from data.compiled import FORWARD, STEP
from modules.encoder import Encoder
from modules.ssd import CHUNK

# torch.export takes a size of 0 or 1 for a fixed one, and the scan over K chunks one more.
LEAST_CHUNKS, LEAST_OFFSETS, LEAST_ROWS = 3, 3, 2
MOST = 1 << 31
# For any x86-64 CPU with AVX2: by default the code would be for the CPU that compiles it, and for
# as many threads as that has.
OPTIONS = {
    "cpp.march": "",
    "cpp.simdlen": 256,
    "cpp.vec_isa_ok": True,  # AVX2 is what we ask for; a check would compile programs for a while
    "cpp.dynamic_threads": True,
    "aot_inductor.package_constants_in_so": False,
}


class _Forward(Encoder):
    def forward(self, x_KQD: Tensor, offsets_B1: Tensor, read_S: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x_KQD.flatten(0, 1), offsets_B1, read_S)


class _Step(Encoder):
    def forward(self, x_BD: Tensor, state_BF: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.step(x_BD, state_BF)


def compile_encoder(config: Mapping[str, Any], encoder: Encoder, folder: Path) -> list[Path]:
    """Write `forward.pt2` and, of a causal encoder, `step.pt2`; the files.

    config: what `encoder` was made with. Takes half a minute or more, and a C++ compiler.
    Raises whatever torch raises where it cannot.
    """
    paths = []
    for name, program in programs(config, encoder).items():
        paths.append(folder / name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)  # torch about its own calls
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(paths[-1]), inductor_configs=OPTIONS
            )
    return paths


@torch.no_grad()
def programs(config: Mapping[str, Any], encoder: Encoder) -> dict[str, ExportedProgram]:
    """What is compiled into each file."""
    chunks, bounds, rows = (
        Dim(name, min=least, max=MOST)
        for name, least in (("K", LEAST_CHUNKS), ("B1", LEAST_OFFSETS), ("rows", LEAST_ROWS))
    )

    def exported(module: Encoder, inputs: list[tuple[Dim, Tensor]]) -> ExportedProgram:
        module.load_state_dict(encoder.state_dict())
        sizes, tensors = zip(*[({0: size}, tensor) for size, tensor in inputs], strict=True)
        return export(module.eval(), tensors, dynamic_shapes=sizes, strict=False)

    x_KQD = torch.zeros(4, CHUNK, encoder.width)
    offsets_B1, read_S = torch.tensor([0, 50, 70, 100]), torch.tensor([49, 69, 99])
    inputs = [(chunks, x_KQD), (bounds, offsets_B1), (rows, read_S)]
    found = {FORWARD: exported(_Forward(**config), inputs)}
    if encoder.causal:
        x_BD, state_BF = torch.zeros(3, encoder.width), torch.zeros(3, encoder.state_numbers)
        found[STEP] = exported(_Step(**config), [(rows, x_BD), (rows, state_BF)])
    return found


class CompiledEncoder(Encoder):
    """`Encoder` whose `forward` at read tokens and `step` are the native code in `folder`.

    weights: the encoder's state dict. Raises RuntimeError where they or the packages do not fit
    config. Loading a package runs it: whoever wrote it can do what this process may.
    """

    def __init__(
        self, config: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Path
    ) -> None:
        with torch.device("meta"):
            super().__init__(**config)
        self.load_state_dict(weights, assign=True)
        self.eval()
        self._forward = _load(folder / FORWARD, self)
        self._step = _load(folder / STEP, self) if self.causal else None

    def forward(
        self,
        x_TD: Tensor,
        offsets_B1: Tensor,
        read_positions_S: Tensor | None = None,
        read_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """As `Encoder.forward`, in fp32. Raises ValueError without read positions."""
        if read_positions_S is None or dtype not in (None, torch.float32):
            raise ValueError("a compiled encoder answers in fp32, at the tokens that are read")
        tokens, reads = x_TD.shape[0], read_positions_S.shape[0]
        fill = max(-tokens % CHUNK, LEAST_CHUNKS * CHUNK - tokens)
        x_KQD = F.pad(x_TD, (0, 0, 0, fill)).unflatten(0, (-1, CHUNK))
        empty = offsets_B1[-1:].expand(max(0, LEAST_OFFSETS - offsets_B1.shape[0]))
        read_S = _at_least(LEAST_ROWS, read_positions_S)
        inputs = x_KQD.float(), torch.cat([offsets_B1, empty]).long(), read_S.long()
        return self._forward(*[one.contiguous() for one in inputs])[:reads]

    def step(self, x_BD: Tensor, state_BF: Tensor) -> tuple[Tensor, Tensor]:
        """As `Encoder.step`."""
        if self._step is None:
            return super().step(x_BD, state_BF)  # which refuses
        users = x_BD.shape[0]
        inputs = [_at_least(LEAST_ROWS, one).contiguous() for one in (x_BD, state_BF)]
        h_BD, state_BF = self._step(*inputs)
        return h_BD[:users], state_BF[:users]


def _at_least(rows: int, x: Tensor) -> Tensor:
    """x with rows of 0 behind it, where it has fewer."""
    missing = max(0, rows - x.shape[0])
    return torch.cat([x, x.new_zeros([missing, *x.shape[1:]])]) if missing else x


def _load(path: Path, encoder: nn.Module) -> AOTICompiledModel:
    # Not by `torch._inductor.aoti_load_package`: it looks first which CPU it would compile for,
    # which takes a C++ compiler and 10 s, only to warn that the code is for a lesser one.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
    package, weights = AOTICompiledModel(loader), encoder.state_dict()
    package.load_constants(
        {name: weights[name] for name in package.get_constant_fqns()}, check_full_update=True
    )
    return package
