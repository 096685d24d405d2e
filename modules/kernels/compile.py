"""Compiling the kernels of a call side by side, before it runs.

Triton compiles a kernel at its first launch, one after the other: the two dozen of a training step
took 22 s of a fresh process with a cold cache. LLVM, ptxas and the C compiler leave Python free, so
threads compile as many at a time as there are cores. Triton's front end does not, so several
processes take shares.
"""

from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from triton.runtime._async_compile import AsyncCompileMode, active_mode
from triton.runtime.jit import JITFunction

from data.cores import cores


class Share(NamedTuple):
    """One in `of` of the distinct kernels of a call, in the order of their first launches, from
    place `number` on. Those that the process has already do not count."""

    number: int
    of: int


ALL = Share(0, 1)


class _ShareMode(AsyncCompileMode):
    """Compiles a share, and skips the other kernels."""

    def __init__(self, executor: Executor, share: Share) -> None:
        super().__init__(executor)
        self._share = share
        self._places: dict[str, int] = {}

    def submit(
        self, key: str, compile_fn: Callable[[], Any], finalize_fn: Callable[[Any], None]
    ) -> Any:
        place = self._places.setdefault(key, len(self._places))
        if place % self._share.of == self._share.number:
            return super().submit(key, partial(_with_launcher, compile_fn), finalize_fn)
        return None


def _with_launcher(compile_fn: Callable[[], Any]) -> Any:
    """The compiled kernel with its launcher, C that Triton else compiles at the first launch."""
    kernel = compile_fn()
    kernel.run  # noqa: B018
    return kernel


def compile_ahead(
    call: Callable[[], object], share: Share = ALL, threads: int | None = None
) -> None:
    """Compile a share of the kernels that `call` launches, launching none of them.

    `call` runs once, with whatever is in the memory that those kernels would have written: it must
    not branch on values or use them as indices, and its results mean nothing. Kernels may also be
    launched in autograd's own threads. threads: by default as many as there are cores.
    """
    launch = JITFunction.run
    on_device = None  # a thread begins at the first one
    if torch.cuda.is_available():
        on_device = partial(torch.cuda.set_device, torch.cuda.current_device())
    with ThreadPoolExecutor(threads or cores(), initializer=on_device) as executor:
        together = _ShareMode(executor, share)

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
