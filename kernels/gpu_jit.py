"""How the GPU kernels are compiled: Triton, without fused multiply-adds of the compiler's own choice.

Imported only by the GPU modules, so that a machine without Triton can use the CPU kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

Kernel = Callable[..., Any]


def _can_chain() -> bool:
    """Whether kernels may be launched before the one in front of them has ended (compute capability 9 and above)."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


CHAINS = tl.constexpr(_can_chain())
# whether a product and a sum become one rounding or two must not depend on the tile around them
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
# for kernels that call `wait_for_previous` before they read or write what other kernels do
CHAINED: dict[str, Any] = EXACT | ({"launch_pdl": True} if CHAINS.value else {})

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


@jit()
def wait_for_previous() -> None:
    """Wait until the kernel before this one has ended, and let the next one get ready beside this one.

    Programmatic dependent launch. Every program of a kernel launched with CHAINED calls it, before any early return:
    then at most two kernels overlap, and what the last but one wrote may be read before the call.
    """
    if CHAINS:
        gdc_wait()
        gdc_launch_dependents()


@jit()
def prefetch(addresses: Any) -> None:
    """Bring the lines at `addresses` (a tensor of pointers) to the L2 cache; before `wait_for_previous`."""
    if CHAINS:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


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
        # CPython tells libraries apart by inode, and one of two that are built at once replaces the other's file
        self._loading = Lock()

    def submit(self, compile_kernel: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        def load() -> Any:
            kernel = compile_kernel(*args, **kwargs)
            with self._loading:
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
