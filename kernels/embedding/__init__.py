"""Embedding: out[t] = table[token_ids[t]], widened exactly to float32. The width must be a multiple of 16."""

from sempre.kernels.embedding.cpu import embed

__all__ = ["embed"]
