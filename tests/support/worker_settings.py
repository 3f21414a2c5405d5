"""The settings of a lone worker, as an engine would send them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sempre.ipc.config import WorkerConfig


def worker_config(folder: Path | str, **settings: Any) -> WorkerConfig:
    """On a CPU, of one thread, unless `settings` say otherwise."""
    defaults = {"device": "cpu", "num_threads": 1, "max_num_batched_tokens": 2048}
    return WorkerConfig(rank=0, model="m", model_path=str(folder), **{**defaults, **settings})
