"""Causal attention over a paged KV cache, grouped queries, optional sliding window.

Contract: keys and values are in the cache before the call. Every query row walks the keys in tiles of 64 from
position 0 upwards (from the first tile its window touches), with the online softmax of Milakov and Gimelshein (2018,
arXiv 1805.02867): scores are one chain of fused multiply-adds over D; the row's sum adds 4 vectors of 16 lanes as
(0 + 1) + (2 + 3) and then a fixed tree; values are added one key after the other. Masked keys contribute exact
zeros, and a fully masked tile changes nothing, so a row's bits are the same in a decode step, a chunk of any length,
or a whole prompt, and beside any other row.
"""

from sempre.kernels.attention.cpu import TILE, KvCache, allocate_kv_cache, paged_attention

__all__ = ["TILE", "KvCache", "allocate_kv_cache", "paged_attention"]
