"""How much of a GPU's memory the KV cache gets, and the sums to report when that is too little."""

from __future__ import annotations

from dataclasses import dataclass

from sempre.ipc.errors import ConfigError
from sempre.workers.kv_cache import draft_share
from sempre.workers.state_cache import CacheSizes, StateNeeds

# what graphs, compiled kernels and libraries take besides what is allocated here
RUNTIME_RESERVE_BYTES = 768 << 20
GIB = 1 << 30

LEAST_SEQS, MOST_SEQS = 128, 1024
# expected length of a sequence in the cache, tokens
EXPECTED_LEN = 512
# graphs for this many rows are this far apart
SEQS_STEP = 64


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one GPU before the KV cache is allocated."""

    total: int
    free: int
    """as the driver reports it now"""
    weights: int
    activations: int
    """buffers of steps, allocated now or later"""
    allocated: int
    """in use by this process"""
    utilization: float
    """share of `total` that this worker may use"""
    draft_block_bytes: int = 0
    """of a block, the draft model's share"""

    @property
    def others(self) -> int:
        """Used by other processes and by the driver's context."""
        return max(0, self.total - self.free - self.allocated)

    @property
    def for_cache(self) -> int:
        """What the share leaves, at most what is really free."""
        taken = self.weights + self.activations + RUNTIME_RESERVE_BYTES
        within_share = int(self.total * self.utilization) - taken
        really_free = self.free + self.allocated - taken
        return max(0, min(within_share, really_free))


def default_max_num_seqs(
    plan: MemoryPlan,
    *,
    kv_cache_memory_bytes: int | None,
    bytes_per_token: int,
    bytes_per_row: int,
    max_model_len: int | None,
    bytes_of_states: int = 0,
) -> int:
    """Most sequences in a step: as many as have room for EXPECTED_LEN tokens each in the cache beside their rows of a
    step.

    `plan` is from before the weights are loaded. An explicit `max_model_len`, tokens, keeps its room in the cache.
    `bytes_of_states`: of each sequence, whatever its length.
    """
    expected = min(EXPECTED_LEN, max_model_len or EXPECTED_LEN) * bytes_per_token + bytes_of_states
    if kv_cache_memory_bytes is None:
        fitting = plan.for_cache // (expected + bytes_per_row)
        rows = (plan.for_cache - (max_model_len or 0) * bytes_per_token) // (bytes_per_row + bytes_of_states)
    else:
        fitting = kv_cache_memory_bytes // expected
        rows = (plan.for_cache - kv_cache_memory_bytes) // bytes_per_row
    return max(LEAST_SEQS, min(fitting, rows, MOST_SEQS) // SEQS_STEP * SEQS_STEP)


def cache_sizes(
    plan: MemoryPlan,
    states: StateNeeds,
    *,
    kv_cache_memory_bytes: int | None,
    bytes_per_block: int,
    block_size: int,
    max_model_len: int,
    shortens: bool = False,
) -> CacheSizes:
    """Blocks of the cache, beside slots of states; more whole sequences than a step may have are never needed.

    Raises ConfigError when not even one sequence fits, or, if it `shortens` to what fits, not even one block.
    """
    per_sequence = -(-max_model_len // block_size)
    budget = plan.for_cache
    if kv_cache_memory_bytes is not None:
        if kv_cache_memory_bytes > plan.free:
            raise _too_little(plan, kv_cache_memory_bytes, plan.free, bytes_per_block, block_size, max_model_len)
        budget = kv_cache_memory_bytes
    origin = "kv_cache_memory_bytes" if kv_cache_memory_bytes is not None else "memory left on the GPU"
    num_slots = states.num_slots(budget, origin)
    budget -= num_slots * states.slot_bytes
    num_blocks = budget // bytes_per_block
    if num_blocks < (1 if shortens else per_sequence):
        needed = per_sequence * bytes_per_block
        raise _too_little(plan, needed, budget, bytes_per_block, block_size, max_model_len)
    if kv_cache_memory_bytes is not None:
        return CacheSizes(num_blocks, num_slots)
    return CacheSizes(min(num_blocks, per_sequence * states.max_num_seqs), num_slots)


def out_of_memory(
    what: str, *, weights: int, allocated: int, free: int, total: int, max_num_batched_tokens: int
) -> ConfigError:
    """The error for a model that leaves no room even for `what`; sums in bytes, `weights` as 16 or 32 bit."""

    def gib(count: int) -> str:
        return f"{count / GIB:.2f} GiB"

    return ConfigError(
        f"model: no memory left for {what}. The GPU has {gib(total)}: this worker holds {gib(allocated)}, other"
        f" processes {gib(max(0, total - free - allocated))}, and {gib(free)} is free; the weights need"
        f" {gib(weights)} in all. End other processes on the GPU, use a GPU with more memory or a smaller dtype, or"
        f" lower max_num_batched_tokens={max_num_batched_tokens}, which decides the size of the activations.",
        parameter="model",
    )


def _too_little(
    plan: MemoryPlan, needed: int, budget: int, bytes_per_block: int, block_size: int, max_model_len: int
) -> ConfigError:
    def gib(count: int) -> str:
        return f"{count / GIB:.2f} GiB"

    fits = budget // bytes_per_block * block_size
    advice = f"max_model_len={fits} would fit" if fits else "not even one block fits: free memory, or use another GPU"
    return ConfigError(
        f"max_model_len: a KV cache of {gib(needed)} is needed (one sequence of max_model_len={max_model_len} tokens"
        f" takes {gib(-(-max_model_len // block_size) * bytes_per_block)}"
        f"{draft_share(bytes_per_block, plan.draft_block_bytes)}), and {gib(budget)} is left for it. The GPU"
        f" has {gib(plan.total)}, of which gpu_memory_utilization={plan.utilization:g} allows"
        f" {gib(int(plan.total * plan.utilization))}: weights {gib(plan.weights)}, activations"
        f" {gib(plan.activations)}, reserved for graphs and libraries {gib(RUNTIME_RESERVE_BYTES)}; other processes"
        f" hold {gib(plan.others)}. {advice}.",
        parameter="max_model_len",
        value=max_model_len,
    )
