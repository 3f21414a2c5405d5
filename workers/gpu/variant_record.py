"""Remembers, in Triton's cache folder, which kernel variants a model needs: later starts need not collect them.

A record is a saving only: what it should lack is compiled when it first runs, and one that cannot be read is collected
anew. Its name is a digest of all that decides which variants are collected.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.runtime.cache import get_cache_manager

from sempre import kernels, workers
from sempre.kernels.gpu_jit import Variant
from sempre.workers.backend import ModelOutline

logger = logging.getLogger(__name__)

_FILE = "variants"
# the settings that decide which variants a model of some limits needs
_RELEVANT = ("dtype", "numerics", "quantization")


def record_key(outline: ModelOutline, gpu: str) -> str:
    """The name of the record of this model, with these settings, on this kind of GPU, for this code."""
    facts = (
        torch.__version__,
        triton.__version__,
        gpu,
        outline.spec,
        outline.max_model_len,
        outline.block_size,
        outline.max_num_batched_tokens,
        outline.max_num_seqs,
        [getattr(outline.config, name) for name in _RELEVANT],
    )
    digest = hashlib.sha256(repr(facts).encode())
    for name, source in _sources():
        digest.update(f"\n{name}\n".encode() + source)
    return digest.hexdigest()


def _sources() -> Iterator[tuple[str, bytes]]:
    """The kernels', and of all that launches them."""
    for package in (kernels, workers):
        for root in map(Path, package.__path__):
            for path in sorted(root.rglob("*.py")):
                yield path.relative_to(root).as_posix(), path.read_bytes()


def read_record(key: str) -> list[Variant] | None:
    """None when there is none, or none that can be read."""
    path = get_cache_manager(key).get_file(_FILE)
    if path is None:
        return None
    digest, _, lines = Path(path).read_text(errors="replace").partition("\n")
    if digest != _digest(lines):
        return None
    return [Variant.from_description(line) for line in lines.splitlines()]


def write_record(key: str, variants: Sequence[Variant]) -> None:
    """Whole, or not at all."""
    lines = "\n".join(variant.describe() for variant in variants)
    try:
        get_cache_manager(key).put(f"{_digest(lines)}\n{lines}", _FILE, binary=False)
    except OSError as error:
        logger.warning("the next start takes longer, its kernels' record cannot be written: %s", error)


def _digest(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
