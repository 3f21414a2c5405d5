"""An index, in Triton's cache folder, of the kernel variants a model needs, so that later starts need not collect them.

It only saves time: a variant it lacks is compiled when it first runs, and an unreadable index is collected again. Its
name is a digest of everything that decides which variants are collected.
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
from sempre.workers.backend import ModelSetup

logger = logging.getLogger(__name__)

_FILE = "variants"
# the settings that decide which variants a model with given limits needs
_RELEVANT = ("dtype", "numerics", "quantization", "enable_lora", "max_loras", "max_lora_rank", "logprobs_mode")


def index_key(setup: ModelSetup, gpu: str) -> str:
    """The name of the index for this model, these settings, this kind of GPU and this code."""
    facts = (
        torch.__version__,
        triton.__version__,
        gpu,
        setup.spec,
        setup.max_model_len,
        setup.block_size,
        setup.max_num_batched_tokens,
        setup.max_num_seqs,
        (setup.parallel.rank, setup.parallel.size, setup.parallel.most_leaves),
        [getattr(setup.config, name) for name in _RELEVANT],
    )
    digest = hashlib.sha256(repr(facts).encode())
    for name, source in _sources():
        digest.update(f"\n{name}\n".encode() + source)
    return digest.hexdigest()


def _sources() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files of kernels and of everything that launches them."""
    for package in (kernels, workers):
        for root in map(Path, package.__path__):
            for path in sorted(root.rglob("*.py")):
                yield path.relative_to(root).as_posix(), path.read_bytes()


def read_index(key: str) -> list[Variant] | None:
    """None when there is none, or it cannot be read."""
    path = get_cache_manager(key).get_file(_FILE)
    if path is None:
        return None
    digest, _, lines = Path(path).read_text(errors="replace").partition("\n")
    if digest != _digest(lines):
        return None
    return [Variant.from_description(line) for line in lines.splitlines()]


def write_index(key: str, variants: Sequence[Variant]) -> None:
    """Written completely or not at all."""
    lines = "\n".join(variant.describe() for variant in variants)
    try:
        get_cache_manager(key).put(f"{_digest(lines)}\n{lines}", _FILE, binary=False)
    except OSError as error:
        logger.warning("the next start takes longer, the index of its kernels cannot be written: %s", error)


def _digest(lines: str) -> str:
    return hashlib.sha256(lines.encode()).hexdigest()
