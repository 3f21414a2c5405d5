"""`sempre collect-env`."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from sempre.engine.version import __version__

_LIBRARIES = (
    "torch",
    "numpy",
    "numba",
    "llvmlite",
    "msgspec",
    "pyzmq",
    "safetensors",
    "tokenizers",
    "jinja2",
    "tqdm",
    "huggingface_hub",
    "gguf",
    "transformers",
)
_VARIABLE_PREFIXES = ("SEMPRE_", "OMP_", "MKL_", "NUMBA_", "HF_", "CUDA_VISIBLE_DEVICES")
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_VECTOR_FLAGS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(namespace: argparse.Namespace) -> int:
    """Print facts for a bug report. Imports nothing heavy."""
    facts = collect()
    if namespace.json:
        print(json.dumps(facts, ensure_ascii=False))
        return 0
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0


def collect() -> dict[str, str]:
    """Return the facts by name."""
    from sempre.engine.models.cache import cache_folder

    cpu = _cpu_info()
    facts = {
        "sempre": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        **{f"library {name}": _library_version(name) for name in _LIBRARIES},
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu extensions": " ".join(flag for flag in _VECTOR_FLAGS if flag in cpu.get("flags", "").split()),
        "usable cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}",
        "memory": _memory(),
        "cache folder": str(cache_folder()),
    }
    for name, value in sorted(os.environ.items()):
        if name.startswith(_VARIABLE_PREFIXES):
            hidden = any(word in name for word in _SECRETS)
            facts[f"variable {name}"] = "(set)" if hidden else value
    return facts


def _library_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu_info() -> dict[str, str]:
    """Return the first core's entries of /proc/cpuinfo; `flags` on every architecture."""
    entries: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        entries.setdefault("flags" if name.strip() == "Features" else name.strip(), value.strip())
    return entries


def _memory() -> str:
    sizes = {}
    for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) * 1024
    return f"{sizes['MemTotal'] / 2**30:.1f} GiB, {sizes['MemAvailable'] / 2**30:.1f} GiB available"
