"""Faults to plant in a copy of the project, by area, each with the tests that notice it."""

from __future__ import annotations

from planted_faults.attention_and_linear import ATTENTION_AND_LINEAR
from planted_faults.cache import CACHE
from planted_faults.fault import Fault
from planted_faults.gated_delta import GATED_DELTA
from planted_faults.gpu_kernels import GPU_KERNELS
from planted_faults.links import LINKS
from planted_faults.pooling import POOLING
from planted_faults.positions import POSITIONS
from planted_faults.ranks import RANKS
from planted_faults.sampling import SAMPLING
from planted_faults.scheduling import SCHEDULING
from planted_faults.speculation import SPECULATION
from planted_faults.states import STATES

FAULTS: tuple[Fault, ...] = (
    *SCHEDULING,
    *CACHE,
    *STATES,
    *POSITIONS,
    *SPECULATION,
    *SAMPLING,
    *ATTENTION_AND_LINEAR,
    *GATED_DELTA,
    *GPU_KERNELS,
    *LINKS,
    *POOLING,
    *RANKS,
)

__all__ = ["FAULTS", "Fault"]
