"""A GPU worker's parts of the fingerprint: everything but the request that its output bits may depend on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import triton

from sempre.kernels.gpu_jit import architecture
from sempre.workers.fingerprint import quantization_profile
from sempre.workers.loading import WeightFacts

# order of operations of the GPU kernels, by dtype; a change of any result's bits raises the number
PROFILES = {torch.bfloat16: "cuda-bf16-1", torch.float16: "cuda-fp16-1", torch.float32: "cuda-fp32-1"}
_DRIVER_FILE = Path("/sys/module/nvidia/version")


def fingerprint_parts(
    weights: WeightFacts, numerics: str, device: torch.device, excluded: dict[str, list[str]]
) -> dict[str, str]:
    """Named parts; equal parts, seeds and requests give equal bits. `excluded`: matmul kernels left out, by shape."""
    without = "; ".join(f"{shape}: {','.join(names)}" for shape, names in excluded.items())
    return {
        "weights": weights.digest,
        "dtype": str(weights.dtype).removeprefix("torch."),
        "quantization": quantization_profile(weights),
        "numerics": PROFILES[weights.dtype] if numerics == "invariant" else numerics,
        "device": torch.cuda.get_device_name(device),
        "architecture": architecture(device),
        "kernels": f"without {without}" if without else "all",
        "driver": driver_version(),
        "cuda": str(torch.version.cuda),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def driver_version() -> str:
    """As the kernel module reports it, else the CUDA version it supports."""
    if _DRIVER_FILE.exists():
        return _DRIVER_FILE.read_text().strip()
    return f"cuda {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
