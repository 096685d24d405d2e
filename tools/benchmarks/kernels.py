"""Suite `kernels`: which kernels a pass of the encoder spends its time in, ours and attention's.

Kernel times by torch.profiler, without the gaps between them; on the CPU the operators' own times.
The rows of one encoder add up to its first, but for what is too short to be shown.

Legend: T tokens.
"""

import os
from collections.abc import Callable

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from tools.benchmarks.attention import new_attention
from tools.benchmarks.bench import Bench
from tools.benchmarks.inputs import offsets_of
from tools.benchmarks.measure import Times
from tools.benchmarks.passes import encoder_pass, new_encoder

LENGTHS = (200, 1_024)  # of the histories of a batch
CALLS = 4  # in one profile, after as many that are not
SHOWN = 16  # kernels
NAME = 36  # characters of a kernel's name


def run(bench: Bench) -> None:
    tokens = bench.size(262_144, 4_096, 1_024)
    model = bench.model(kind="causal")
    encoders = {
        "ours": new_encoder(model, bench.device),
        "attention": new_attention(model, bench.device),
    }
    for length in LENGTHS:
        used = tokens // length * length
        offsets_B1 = offsets_of(np.full(used // length, length), bench.device)
        totals = {}
        for by, encoder in encoders.items():
            with bench.case(f"length {length:,}, {by}"):
                found = profiled(encoder_pass(bench, encoder, used, offsets_B1), bench.device)
                totals[by] = sum(one.median_ms for one in found.values())
                name = f"length {length:,}, fwd+bwd: all kernels"
                bench.keep(name, Times.of([totals[by]]), by=by, work=used)
                for kernel, times in list(found.items())[:SHOWN]:
                    bench.keep(f"{kernel:.{NAME}}", times, by=by)
        if len(totals) == len(encoders):
            ratio = totals["attention"] / totals["ours"]
            bench.find(f"length {length:,}: attention's kernels take {ratio:.2f} times ours")


def profiled(call: Callable[[], object], device: torch.device) -> dict[str, Times]:
    """Milliseconds of each kernel in one call, the longest first."""
    on_gpu = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it says when it begins and ends
    for _ in range(CALLS):
        call()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as seen:  # else torch 2.11 warns
        for _ in range(CALLS):
            call()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = {}
    for one in seen.key_averages():
        microseconds = one.self_device_time_total if on_gpu else one.self_cpu_time_total
        if microseconds:
            found[one.key] = Times.of([microseconds / 1e3 / CALLS])
    return dict(sorted(found.items(), key=lambda item: -item[1].median_ms))
