"""Faults of the KV cache's blocks: what is found, shared and evicted."""

from __future__ import annotations

from planted_faults.fault import RANDOM_LIVES, Fault

BLOCK_POOL = "engine/scheduling/block_pool.py"
MANAGER = "engine/scheduling/kv_cache_manager.py"
PREFIX_CACHE = "engine/scheduling/prefix_cache.py"
PLANNER = "engine/scheduling/planner.py"
POOL_TESTS = "tests/engine/scheduling/test_block_pool.py"
PREFIX_TESTS = "tests/engine/scheduling/test_prefix_cache.py"
TESTS = "tests/engine/scheduling/test_scheduler.py"
SIMULATION = "tests/engine/scheduling/test_simulation.py"

CACHE = (
    Fault(
        "salt-left-out-of-the-prefix-hash",
        "Requests with different salts share blocks, and each can tell what the other asked.",
        PREFIX_CACHE,
        "salted = bytes(32) if cache_salt is None else hashlib.sha256(cache_salt.encode()).digest()",
        "salted = bytes(32)",
        (f"{PREFIX_TESTS}::test_salts_separate_all_blocks", f"{TESTS}::test_who_may_reuse_whose_blocks", RANDOM_LIVES),
    ),
    Fault(
        "adapter-left-out-of-the-prefix-hash",
        "A request reads keys and values that another adapter has computed.",
        PREFIX_CACHE,
        "return salted if adapter is None else hashlib.sha256(salted + bytes.fromhex(adapter)).digest()",
        "return salted",
        ("tests/engine/scheduling/test_adapters.py::test_prefixes_are_not_shared_between_adapters",),
    ),
    Fault(
        "prefix-hash-without-what-came-before",
        "A block is found by its own tokens alone, whatever came before them.",
        PREFIX_CACHE,
        "parent = hashlib.sha256(parent + packed).digest()",
        "parent = hashlib.sha256(packed).digest()",
        (f"{PREFIX_TESTS}::test_equal_blocks_after_different_prefixes_differ",),
    ),
    Fault(
        "tokens-of-a-hit-not-compared",
        "A prefix hit rests on a digest alone.",
        PREFIX_CACHE,
        "return block if found is not None and found.packed_tokens == key.packed_tokens else None",
        "return block",
        (f"{PREFIX_TESTS}::test_a_hit_needs_equal_tokens_not_only_an_equal_digest",),
    ),
    Fault(
        "whole-prompt-from-the-cache",
        "A prompt that is cached whole leaves no row to sample from.",
        MANAGER,
        "num_blocks = (len(request.token_ids) - 1) // self.block_size",
        "num_blocks = len(request.token_ids) // self.block_size",
        (f"{TESTS}::test_the_last_token_is_always_computed",),
    ),
    Fault(
        "half-written-block-is-findable",
        "A block is found before its last tokens are written.",
        MANAGER,
        "        num_full = num_written_tokens // self.block_size\n",
        "        num_full = -(-num_written_tokens // self.block_size)\n"
        "        num_full = min(num_full, len(request.token_ids) // self.block_size)\n",
        (f"{TESTS}::test_a_block_is_not_found_before_its_last_token_is_written",),
    ),
    Fault(
        "step-in-flight-is-findable",
        "Blocks of a later chunk can be found as soon as it is planned, though its step may fail.",
        PLANNER,
        "            step.add(request, num_new, block_table_start, block_ids, drafts, states)\n",
        "            step.add(request, num_new, block_table_start, block_ids, drafts, states)\n"
        "            self.kv_cache.commit(request, min(start + num_new, len(request.token_ids)))\n",
        (f"{TESTS}::test_a_later_chunk_is_not_found_before_its_step_has_returned",),
    ),
    Fault(
        "admission-in-flight-is-findable",
        "Blocks of a first chunk can be found as soon as it is planned, though its step may fail.",
        PLANNER,
        "        step.add(request, num_new, 0, request.block_ids.copy(), [], self._plan_states(request, num_new))\n",
        "        step.add(request, num_new, 0, request.block_ids.copy(), [], self._plan_states(request, num_new))\n"
        "        self.kv_cache.commit(request, num_cached + num_new)\n",
        (
            f"{TESTS}::test_a_block_is_not_found_before_its_step_has_returned",
            f"{TESTS}::test_an_error_ends_one_request_and_leaves_nothing_findable_of_its_step",
        ),
    ),
    Fault(
        "admission-counts-cached-blocks-twice",
        "A request is admitted on blocks that its own prefix hit is about to take.",
        MANAGER,
        "return num_new <= self._pool.num_available - self._pool.num_cached(cached_blocks)",
        "return num_new <= self._pool.num_available",
        (f"{SIMULATION}::test_a_busy_workload_ends_right_under_every_setting",),
    ),
    Fault(
        "evicted-block-stays-findable",
        "A block that was given to another request is still found by its former content.",
        BLOCK_POOL,
        "                self._prefix_cache.remove(block)\n            self._ref_counts",
        "            self._ref_counts",
        (f"{POOL_TESTS}::test_free_blocks_are_taken_before_contents_and_contents_in_the_order_of_release",),
    ),
    Fault(
        "newest-content-evicted-first",
        "What was used last is evicted first, so that a conversation never finds its own beginning.",
        BLOCK_POOL,
        "block, _ = self._cached.popitem(last=False)\n                self._prefix_cache",
        "block, _ = self._cached.popitem(last=True)\n                self._prefix_cache",
        (f"{POOL_TESTS}::test_a_found_content_is_used_last_again",),
    ),
    Fault(
        "head-of-a-prefix-evicted-first",
        "The head of a prefix is evicted before its tail, which then is of no use.",
        BLOCK_POOL,
        "for block in reversed(blocks):",
        "for block in blocks:",
        (f"{TESTS}::test_the_longest_unused_contents_are_evicted_first_and_tails_before_heads",),
    ),
    Fault(
        "shared-block-is-freed-by-its-first-holder",
        "A block that two requests read is given away when the first of them ends.",
        BLOCK_POOL,
        "            self._ref_counts[block] -= 1\n            if self._ref_counts[block]:",
        "            self._ref_counts[block] = 0\n            if self._ref_counts[block]:",
        (f"{POOL_TESTS}::test_a_shared_block_is_given_back_by_its_last_holder",),
    ),
    Fault(
        "prefix-cache-outlives-the-worker",
        "After a crash blocks are found whose contents died with the worker.",
        PLANNER,
        "if not request.is_paused)\n        self.kv_cache.forget_cached()",
        "if not request.is_paused)",
        (f"{TESTS}::test_restart_sends_every_token_again_and_counts_nothing_twice",),
    ),
    Fault(
        "prompt-logprobs-skip-cached-tokens",
        "A request that asks for prompt log-probabilities gets none for the tokens it found in the cache.",
        "engine/scheduling/request.py",
        "self.reads_prefix_cache = not (self.wants_prompt_logprobs or limits.pools_every_token)",
        "self.reads_prefix_cache = not limits.pools_every_token",
        (f"{TESTS}::test_who_may_reuse_whose_blocks",),
    ),
)
