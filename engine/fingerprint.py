"""One short name for everything, besides seed and request, that an output depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from sempre.engine.version import __version__

DIGEST_LENGTH = 16

# parts that no bit depends on, as tests show: they are told, and are not in the digest
ENVIRONMENT = ("graphs", "threads")


def fingerprint_parts(worker_parts: Mapping[str, str]) -> dict[str, str]:
    """Return the workers' parts and the engine version, sorted by name.

    Workers name weights content, dtype, numerics profile, threads, architecture and library versions.
    """
    return dict(sorted({**worker_parts, "engine": __version__}.items()))


def fingerprint_digest(parts: Mapping[str, str]) -> str:
    """Return the first 16 hex digits of the SHA-256 over the sorted parts but ENVIRONMENT as compact JSON (UTF-8)."""
    deciding = {name: value for name, value in parts.items() if name not in ENVIRONMENT}
    canonical = json.dumps(deciding, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:DIGEST_LENGTH]
