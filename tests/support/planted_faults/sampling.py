"""Faults of sampling: seeds, noise, truncation, penalties, masks and log-probabilities."""

from __future__ import annotations

from planted_faults.fault import Fault

LOG_SOFTMAX = "kernels/sampling/log_softmax.py"
NOISE = "kernels/sampling/noise.py"
STATE = "workers/sampling/state.py"
TRUNCATION = "kernels/sampling/truncation.py"
KERNEL_TESTS = "tests/kernels/sampling"
SAMPLER_TESTS = "tests/workers/sampling/test_sampler.py"
SEED_TESTS = "tests/engine/test_seeding.py"

SAMPLING = (
    Fault(
        "nine-rounds",
        "The generator stops one round before it is Philox4x32-10.",
        "kernels/sampling/rng.py",
        "ROUNDS = 10",
        "ROUNDS = 9",
        (f"{KERNEL_TESTS}/test_philox.py::test_reference_gives_the_known_answers",),
    ),
    Fault(
        "noise-repeats-every-tile",
        "Tokens 64 apart in the vocabulary have the same noise.",
        NOISE,
        "counter = np.uint32(tile * (TILE // 4) + lane)",
        "counter = np.uint32(lane)",
        (f"{KERNEL_TESTS}/test_philox.py::test_tile_kernel_equals_reference",),
    ),
    Fault(
        "seed-cut-to-32-bits",
        "Seeds that differ in their high words alone give the same tokens.",
        NOISE,
        "    vocabulary = logits.size\n    key_0, key_1 = np.uint32(seed & _LOW_32), np.uint32(seed >> _SHIFT_32)",
        "    vocabulary = logits.size\n    key_0, key_1 = np.uint32(seed & _LOW_32), np.uint32(0)",
        (f"{KERNEL_TESTS}/test_sample.py::test_seeds_that_differ_in_the_high_word_differ",),
    ),
    Fault(
        "ties-to-the-highest-id",
        "Of equal logits the last one wins.",
        NOISE,
        "(best[lane] == value and candidate < token_id)",
        "(best[lane] == value and candidate > token_id)",
        (f"{KERNEL_TESTS}/test_sample.py::test_greedy_ties_go_to_the_lowest_id",),
    ),
    Fault(
        "tail-of-the-noise-coarse",
        "Great values of the noise, which decide for unlikely tokens, take a few steps only.",
        NOISE,
        "return -log32(near_zero if u < QUARTER else elsewhere)",
        "return -log32(elsewhere)",
        (f"{KERNEL_TESTS}/test_noise.py::test_kernels_equal_the_reference_bit_for_bit",),
    ),
    Fault(
        "children-share-a-seed",
        "All outputs of a request with n > 1 are the same.",
        "engine/seeding.py",
        "return (seed + index) % SEED_LIMIT",
        "return seed % SEED_LIMIT",
        (f"{SEED_TESTS}::test_seeds_of_siblings_count_up_and_wrap_around",),
    ),
    Fault(
        "engine-seed-left-out-of-derived-seeds",
        "Requests without a seed get the same tokens whatever the seed of the engine.",
        "engine/seeding.py",
        'packed = _TAG + engine_seed.to_bytes(8, "little") + digest',
        "packed = _TAG + bytes(8) + digest",
        (f"{SEED_TESTS}::test_request_seeds_differ",),
    ),
    Fault(
        "generators-not-compared",
        "A worker whose torch is seeded differently is taken for a good one.",
        "engine/seeding.py",
        "if expected[name] != found[name]]",
        'if name != "numpy_random" and expected[name] != found[name]]',
        (f"{SEED_TESTS}::test_equal_digests_pass_and_a_difference_names_rank_and_generator",),
    ),
    Fault(
        "top-p-rounds-down",
        "A nucleus that just misses its share of the probability is taken for enough.",
        TRUNCATION,
        "need = np.int64(np.ceil(top_p * np.float64(total)))",
        "need = np.int64(np.floor(top_p * np.float64(total)))",
        (f"{KERNEL_TESTS}/test_truncation.py::test_top_p_is_reached_and_never_just_missed",),
    ),
    Fault(
        "top-p-of-what-was-there-before",
        "The nucleus is a share of more probability than top-k and min-p have left.",
        TRUNCATION,
        "        total = weights.sum()\n",
        "        total = max(weights.sum(), np.int64(1) << np.int64(45))\n",
        (f"{KERNEL_TESTS}/test_truncation.py::test_equals_a_full_sort",),
    ),
    Fault(
        "unstable-tie-in-truncation",
        "Of equal logits at the cut the last ones are kept.",
        TRUNCATION,
        "keep = (keys[i] > key) | ((keys[i] == key) & (i <= last))",
        "keep = (keys[i] > key) | ((keys[i] == key) & (i >= last))",
        (f"{KERNEL_TESTS}/test_truncation.py::test_all_equal_logits_keep_the_lowest_ids",),
    ),
    Fault(
        "min-p-strict",
        "min-p cuts tokens that reach its bound exactly.",
        TRUNCATION,
        "if x[i] - maximum >= lowest else",
        "if x[i] - maximum > lowest else",
        (f"{KERNEL_TESTS}/test_truncation.py::test_all_equal_logits_keep_the_lowest_ids",),
    ),
    Fault(
        "cut-one-short",
        "A cut among equal logits keeps one token too few.",
        TRUNCATION,
        "return keys[0], (need + each - 1) // each",
        "return keys[0], max(need // each, 1)",
        (f"{KERNEL_TESTS}/test_truncation.py::test_top_p_is_reached_and_never_just_missed",),
    ),
    Fault(
        "zeros-of-two-signs",
        "A logit of -0.0 is less than one of 0.0.",
        TRUNCATION,
        "bits = float32_bits(x + _ZERO)",
        "bits = float32_bits(x)",
        (f"{KERNEL_TESTS}/test_truncation.py::test_both_zeros_are_one_value",),
    ),
    Fault(
        "rank-ignores-ties",
        "Tokens of equal probability all have the rank of the first.",
        LOG_SOFTMAX,
        "        before += x[i] == value\n",
        "        before += 0\n",
        (f"{KERNEL_TESTS}/test_log_softmax.py::test_ties_are_ordered_by_id",),
    ),
    Fault(
        "repetition-penalty-upside-down",
        "A repetition penalty makes likely tokens likelier.",
        "kernels/sampling/penalties.py",
        "np.where(x > 0, x / factor, x * factor)",
        "np.where(x > 0, x * factor, x / factor)",
        (f"{KERNEL_TESTS}/test_penalties.py::test_penalties_equal_a_plain_loop",),
    ),
    Fault(
        "presence-penalty-for-the-prompt",
        "Tokens of the prompt alone count as generated.",
        "kernels/sampling/penalties.py",
        "    generated = output_counts > 0\n",
        "    generated = (output_counts > 0) | in_prompt\n",
        (f"{KERNEL_TESTS}/test_penalties.py::test_penalties_equal_a_plain_loop",),
    ),
    Fault(
        "last-token-not-penalised",
        "The token before the one that is sampled is not counted yet.",
        STATE,
        "        self._counts.advance_to(position)",
        "        self._counts.advance_to(position - 1)",
        ("tests/workers/sampling/test_state.py::test_tokens_that_are_replaced_are_not_counted",),
    ),
    Fault(
        "bad-words-match-in-the-prompt",
        "A forbidden phrase is also found across the end of the prompt.",
        STATE,
        "            if position - len(phrase) + 1 >= self.num_prompt_tokens\n",
        "            if position - len(phrase) + 1 >= 0\n",
        (f"{SAMPLER_TESTS}::test_bad_phrases_match_within_the_output_only",),
    ),
    Fault(
        "min-tokens-one-more",
        "An output may not end at the least length that was asked for.",
        STATE,
        "        if output_length < self.params.min_tokens and",
        "        if output_length <= self.params.min_tokens and",
        (f"{SAMPLER_TESTS}::test_min_tokens_masks_end_and_stop_ids_until_reached",),
    ),
    Fault(
        "logprobs-of-changed-logits",
        "Log-probabilities are reported of the logits after masks and penalties.",
        "workers/sampling/sampler.py",
        "if p.logprobs is not None and row in overwritten]",
        "if p.logprobs is not None and row in parameters.truncated]",
        (f"{SAMPLER_TESTS}::test_logprobs_are_those_of_the_raw_logits_and_equal_prompt_logprobs",),
    ),
    Fault(
        "batch-of-other-requests-reused",
        "The parameters of the last batch are used again for another one of the same size.",
        "workers/sampling/sampler.py",
        "        if list(states) != self._batch.states:",
        "        if len(states) != len(self._batch.states):",
        (f"{SAMPLER_TESTS}::test_each_row_alone_equals_the_row_in_a_mixed_batch",),
    ),
)
