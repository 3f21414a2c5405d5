"""Compiles every sampling kernel into the cache folder: `python -m sempre.kernels.sampling.warm_up`."""

from __future__ import annotations

import numpy as np
import torch

from sempre.kernels.sampling import SamplingRows, logprobs, sample

PROGRAM = "sempre.kernels.sampling.warm_up"


def warm_up() -> None:
    """Compile every sampling kernel, or load it from the cache."""
    logits = torch.zeros(2, 64, dtype=torch.float32, device="cpu")
    rows = SamplingRows.of(seeds=[0, 1], temperature=[1.0, 1.0], top_k=[2, 0], top_p=[0.5, 1.0], min_p=[0.1, 0.0])
    sample(logits, rows, np.zeros(2, np.int64))
    logprobs(logits, np.arange(2), np.zeros(2, np.int64), 1)


if __name__ == "__main__":
    warm_up()
