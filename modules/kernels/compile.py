"""Compiling the kernels of a call side by side, before it runs.

Triton compiles a kernel at its first launch, one after the other: the two dozen of a training step
took 22 s of a fresh process with a cold cache. LLVM and ptxas leave Python free, so threads compile
as many at a time as there are cores.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction


def compile_ahead(call: Callable[[], object]) -> None:
    """Compile every kernel that `call` launches, launching none of them.

    `call` runs once, with whatever is in the memory that those kernels would have written: it must
    not branch on values or use them as indices, and its results mean nothing. Kernels may also be
    launched in autograd's own threads.
    """
    launch = JITFunction.run
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        together = AsyncCompileMode(executor)

        def compile_only(
            self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any
        ) -> Any:
            token = active_mode.set(together)
            try:
                return launch(self, *args, grid=grid, warmup=True, **options)
            finally:
                active_mode.reset(token)

        JITFunction.run = compile_only
        try:
            call()
        finally:
            JITFunction.run = launch
        for kernel in together.future_kernels.values():
            kernel.result()
