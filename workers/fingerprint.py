"""The worker's parts of the fingerprint: everything but the request that its output bits may depend on."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import torch

from sempre.ipc.config import WorkerConfig
from sempre.kernels.threads import get_num_threads
from sempre.workers.loading import WeightFacts

# names the order of operations of the CPU kernels; a change of any result's bits raises the number
CPU_PROFILE = "cpu-fma-3"

# vector extensions that code generation may use, widest first
_VECTOR_LEVELS = ("avx512f", "avx2", "avx", "asimd")


def setting_parts(config: WorkerConfig) -> dict[str, str]:
    """Parts by settings; the mode of log-probabilities and the dtype of the KV cache only where they are not the
    default. A quantised cache has the number of its order of operations, as a scheme of quantisation has."""
    mode = {} if config.logprobs_mode == "raw_logprobs" else {"logprobs_mode": config.logprobs_mode}
    cache = {} if config.kv_cache_dtype == "auto" else {"kv_cache": f"{config.kv_cache_dtype}-1"}
    return {"numerics_profile": config.profile, **mode, **cache}


def fingerprint_parts(weights: WeightFacts, numerics: str) -> dict[str, str]:
    """Named parts; equal parts, seeds and requests give equal bits."""
    # imported here: a GPU worker shares this module but does not need them
    import llvmlite
    import numba

    return {
        "weights": weights.digest,
        "dtype": _name(weights.dtype),
        "storage": _name(weights.matrix_dtype),
        "quantization": quantization_profile(weights),
        "numerics": CPU_PROFILE if numerics == "invariant" else numerics,
        "threads": str(get_num_threads()),
        "architecture": cpu_architecture(),
        "torch": str(torch.__version__),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "numpy": np.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def quantization_profile(weights: WeightFacts) -> str:
    """The scheme, with the number of its order of operations, which any change of a result's bits raises."""
    return "none" if weights.quantization is None else f"{weights.quantization.value}-1"


def cpu_architecture() -> str:
    """Machine and widest vector extension, for example `x86_64-avx512f`."""
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.lower().startswith(("flags", "features")):
            flags = set(line.split(":", 1)[1].split())
            break
    level = next((name for name in _VECTOR_LEVELS if name in flags), "")
    return f"{platform.machine()}-{level}" if level else platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
