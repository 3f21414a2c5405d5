"""What a worker tells of itself when asked."""

from __future__ import annotations

from sempre.ipc.errors import ConfigError
from sempre.workers.backend import LoadedModel
from sempre.workers.kv_cache import PagedKvCache


def memory_bytes(loaded: LoadedModel | None, draft: LoadedModel | None, cache: PagedKvCache | None) -> dict[str, int]:
    """Bytes of the weights, and of the caches of model and draft; of those that are released, none."""
    return {
        "weight_bytes": 0 if loaded is None else loaded.weights.nbytes,
        "kv_cache_bytes": 0 if cache is None else cache.nbytes,
        "state_cache_bytes": 0 if cache is None or cache.states is None else cache.states.nbytes,
        "draft_kv_cache_bytes": 0 if cache is None or draft is None else cache.num_blocks * draft.block_bytes,
    }


def checked_digest(cache: PagedKvCache, block_ids: list[int]) -> str:
    """The digest of these blocks. Raises ConfigError for a block that the cache does not have."""
    for block_id in block_ids:
        if type(block_id) is not int or not 0 <= block_id < cache.num_blocks:
            raise ConfigError(
                f"block_ids: expected ids in [0, {cache.num_blocks}), found {block_id!r}.",
                parameter="block_ids",
                value=block_id,
            )
    return cache.digest(block_ids)
