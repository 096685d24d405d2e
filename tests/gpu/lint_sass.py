"""Find miscompiled warp-group products in our kernels' machine code, without a GPU.

The ptxas 12.8 of Triton 3.6 sometimes loses a copy of a uniform register, so that an operand
descriptor of a `wgmma` is built from a register that holds something else: illegal shared
addresses or wrong results, for some numbers of heads and not for others. Two traces of it show in
the SASS: both halves of a 64-bit sum read the same register, or a uniform register is read that
nothing writes. On an H100 exactly the kernels with such a trace failed, and no other.

    python tests/gpu/lint_sass.py [P,N,H | D ...]      compiles for sm_90, prints what it finds

P,N,H: the SSD kernels and those around them; D: the softmax kernels at that width.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from modules.fused import whole_rows
from modules.products import DTYPES, fp32_products

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)\s*(.*?);")


class NoDevice:
    """Names the target; kernels are compiled for it and never launched."""

    def __init__(self):
        self.launchers = []

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty):
        return ty

    def launcher_cls(self, src, metadata):
        self.launchers.append(src)

    class utils:  # noqa: N801
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 * 1024}

        @staticmethod
        def load_binary(*_):
            return object(), object(), 0, 0, 1024


def findings(sass):
    """Lines of SASS that carry one of the two traces."""
    written, read, halves, found = set(), {}, {}, []
    for line in sass.splitlines():
        if not (match := INSTRUCTION.match(line)):
            continue
        opcode, text = match.groups()
        operands = [operand.strip() for operand in text.split(",")]
        target = re.match(r"UR(\d+)", operands[0])
        writes = target and opcode.startswith(("U", "S2UR", "R2UR", "CS2UR", "LDCU"))
        if "gdesc" not in text:
            for register in re.findall(r"\bUR(\d+)\b", ",".join(operands[bool(writes) :])):
                read.setdefault(int(register), line)
        if "HGMMA" in opcode:  # descriptors of A and B, two registers each; A may be registers
            unused = 2 if re.match(r"R\d+(\.reuse)?, R\d+", text) else 0
            for first in re.findall(r"gdesc\[UR(\d+)\]", text):
                for register in range(int(first) + unused, int(first) + 4):
                    read.setdefault(register, line)
        low = re.match(r"UR\d+, (UP\d), UR(\d+), 0x", text)
        if opcode == "UIADD3" and low:
            halves[low[1]] = low[2]
        high = re.match(r"UR\d+, UR(\d+), .*, (UP\d),", text)
        if opcode == "UIADD3.X" and high and halves.get(high[2]) == high[1]:
            found.append(line)
        if writes:
            width = 2 if ".64" in opcode or "WIDE" in opcode else 1
            fresh = range(int(target[1]), int(target[1]) + width)
            written.update(fresh)
            rewritten = {str(register) for register in fresh}
            halves = {carry: low for carry, low in halves.items() if low not in rewritten or (
                opcode == "UIADD3" and carry == operands[1])}  # fmt: skip
    return found + [line for register, line in read.items() if register not in written]


def lint(call):
    """Compile the kernels that `call` launches; {kernel name: suspicious lines}."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
    result = {}
    launch = JITFunction.run

    def compile_only(self, *args, grid=None, warmup=False, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            listing = [tool, "-c", file.name]
            sass = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
        result.setdefault(self.__name__, []).extend(findings(sass))

    with mock.patch.object(JITFunction, "run", compile_only):
        driver.set_active(NoDevice())
        call()
    return result


def launch_ssd(P, N, H, tokens=2400, sequences=12):
    """Forward and backward in every precision, alone and inside the mixer's operation."""
    for precision, dtype in DTYPES.items():
        with fp32_products(precision):
            launch_ssd_of(dtype, P, N, H, tokens, sequences)


def launch_ssd_of(dtype, P, N, H, tokens, sequences):
    from modules.kernels import mixer, ssd

    x = torch.empty(tokens, H, P, dtype=dtype)
    B = torch.empty(tokens, N, dtype=dtype)
    dt, A = torch.empty(tokens, H), torch.empty(H)
    offsets = torch.zeros(sequences + 1, dtype=torch.int64)
    _, _, state = ssd.ssd_op._init_fn(x, dt, A, B, B, A, offsets, False)
    ssd.ssd_backward_op._init_fn(x, None, state, x, dt, A, B, B, A, offsets)

    E, M = H * P, H * P + 2 * N
    y, convolved = (torch.empty(tokens, columns, dtype=dtype) for columns in (E, M))

    def projected(columns):  # as by `project_aligned`
        return torch.empty(tokens, whole_rows(columns, dtype, 64), dtype=dtype)[:, :columns]

    position = torch.zeros(tokens, dtype=torch.int64)
    conv = (torch.empty(M, 4), torch.empty(M))
    last = torch.empty(sequences, E, dtype=dtype)
    for mirror, options in [(None, (0.0, False, 1e-5)), (position, (0.1, False, 1e-5))]:
        norm = torch.empty(E)
        inputs = (
            projected(E + M + H), *conv, A, A, A, norm, offsets, position, mirror, *options
        )  # fmt: skip
        mixer.mixer_core_op._init_fn(*inputs)
        kept = [convolved, y, state] * (1 if mirror is None else 2)
        mixer.mixer_core_backward_op._init_fn(y, kept, *inputs)
        inputs = (projected(M + H), *conv, A, A, A, offsets, position, mirror, E)
        mixer.mixer_last_op._init_fn(*inputs)
        dr = None if mirror is None else last
        mixer.mixer_last_backward_op._init_fn(last, dr, convolved, convolved, *inputs)


def launch_softmax(D, positions=2400, candidates=3001):
    """Forward and backward in every precision, with and without hits, places and repeats."""
    from modules.kernels import softmax

    value_N, bias_C = torch.empty(positions), torch.empty(candidates)
    ids_N, ids_C = (torch.zeros(n, dtype=torch.int64) for n in (positions, candidates))
    held = torch.empty(9, 128 * -(-candidates // 128), dtype=torch.int32)[:, :candidates]
    repeats = (held, ids_N, ids_N.int(), value_N)
    some = [(None, None, None), (None, None, ids_N), (ids_C, ids_N, None)]
    kinds = itertools.product(DTYPES.items(), some, [(None,) * 4, repeats])
    for (precision, dtype), ids, more in kinds:
        h, c = (torch.empty(n, D, dtype=dtype) for n in (positions, candidates))
        inputs = (h, c, bias_C, *ids, *more)
        with fp32_products(precision):
            for keep in (True, False):
                outputs = softmax.candidate_logsumexp_op._init_fn(*inputs, keep)
                softmax.candidate_logsumexp_backward_op._init_fn(
                    value_N, value_N, *inputs, *outputs
                )


if __name__ == "__main__":
    for shape in sys.argv[1:] or ["64,64,8", "16,64,32", "256"]:
        numbers = [int(number) for number in shape.split(",")]
        launches = launch_softmax if len(numbers) == 1 else launch_ssd
        result = lint(functools.partial(launches, *numbers))
        suspicious = {name: lines[:2] for name, lines in result.items() if lines}
        print(shape, len(result), "kernels", suspicious or "clean", flush=True)
