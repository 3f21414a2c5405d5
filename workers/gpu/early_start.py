"""What a GPU worker starts before it imports torch, which takes seconds.

That is the CUDA context, Triton's digest of itself and, where no kernel was ever compiled, the compiler process.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from sempre.workers.gpu.compiler_process import CompilerProcess

_CUDA_LIBRARY = "lib/libtorch_cuda.so"


def early_start(device: str, index: int) -> CompilerProcess | None:
    """Start, unless `device` is "cpu" or the driver or PyTorch lacks CUDA. Errors are left for torch to report."""
    if device == "cpu" or not _torch_has_cuda():
        return None
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    # the driver call releases the interpreter's lock
    Thread(target=_make_context, args=(cuda, index), name="context", daemon=True).start()
    try:
        import triton
        from triton.runtime.cache import triton_key
    except ImportError:
        return None
    Thread(target=triton_key, name="triton-key", daemon=True).start()
    folder = Path(triton.knobs.cache.dir)
    return None if folder.is_dir() and any(folder.iterdir()) else CompilerProcess()


def _torch_has_cuda() -> bool:
    found = find_spec("torch")
    return found is not None and found.origin is not None and (Path(found.origin).parent / _CUDA_LIBRARY).exists()


def _make_context(cuda: ctypes.CDLL, index: int) -> None:
    """The primary context of the GPU with this index, which torch takes over; kept until the process ends."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), index) == 0:
        cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
