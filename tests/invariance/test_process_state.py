"""In the user's process, no state of that process changes a bit, and each is left as it was found."""

from __future__ import annotations

import ctypes
import decimal
import locale
import os
import platform
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from surfaces import facts
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from sempre.engine import LLM, SamplingParams

MATH = ctypes.CDLL(None)
UPWARD = 0x400000 if platform.machine() in ("aarch64", "arm64") else 0x800
SETTINGS: dict[str, Any] = {"model": "tiny", "multiprocessing": False, "num_threads": 1, "max_model_len": 64}
PROMPTS = ["It was a dark and stormy night, and the", "Call me"]
PARAMS = SamplingParams(temperature=0.9, seed=7, max_tokens=12, logprobs=2, repetition_penalty=1.2, ignore_eos=True)


@contextmanager
def swapped(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    with torch.device(name):
        yield


@contextmanager
def elsewhere() -> Iterator[None]:
    before = Path.cwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def low_precision_decimals() -> Iterator[None]:
    with decimal.localcontext() as context:
        context.prec = 3
        context.traps[decimal.Inexact] = True
        yield


def zeros_for(result: Any) -> Any:
    """A mode that intercepts our calls and changes every result."""
    is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
    return torch.zeros(result.shape, dtype=result.dtype) if is_float else result


class DispatchMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return zeros_for(func(*args, **(kwargs or {})))


class FunctionMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return zeros_for(func(*args, **(kwargs or {})))


@contextmanager
def transform(name: str, *arguments: object) -> Iterator[None]:
    """Inside a transform of torch.func, like a function called under vmap or grad."""
    getattr(torch._C._functorch, f"_{name}_increment_nesting")(*arguments)
    try:
        yield
    finally:
        getattr(torch._C._functorch, f"_{name}_decrement_nesting")()


def ignored_signals() -> Any:
    return swapped(lambda: signal.getsignal(signal.SIGUSR1), lambda h: signal.signal(signal.SIGUSR1, h), signal.SIG_IGN)


STATES: dict[str, Callable[[], Any]] = {
    "default dtype float64": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": lambda: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "default device meta": lambda: default_device("meta"),
    "flush-denormal": flushing,
    "rounding upward": lambda: swapped(MATH.fegetround, MATH.fesetround, UPWARD),
    "numpy raises": lambda: np.errstate(all="raise"),
    "inference mode": torch.inference_mode,
    "grad mode": lambda: torch.set_grad_enabled(True),
    "no grad": torch.no_grad,
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "deterministic algorithms": lambda: swapped(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "torch threads": lambda: swapped(torch.get_num_threads, torch.set_num_threads, 2),
    "numba threads": lambda: swapped(numba.get_num_threads, numba.set_num_threads, 2),
    "matmul precision": lambda: swapped(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "warnings are errors": strict_warnings,
    "decimal context": low_precision_decimals,
    "working directory": elsewhere,
    "signal handler": ignored_signals,
    "switch interval": lambda: swapped(sys.getswitchinterval, sys.setswitchinterval, 0.5),
    "fake tensors": FakeTensorMode,
    "dispatch mode": DispatchMode,
    "function mode": FunctionMode,
    "vmap": lambda: transform("vmap", 3, "error"),
    "grad transform": lambda: transform("grad"),
    "functionalization": lambda: transform("func", True),
    "forward-mode differentiation": torch.autograd.forward_ad.dual_level,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "recursion limit": lambda: swapped(sys.getrecursionlimit, sys.setrecursionlimit, 400),
}


def state() -> dict[str, Any]:
    """The process state an engine could disturb; the global random generators are its own (see the README)."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "subnormals": float(np.float32(1e-45) * np.float32(1.0)),
        "rounding": MATH.fegetround(),
        "numpy": np.geterr(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "function modes": torch._C._len_torch_function_stack(),
        "transforms": torch._C._functorch.maybe_current_level(),
        "torch threads": torch.get_num_threads(),
        "numba threads": numba.get_num_threads(),
        "matmul": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "decimal": repr(decimal.getcontext()),
        "directory": os.getcwd(),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "locale": locale.setlocale(locale.LC_ALL),
        "environment": dict(os.environ),
    }


def results(llm: LLM) -> list[Any]:
    return [facts(output.outputs[0]) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@cache
def ordinary() -> list[Any]:
    with LLM(**SETTINGS) as llm:
        return results(llm)


@pytest.mark.parametrize("name", STATES)
def test_a_state_changes_no_bit_and_is_left_as_found(name: str) -> None:
    expected = ordinary()
    with STATES[name]():
        before = state()
        with LLM(**SETTINGS) as llm:
            assert state() == before, "changed by the start"
            assert results(llm) == expected, "set before the engine was made"
            assert state() == before, "changed by a generation"
        assert state() == before, "changed by the end"


def test_a_state_set_later_or_left_changes_no_bit() -> None:
    """One engine, created in each state that changes new tensors, used in all of them."""
    expected = ordinary()
    for made_in in ("inference mode", "default device meta", "no grad", "fake tensors", "vmap"):
        with STATES[made_in]():
            llm = LLM(**SETTINGS)
        with llm:
            assert results(llm) == expected, f"left {made_in}"
            for name, enter in STATES.items():
                with enter():
                    before = state()
                    assert results(llm) == expected, f"{name}, set after the engine was made in {made_in}"
                    assert state() == before


def test_control_another_seed_is_noticed() -> None:
    with LLM(**SETTINGS) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        random.seed(1)  # read by nothing that decides a result
        assert [facts(output.outputs[0]) for output in outputs] == ordinary()
        other = SamplingParams(temperature=0.9, seed=8, max_tokens=12, logprobs=2, ignore_eos=True)
        assert [facts(o.outputs[0]) for o in llm.generate(PROMPTS, other, use_tqdm=False)] != ordinary()
