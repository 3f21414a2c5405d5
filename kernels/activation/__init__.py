"""SwiGLU's activation: out = silu(gate) * up, silu(g) = g / (1 + exp(-g)) (Shazeer 2020, arXiv 2002.05202).

Contract: elementwise in float32; the exponential is the project's own polynomial, the division IEEE.
"""

from sempre.kernels.activation.cpu import silu_and_mul

__all__ = ["silu_and_mul"]
