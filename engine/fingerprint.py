"""What outputs depend on apart from seed and request, in two parts: bits, which are digested, and the environment.

*Bits* are all values that may decide a bit: weights, dtype, architecture, the libraries that compute, and the numerics
version, whose number rises when a golden digest changes, and only then (`numerics_versions`). *Environment* are facts
worth knowing that decide none, as tests show: the golden digests hold for every version of Python, for every version of
this package with the same numerics version, and on every card of one architecture; the tests of invariance for any
number of threads and with or without CUDA graphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from sempre.engine.version import __version__

DIGEST_LENGTH = 16
ENVIRONMENT = ("device", "engine", "graphs", "python", "threads")
"""Parts that are named and not digested."""


def fingerprint_bits(worker_parts: Mapping[str, str]) -> dict[str, str]:
    """Return the parts that decide bits, sorted by name; earlier receipts have the engine's version among them."""
    return {name: value for name, value in sorted(worker_parts.items()) if name not in ENVIRONMENT}


def fingerprint_environment(worker_parts: Mapping[str, str]) -> dict[str, str]:
    """Return the parts that decide no bit, sorted by name: some of the workers', and the engine's version."""
    parts = {**worker_parts, "engine": __version__}
    return {name: parts[name] for name in ENVIRONMENT if name in parts}


def fingerprint_digest(bits: Mapping[str, str]) -> str:
    """Return the first 16 hex digits of SHA-256 over `bits`, sorted by name, as compact JSON (UTF-8)."""
    canonical = json.dumps(bits, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_LENGTH]


def fingerprint_with_adapter(bits: Mapping[str, str], adapter: str | None) -> str:
    """Return the fingerprint of outputs with the adapter of this digest; None: of the model itself."""
    return fingerprint_digest(bits if adapter is None else {**bits, "adapter": adapter})


def fingerprint_differences(a: Mapping[str, str], b: Mapping[str, str]) -> list[str]:
    """Return a phrase for each part that differs, sorted by name: `dtype: float32 against bfloat16`."""
    names = sorted({*a, *b})
    return [f"{name}: {_shown(a, name)} against {_shown(b, name)}" for name in names if a.get(name) != b.get(name)]


def _shown(parts: Mapping[str, str], name: str) -> str:
    return parts.get(name, "absent")
