"""Process-wide settings a worker needs while it computes in the user's process (multiprocessing off).

A worker's own process has them from its start. In the user's, each is set when the worker is entered and restored when
it is left, so that neither side notices the other.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch._C._functorch import peek_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from sempre.kernels.threads import get_num_threads, set_num_threads

# of the C math library, which Python has already loaded
_MATH = ctypes.CDLL(None)
_TO_NEAREST = 0
_DENORMAL = np.float32(1e-45)
_ONE = np.float32(1.0)


class ComputeState:
    """The state in which the workers of a process compute; they may change their numbers of threads."""

    def __init__(self) -> None:
        self._threads: tuple[int, int | None] | None = None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Inside, floating-point arithmetic, autograd, modes and threads are as in a worker's own process."""
        with ExitStack() as stack:
            _leave_modes(stack)
            # tensors made in inference mode could not be written outside, and we are called from both
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(np.errstate(all="ignore"))
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            rounding = _MATH.fegetround()
            if rounding != _TO_NEAREST:
                _MATH.fesetround(_TO_NEAREST)
                stack.callback(_MATH.fesetround, rounding)
            if _DENORMAL * _ONE == 0:
                torch.set_flush_denormal(False)
                stack.callback(torch.set_flush_denormal, True)
            before = _threads()
            if self._threads is not None:
                _use_threads(self._threads)
            try:
                yield
            finally:
                self._threads = _threads()
                _use_threads(before)


def _leave_modes(stack: ExitStack) -> None:
    """Leave whatever intercepts torch calls (modes, transforms of torch.func) until `stack` is closed.

    A mode that only watches would see our tensors; a fake one has none whose memory a kernel could read.
    """
    # first: the calls below would be intercepted by such a mode, too
    if torch._C._len_torch_function_stack():
        stack.enter_context(torch._C.DisableTorchFunction())
    if peek_interpreter_stack() is not None:
        stack.enter_context(temporarily_clear_interpreter_stack())
    if _get_current_dispatch_mode_stack():
        stack.enter_context(_disable_current_modes())


def _threads() -> tuple[int, int | None]:
    """torch's number of threads, and the CPU kernels' once those are in use."""
    return torch.get_num_threads(), get_num_threads() if "numba" in sys.modules else None


def _use_threads(counts: tuple[int, int | None]) -> None:
    ours, kernels = counts
    if torch.get_num_threads() != ours:
        torch.set_num_threads(ours)
    if kernels is not None and get_num_threads() != kernels:
        set_num_threads(kernels)
