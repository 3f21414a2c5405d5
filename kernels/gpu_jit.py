"""How the GPU kernels are compiled: Triton, without fused multiply-adds chosen by the compiler.

Imported only by the GPU modules, so that a machine without Triton can use the CPU kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from sempre.kernels.gpu_cache import CheckedCache

Kernel = Callable[..., Any]

# also for what Triton keeps beside kernels: the modules that launch them
triton.knobs.cache.manager_class = CheckedCache


def _target_arch() -> int:
    """90 for a GPU of compute capability 9.0; 0 without CUDA."""
    try:
        target = driver.active.get_current_target()
    except RuntimeError:  # no driver: the interpreter
        return 0
    return int(target.arch) if target.backend == "cuda" else 0


# whether kernels may be launched before the previous one has ended
CHAINS = tl.constexpr(_target_arch() >= 90)
# whether groups of warps give the tensor cores their operands (`wgmma`)
WARP_GROUPS = tl.constexpr(_target_arch() == 90)
# whether a multiply and an add are rounded once or twice must not depend on the tile around them
EXACT: dict[str, Any] = {"enable_fp_fusion": False}
# for kernels that call `wait_for_previous` before they touch what other kernels read or write
CHAINED: dict[str, Any] = EXACT | ({"launch_pdl": True} if CHAINS.value else {})

_collection: ContextVar[Collection | None] = ContextVar("collection", default=None)


class _Kernel(triton.JITFunction):  # type: ignore[misc]
    """A Triton kernel whose launches, inside `collecting`, are only recorded."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        collection = _collection.get()
        compiled = super().run(*args, grid=grid, warmup=warmup or collection is not None, **options)
        if collection is not None and compiled is not None:
            collection.complete = False
        return compiled

    @property
    def cache_key(self) -> str:
        """Covers the source and everything it calls. Callees come first: Triton includes a called function's globals
        only if it has seen the function before, and the key would depend on what else was launched."""
        if self.hash is None:
            for callee in self._callees():
                assert callee.cache_key
        return str(super().cache_key)

    def _callees(self) -> Iterator[_Kernel]:
        names = self.fn.__code__.co_names
        for value in [self.__globals__.get(name) for name in names]:
            members = [getattr(value, name, None) for name in names] if isinstance(value, ModuleType) else [value]
            yield from (member for member in members if isinstance(member, _Kernel))


@dataclass(frozen=True)
class Variant:
    """One kernel for one set of types, constants and options: what a launch compiles."""

    kernel: Any
    specialization: str
    """JSON, as Triton writes it"""

    def is_on_disk(self) -> bool:
        """Whether Triton's cache folder has it."""
        with _Lookup() as lookup:
            self.kernel.preload(self.specialization)
        folder = get_cache_manager(sha256(lookup.key.encode()).hexdigest())
        return folder.get_group(f"{self.kernel.__name__[:150]}.json") is not None

    def load(self) -> None:
        """Onto the device, from Triton's cache folder; what that lacks is compiled."""
        # reading the property loads the binary
        assert self.kernel.preload(self.specialization).run is not None

    def describe(self) -> str:
        """One line, from which `from_description` rebuilds it in another process."""
        return json.dumps([self.kernel.module, self.kernel.fn.__qualname__, self.specialization])

    @classmethod
    def from_description(cls, description: str) -> Variant:
        module, name, specialization = json.loads(description)
        return cls(getattr(import_module(module), name), specialization)


class _Lookup(triton.AsyncCompileMode):  # type: ignore[misc]
    """Inside, kernels are not compiled; only their keys in the cache folder are kept."""

    key: str

    def __init__(self) -> None:
        super().__init__(executor=None)

    def submit(self, key: str, *_: Any) -> None:
        self.key = key


def compile_described(description: str, *, launcher: bool) -> None:
    """Compile a variant, for the active driver's target, into Triton's cache folder; no GPU is needed.

    `launcher` also builds the C module that launches it, which needs the library of the CUDA driver.
    """
    variant = Variant.from_description(description)
    compiled = variant.kernel.preload(variant.specialization)
    if launcher:
        driver.active.launcher_cls(compiled.src, compiled.metadata)


@dataclass
class Collection:
    """Variants that launches inside `collecting` lacked."""

    variants: list[Variant]
    complete: bool = True
    """False when some variants are missing because this process has launched them before"""


@contextmanager
def collecting(found: Callable[[Variant], object] = lambda variant: None) -> Iterator[Collection]:
    """Inside, in the calling thread, launches run nothing; `found` is called once with each variant they lack."""
    known: set[str] = set()

    def note(*, fn: Any, compile: dict[str, Any], **others: Any) -> bool | None:
        current = _collection.get()
        if current is None:
            return previous(fn=fn, compile=compile, **others) if previous is not None else None
        specialization = compile["specialization_data"]
        if specialization not in known:
            known.add(specialization)
            current.variants.append(Variant(fn.jit_function, specialization))
            found(current.variants[-1])
        return True  # not to be compiled

    knobs = triton.knobs.runtime
    previous, knobs.jit_cache_hook = knobs.jit_cache_hook, note
    collection = Collection([])
    reset = _collection.set(collection)
    try:
        yield collection
    finally:
        _collection.reset(reset)
        knobs.jit_cache_hook = previous


def jit(*, runtime: tuple[str, ...] = ()) -> Callable[[Kernel], Any]:
    """Decorator: a Triton kernel. Arguments named in `runtime` never select another compiled variant."""

    def decorate(function: Kernel) -> Any:
        # the compiler evaluates the annotations of arguments, and lets them name constants only
        function.__globals__["Any"] = tl.constexpr(None)
        if triton.knobs.runtime.interpret:
            return triton.jit(function, do_not_specialize=list(runtime))
        return _Kernel(function, do_not_specialize=list(runtime))

    return decorate


class _GluonKernel(_Kernel, GluonJITFunction):  # type: ignore[misc]
    """A kernel in Gluon, Triton's language of layouts and warps."""


def gluon_jit(*, runtime: tuple[str, ...] = ()) -> Callable[[Kernel], Any]:
    """As `jit`, of a kernel in Gluon; there is no interpreter for them."""

    def decorate(function: Kernel) -> Any:
        function.__globals__["Any"] = tl.constexpr(None)
        return _GluonKernel(function, do_not_specialize=list(runtime))

    return decorate


@jit()
def wait_for_previous() -> None:
    """Wait until the previous kernel has ended, and let the next one start alongside this one.

    Programmatic dependent launch. Every program of a kernel launched with CHAINED calls it, before any early return:
    then at most two kernels overlap, and the output of the one before the previous may be read before the call.
    """
    if CHAINS:
        gdc_wait()
        gdc_launch_dependents()


@jit()
def wait_for_tensor_cores() -> None:
    """Wait until the instructions of warp groups have ended.

    They read operands in registers while other instructions run. In a loop whose operands are computed, the next step
    would else write them to registers that the last step's are still read from.
    """
    if WARP_GROUPS:
        tl.inline_asm_elementwise(
            "wgmma.wait_group.sync.aligned 0; mov.u32 $0, 0;", "=r,r", [tl.zeros([1], tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@jit()
def prefetch(addresses: Any) -> None:
    """Bring the lines at `addresses` (a tensor of pointers) to the L2 cache; before `wait_for_previous`."""
    if CHAINS:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses.to(tl.int64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@cache
def architecture(device: torch.device) -> str:
    """`sm_90` and the like; "any" where there is no GPU (the interpreter)."""
    if device.type != "cuda":
        return "any"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
