"""Which backend serves which device."""

from __future__ import annotations

import torch

from sempre.workers.backend import Backend
from sempre.workers.gpu.compiler_process import CompilerProcess


def make_backend(device: torch.device, compiler: CompilerProcess | None = None) -> Backend:
    """The backend of a resolved device; `compiler`, if one was started early, is for a GPU."""
    if device.type == "cpu":
        if compiler is not None:
            compiler.close()
        from sempre.workers.cpu.backend import CpuBackend

        return CpuBackend()
    from sempre.workers.gpu.backend import GpuBackend

    return GpuBackend(device, compiler)
