"""How the GPU kernels are compiled: Triton, without fused multiply-adds of the compiler's own choice.

Imported only by the GPU modules, so that a machine without Triton can use the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

Kernel = Callable[..., Any]

# whether a product and a sum become one rounding or two must not depend on the tile around them
EXACT = {"enable_fp_fusion": False}

_only_compiling: ContextVar[bool] = ContextVar("only_compiling", default=False)


class _Kernel(triton.JITFunction):  # type: ignore[misc]
    """A Triton kernel whose launches, inside `only_compiling`, compile it and launch nothing."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return super().run(*args, grid=grid, warmup=warmup or _only_compiling.get(), **options)


def jit(*, runtime: tuple[str, ...] = ()) -> Callable[[Kernel], Any]:
    """Decorator: a Triton kernel. Arguments named in `runtime` never select another compiled variant."""

    def decorate(function: Kernel) -> Any:
        # the compiler evaluates the annotations of arguments, and lets them name constants only
        function.__globals__["Any"] = tl.constexpr(None)
        if triton.knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=list(runtime))
        return _Kernel(function, do_not_specialize=list(runtime))

    return decorate


@contextmanager
def only_compiling(device: torch.device, num_threads: int) -> Iterator[None]:
    """Inside, in the calling thread, a kernel that is launched is compiled and loaded in the background instead.

    Leaving waits for all of them, and raises the first error of a compilation. Compilation releases the interpreter's
    lock for most of its time, so threads do.
    """
    with ThreadPoolExecutor(num_threads, initializer=torch.cuda.set_device, initargs=(device,)) as threads:
        reset = _only_compiling.set(True)
        try:
            with triton.AsyncCompileMode(_Loading(threads)):
                yield
        finally:
            _only_compiling.reset(reset)


class _Loading(Executor):
    """Compiles kernels in `threads`, and loads each there too: that builds its launcher and takes as long again."""

    def __init__(self, threads: ThreadPoolExecutor) -> None:
        self._threads = threads

    def submit(self, compile_kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def load() -> Any:
            kernel = compile_kernel(*args, **kwargs)
            # reading the property loads the binary
            assert kernel.run is not None
            return kernel

        return self._threads.submit(load)


@cache
def architecture(device: torch.device) -> str:
    """`sm_90` and the like; "any" where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
