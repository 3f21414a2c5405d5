"""Gated delta rule (Yang et al. 2024, arXiv 2412.06464): attention whose memory is a state of fixed size."""

from __future__ import annotations

from sempre.kernels.gated_delta.contract import DeltaHeads, DeltaWeights

__all__ = ["DeltaHeads", "DeltaWeights"]
