"""RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight, a row at a time (Zhang and Sennrich 2019, arXiv 1910.07467).

Contract: the sum of squares runs in 16 lanes over ascending chunks by fused multiply-add, then a fixed tree over the
lanes; division and square root are IEEE; everything is float32. The width must be a multiple of 16.
"""

from sempre.kernels.norms.cpu import add_rms_norm, emit_rms_norm, rms_norm

__all__ = ["add_rms_norm", "emit_rms_norm", "rms_norm"]
