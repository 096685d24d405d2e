"""mamba-ssm's Triton kernels as a peer, with our signatures; used by the benchmark alone.

Legend: T tokens, H heads of P channels, N state size, B sequences, D model width.
"""

import functools
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import torch
from torch import Tensor

from modules.ssd import sequence_of_tokens
from tools.benchmarks.bench import UnavailableError

CHUNK = 256  # mamba-ssm's default, and the fastest measured on an H100


def mamba_ssd(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    D_H: Tensor,
    offsets_B1: Tensor,
) -> Tensor:
    """`modules.ssd.ssd` by `mamba_chunk_scan_combined`; padding tokens are one more sequence."""
    return (
        kernels()
        .mamba_chunk_scan_combined(
            x_THP.unsqueeze(0),
            dt_TH.unsqueeze(0),
            A_H,
            B_TN.unsqueeze(1).unsqueeze(0),
            C_TN.unsqueeze(1).unsqueeze(0),
            chunk_size=CHUNK,
            D=D_H,
            seq_idx=sequence_index(offsets_B1, x_THP.shape[0]),
        )
        .squeeze(0)
    )


def mamba_mixer(mixer: Any, u_TD: Tensor, offsets_B1: Tensor, position_T: Tensor) -> Tensor:
    """A `Mamba2Mixer` as mamba-ssm's Mamba2 module runs it: `mamba_split_conv1d_scan_combined`."""
    operations = kernels()
    if operations.causal_conv1d_fn is None:
        raise UnavailableError("causal-conv1d is not installed")
    kind = (
        torch.get_autocast_dtype(u_TD.device.type)
        if torch.is_autocast_enabled(u_TD.device.type)
        else u_TD.dtype
    )
    return operations.mamba_split_conv1d_scan_combined(
        mixer.in_proj(u_TD).unsqueeze(0),
        mixer.conv_weight.to(kind),
        mixer.conv_bias.to(kind),
        mixer.dt_bias,
        -torch.exp(mixer.A_log),
        mixer.D,
        chunk_size=CHUNK,
        seq_idx=sequence_index(offsets_B1, u_TD.shape[0]),
        activation="silu",
        rmsnorm_weight=mixer.norm_weight,
        rmsnorm_eps=mixer.gated_norm_eps,
        outproj_weight=mixer.out_proj.weight,
        headdim=mixer.head,
        ngroups=1,
        norm_before_gate=False,
    ).squeeze(0)


def sequence_index(offsets_B1: Tensor, tokens: int) -> Tensor:
    return sequence_of_tokens(offsets_B1, tokens).int().unsqueeze(0)


@functools.cache
def kernels() -> types.ModuleType:
    """`mamba_ssm.ops.triton.ssd_combined`, without running the package's `__init__`.

    That imports selective_scan_cuda, transformers and huggingface_hub, none of which the Triton
    kernels need. An empty package registered under its name, whose path is the installed folder,
    lets the submodules import as they are. Raises UnavailableError where it is not installed.
    """
    if "mamba_ssm" not in sys.modules:
        spec = importlib.machinery.PathFinder.find_spec("mamba_ssm")
        if spec is None or spec.submodule_search_locations is None:
            raise UnavailableError("mamba-ssm is not installed; `make install-cuda` installs it")
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules["mamba_ssm"] = package
    _tune_briefly()
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined")


def _tune_briefly() -> None:
    """Its autotuners time some 150 configurations of a kernel, each for over 100 ms by default."""
    import triton
    from triton.runtime.driver import driver

    brief = functools.partial(triton.testing.do_bench, warmup=3, rep=12)
    driver.active.get_benchmarker = lambda: brief
