"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with the write of keys and values into the paged cache.

out[i] = x[i] cos - x[i + D/2] sin, out[i + D/2] = x[i + D/2] cos + x[i] sin, for i < D/2. Each product and sum is a
float32 operation, the second product fused; the table of angles is computed in float64.
"""

from sempre.kernels.rope.cpu import rope_and_cache_write
from sempre.kernels.rope.table import RopeSpec, cos_sin_table

__all__ = ["RopeSpec", "cos_sin_table", "rope_and_cache_write"]
