"""Faults of positions: where in its sequence a token is computed, written and sampled."""

from __future__ import annotations

from planted_faults.fault import RANDOM_LIVES, Fault

INPUT_BATCH = "workers/input_batch.py"
TESTS = "tests/workers/test_input_batch.py"
WORKER_TESTS = "tests/workers/test_worker.py"
LONG_CONTEXTS = "tests/invariance/test_long_contexts.py"
STEP_ARRAYS = "token_ids, sampled)\n        if plan.has_states:"


def _with_positions(error: str) -> str:
    """The arrays of a step, whose positions are too small by `error`."""
    wrong = f"arrays._replace(positions=arrays.positions - {error})"
    return f"token_ids, sampled)\n        arrays = {wrong}\n        if plan.has_states:"


POSITIONS = (
    Fault(
        "rotation-off-at-chunks-of-512",
        "The first token of a chunk that begins at a multiple of 512 is rotated as the one before it.",
        INPUT_BATCH,
        STEP_ARRAYS,
        _with_positions(
            "np.isin(np.arange(ends[-1]), plan.first_rows[(plan.computed > 0) & (plan.computed % 512 == 0)])"
        ),
        (f"{TESTS}::test_every_token_of_a_chunk_has_its_own_position_and_slot", f"{LONG_CONTEXTS}::test_chunks[512]"),
    ),
    Fault(
        "rope-off-after-512",
        "Beyond the first 512 positions the first token of every chunk is rotated as the one before it.",
        INPUT_BATCH,
        STEP_ARRAYS,
        _with_positions("np.isin(np.arange(ends[-1]), plan.first_rows[plan.computed > 512])"),
        (f"{TESTS}::test_every_token_of_a_chunk_has_its_own_position_and_slot", f"{LONG_CONTEXTS}::test_chunks[511]"),
    ),
    Fault(
        "rotation-off-after-preemption",
        "A request that has outputs and nothing in the cache, as after a preemption, is rotated one position off.",
        INPUT_BATCH,
        STEP_ARRAYS,
        _with_positions(
            "np.minimum(arrays.positions, np.repeat((plan.computed == 0) & np.asarray(["
            "s.num_prompt_tokens < len(s.token_ids) for s in plan.states]), plan.num_tokens))"
        ),
        (
            f"{TESTS}::test_a_request_that_is_computed_again_has_the_positions_it_had",
            f"{WORKER_TESTS}::test_resumed_request_continues_with_the_same_bits",
            RANDOM_LIVES,
            f"{LONG_CONTEXTS}::test_preemption_without_a_prefix_cache",
        ),
    ),
    Fault(
        "outputs-rotated-off-after-preemption",
        "After a preemption the outputs of a request, but not its prompt, are rotated one position off.",
        INPUT_BATCH,
        STEP_ARRAYS,
        _with_positions(
            "(np.repeat(plan.num_tokens > 1, plan.num_tokens)"
            " & (arrays.positions >= np.repeat([s.num_prompt_tokens for s in plan.states], plan.num_tokens)))"
        ),
        (
            f"{TESTS}::test_a_request_that_is_computed_again_has_the_positions_it_had",
            f"{LONG_CONTEXTS}::test_preemption_without_a_prefix_cache",
        ),
    ),
    Fault(
        "first-position-skipped-after-preemption",
        "A request admitted for the second time, with nothing in the cache, is computed from its second token on.",
        "engine/scheduling/kv_cache_manager.py",
        "        request.num_computed_tokens = request.num_slots\n",
        "        request.num_computed_tokens = request.num_slots + (request.was_admitted and not cached_blocks)\n",
        (
            "tests/engine/scheduling/test_scheduler.py::test_the_last_request_is_preempted_and_computed_again",
            "tests/engine/scheduling/test_simulation.py::test_a_busy_workload_ends_right_under_every_setting",
        ),
    ),
    Fault(
        "keys-written-one-block-early",
        "The first token of a block is written into the block before.",
        "workers/steps.py",
        "blocks = block_tables[requests, positions // block_size].astype(np.int64)",
        "blocks = block_tables[requests, np.maximum(positions - 1, 0) // block_size].astype(np.int64)",
        (f"{TESTS}::test_every_token_of_a_chunk_has_its_own_position_and_slot",),
    ),
    Fault(
        "block-table-one-too-narrow",
        "The last block of a context that does not fill it is missing from the step's tables.",
        INPUT_BATCH,
        "        width = -(-int(plan.context.max()) // self._block_size)",
        "        width = max(1, int(plan.context.max()) // self._block_size)",
        (f"{TESTS}::test_every_token_of_a_chunk_has_its_own_position_and_slot",),
    ),
    Fault(
        "tables-of-a-former-admission",
        "A request that was preempted goes on with the blocks that it has lost.",
        INPUT_BATCH,
        "        self._block_tables[slot, start:end] = item.block_ids",
        "        self._block_tables[slot, max(start, self._table_lens[slot] - 1) : end] = "
        "item.block_ids[max(0, self._table_lens[slot] - 1 - start) :]",
        (f"{TESTS}::test_a_request_that_is_computed_again_has_the_positions_it_had",),
    ),
    Fault(
        "sampled-position-one-late",
        "A token is sampled under the noise of the position after its own.",
        INPUT_BATCH,
        "self.context[each] - back, offsets)",
        "self.context[each] - back + 1, offsets)",
        (
            f"{TESTS}::test_a_token_is_sampled_after_the_last_known_one_and_after_each_draft",
            f"{WORKER_TESTS}::test_a_token_is_the_best_under_the_noise_of_its_own_position",
        ),
    ),
    Fault(
        "noise-keyed-by-slot",
        "The noise of a token depends on which slot of the worker its request has.",
        "workers/cpu/runner.py",
        "states, sampled.positions.tolist())",
        "states, (sampled.positions + plan.slots[sampled.requests]).tolist())",
        (f"{WORKER_TESTS}::test_bits_do_not_depend_on_companions", RANDOM_LIVES),
    ),
    Fault(
        "recorded-token-counted-twice",
        "With steps in flight a token is counted when it is expected and again when it is known.",
        INPUT_BATCH,
        "            self._num_tokens[state.slot] += len(token_ids) - 1",
        "            self._num_tokens[state.slot] += len(token_ids)",
        (f"{TESTS}::test_tokens_that_are_recorded_later_are_counted_once",),
    ),
    Fault(
        "result-of-a-removed-request-is-recorded",
        "The last token of a request that is gone goes to the one that has its slot now.",
        INPUT_BATCH,
        "        if self._requests.get(state.request_id) is state:",
        "        if state.slot < len(self._num_tokens):",
        (f"{TESTS}::test_a_token_of_a_removed_request_does_not_reach_its_successor",),
    ),
    Fault(
        "heads-in-the-order-of-the-checkpoint",
        "Heads that turn in part, or by neighbouring pairs, keep the checkpoint's order of dimensions.",
        "workers/layers/linear.py",
        "return tensor.index_select(0, rows)",
        "return tensor",
        ("tests/workers/test_families.py::test_greedy_tokens_are_those_of_transformers_and_bits_their_own[glm4-odd]",),
    ),
    Fault(
        "norms-of-heads-in-the-order-of-the-checkpoint",
        "The norm of heads in another order keeps its weights in the checkpoint's.",
        "workers/layers/norm.py",
        "self.weight = self.weight[list(self._order)].contiguous()",
        "self.weight = self.weight.contiguous()",
        ("tests/workers/test_families.py::test_greedy_tokens_are_those_of_transformers_and_bits_their_own[glm4-moe]",),
    ),
    Fault(
        "rows-that-are-read-turn-as-the-first-ones",
        "In layers that go on with the rows that are read, these are rotated as the first rows of the step.",
        "workers/steps.py",
        "        positions=step.positions.index_select(0, read.rows),",
        "        positions=step.positions[: read.rows.shape[0]],",
        ("tests/workers/test_output_rows.py::test_wanted_rows_have_the_bits_they_have_among_all",),
    ),
    Fault(
        "candidates-of-the-next-prompt-token",
        "The candidates for a prompt token are scored by what predicts the one after it.",
        "workers/prompt_logprobs.py",
        "candidates[first - 1 - given.start : high - 1 - given.start]",
        "candidates[max(first - 2 - given.start, 0) : max(high - 2 - given.start, 1)]",
        ("tests/engine/test_outputs.py::test_candidates_of_a_prompt_are_as_in_the_whole_vocabulary[0]",),
    ),
    Fault(
        "shared-keys-of-the-first-layer",
        "Layers without keys and values of their own read those of the first layer of their kind, not of the last.",
        "workers/models/gemma4_config.py",
        "    last = {window: layer for layer, window in enumerate(own)}",
        "    last = {window: own.index(window) for window in own}",
        ("tests/workers/test_families.py::test_keys_and_values_that_layers_share_are_kept_once",),
    ),
)
