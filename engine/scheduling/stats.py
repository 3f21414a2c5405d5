"""Counters and gauges of a scheduler."""

from __future__ import annotations

from msgspec import Struct, field

from sempre.engine.metrics import Observations

# vLLM's buckets
_ITERATION_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)


class SchedulerStats(Struct, kw_only=True):
    """Gauges are current values; counters accumulate from construction. Token counts include no placeholder."""

    # gauges
    num_running: int = 0
    num_waiting: int = 0
    num_deferred: int = 0  # of these, waiting for something other than room
    kv_cache_usage: float = 0.0  # blocks held by requests / all blocks, 0…1

    # counters
    num_steps: int = 0
    # prompt tokens (cached ones included) in the step that first has them, and generated ones
    tokens_per_step: Observations = field(default_factory=lambda: Observations(_ITERATION_TOKENS))
    num_preemptions: int = 0
    preemptions_per_request: Observations = field(
        default_factory=lambda: Observations(_PREEMPTIONS)
    )  # of ended requests
    num_worker_restarts: int = 0
    prompt_tokens: int = 0  # of requests admitted for the first time
    cached_prompt_tokens: int = 0  # of these, from the prefix cache
    generation_tokens: int = 0
    prefix_cache_queries: int = 0  # tokens looked up, at every admission that may read the cache
    prefix_cache_hits: int = 0  # tokens found
    num_drafts: int = 0  # how often drafts of a request were verified
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
