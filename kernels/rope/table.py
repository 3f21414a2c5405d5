"""The table of angles, for the plain, linear and Llama-3 scaled variants."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch


@dataclass(frozen=True)
class RopeSpec:
    """`head_dim` D, base `theta`; `factor` of the scaling; the last three only for "llama3"."""

    head_dim: int
    theta: float = 10000.0
    scaling: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def _frequencies(spec: RopeSpec) -> np.ndarray:
    """Angular frequencies [D/2], float64."""
    frequencies = spec.theta ** (-np.arange(0, spec.head_dim, 2, dtype=np.float64) / spec.head_dim)
    if spec.scaling == "linear":
        return frequencies / spec.factor
    if spec.scaling == "llama3":
        # long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1 model card)
        wavelengths = 2 * math.pi / frequencies
        ratio = spec.original_max_position_embeddings / wavelengths
        blend = (ratio - spec.low_freq_factor) / (spec.high_freq_factor - spec.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return (1 - blend) * frequencies / spec.factor + blend * frequencies
    return frequencies


def cos_sin_table(spec: RopeSpec, max_len: int) -> torch.Tensor:
    """[max_len, D] float32: cosines in the first half of a row, sines in the second."""
    angles = np.arange(max_len, dtype=np.float64)[:, None] * _frequencies(spec)[None, :]
    return torch.from_numpy(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
