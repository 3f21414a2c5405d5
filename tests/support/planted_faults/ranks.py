"""Faults of what ranks of one model share: sums in leaves, memory, and the comparison of their results."""

from __future__ import annotations

from planted_faults.fault import Fault

LEAVES = "tests/kernels/test_leaves.py"
MODELS = "tests/workers/test_tensor_parallel.py"
PROCESSES = "tests/engine/processes/test_tensor_parallel.py"
STAGES = "tests/workers/test_pipeline_parallel.py"
ROUTING = "tests/engine/coordinator/test_routing.py"
STAGED_PROCESSES = "tests/engine/processes/test_pipeline_parallel.py"
LINEAR = "kernels/linear/cpu.py"
GPU_EXCHANGE = "kernels/exchange/gpu.py"
GPU_TESTS = "tests/kernels/interpreter/test_exchange.py"

RANKS = (
    Fault(
        "ranks-added-in-another-order",
        "Partial sums are added in another order than the leaves of one worker.",
        LINEAR,
        "partials + (rank * rows + t) * row_bytes",
        "partials + (rank * 3 % ranks * rows + t) * row_bytes",
        (f"{LEAVES}::test_any_number_of_workers_gives_the_same_bits",),
    ),
    Fault(
        "a-partial-is-dropped",
        "The sums of the last ranks are left out.",
        LINEAR,
        "for left in range(0, ranks, 2 * distance):",
        "for left in range(0, distance, 2 * distance):",
        (f"{LEAVES}::test_any_number_of_workers_gives_the_same_bits",),
    ),
    Fault(
        "leaves-one-after-the-other",
        "Leaves are added to one sum in turn, so that two workers give other bits than one.",
        LINEAR,
        "        while bits & 1:\n            count -= 1",
        "        while bits > 0 and count > 0:\n            count -= 1",
        (f"{LEAVES}::test_the_order_is_a_balanced_binary_tree",),
    ),
    Fault(
        "every-leaf-has-the-first-one-s-scale",
        "Quantised activations of a leaf are multiplied by another leaf's scale.",
        LINEAR,
        "scale_rows(row_scales + leaf * 4, leaves * 4",
        "scale_rows(row_scales, leaves * 4",
        (f"{LEAVES}::test_activations_have_a_scale_for_each_leaf",),
    ),
    Fault(
        "inputs-of-adapters-in-another-order",
        "An adapter's inputs that ranks share are brought together in another order than theirs.",
        "workers/layers/row_parallel.py",
        "whole = slots.transpose(0, 1)",
        "whole = slots.flip(0).transpose(0, 1)",
        (f"{MODELS}::test_adapters[llama]",),
    ),
    Fault(
        "a-meeting-is-left-early",
        "A rank waits only for those before it.",
        "kernels/exchange/cpu.py",
        "for other in range(processes):",
        "for other in range(index):",
        (f"{MODELS}::test_rows_are_those_that_the_others_wrote",),
    ),
    Fault(
        "halves-do-not-take-turns",
        "A fast rank writes the next rows over those that a slow one still reads.",
        "workers/cpu/exchange.py",
        "self._halves[self._number % 2]",
        "self._halves[0]",
        (f"{MODELS}::test_rows_are_those_that_the_others_wrote",),
    ),
    Fault(
        "a-partial-of-a-gpu-is-added-twice",
        "On GPUs the first rank's partial sum takes the place of the second one's.",
        GPU_EXCHANGE,
        "_partial(bases, 0, start, at, inside) + _partial(bases, 1, start, at, inside)",
        "_partial(bases, 0, start, at, inside) + _partial(bases, 0, start, at, inside)",
        (f"{GPU_TESTS}::test_sums_are_trees_over_the_ranks[2]",),
    ),
    Fault(
        "gpus-share-no-late-rows",
        "The last rows of a sum whose rows are shared out are not given to the other ranks.",
        GPU_EXCHANGE,
        "for t in range(first + tl.program_id(0), last, tl.num_programs(0)):",
        "for t in range(first + tl.program_id(0), last - 1, tl.num_programs(0)):",
        (f"{GPU_TESTS}::test_sums_are_trees_over_the_ranks[2]",),
    ),
    Fault(
        "every-rank-has-the-first-key-heads",
        "Queries of a rank attend to the keys of another's.",
        "workers/parallel.py",
        "first, count = rank * keys // size, max(1, keys // size)",
        "first, count = 0, max(1, keys // size)",
        (f"{MODELS}::test_sixteen_bit_weights",),
    ),
    Fault(
        "weights-of-a-part-are-digested",
        "The digest of the weights depends on how many workers share them.",
        "workers/loading.py",
        "reader.hash_rest(wanted)",
        "reader.hash_rest(())",
        (f"{MODELS}::test_every_family_on_two_ranks[qwen3-moe]",),
    ),
    Fault(
        "only-the-first-rank-counts",
        "What the other ranks computed is not compared.",
        "engine/coordinator/rank_comparison.py",
        "    for place, rank in enumerate(ranks):",
        "    for place, rank in enumerate(ranks[:1]):",
        (f"{PROCESSES}::test_the_rank_the_step_and_the_request_are_named",),
    ),
    Fault(
        "prefixes-do-not-attract",
        "A request goes to the least busy replica, though another one has its prefix.",
        "engine/coordinator/replica.py",
        "pair[0].load - pair[1], -pair[1]",
        "pair[0].load, 0",
        (f"{ROUTING}::test_a_request_follows_the_longest_cached_prefix",),
    ),
    Fault(
        "prefixes-attract-at-any-load",
        "All requests with a common prefix go to one replica.",
        "engine/coordinator/replica.py",
        "pair[0].load - pair[1], -pair[1]",
        "-pair[1], pair[0].load",
        (f"{ROUTING}::test_a_replica_that_is_busier_than_the_prefix_saves_does_not_get_it",),
    ),
    Fault(
        "stages-are-not-compared",
        "What a stage took over is not compared with what the one before passed on.",
        "engine/coordinator/rank_comparison.py",
        "        elif place:",
        "        elif place < 0:",
        (f"{STAGED_PROCESSES}::test_the_stage_the_step_and_the_request_are_named",),
    ),
    Fault(
        "a-stage-passes-on-no-branch",
        "What the last layer of a stage has not added yet is lost.",
        "workers/models/base.py",
        "self._stage.link.pass_on(branch, residual)",
        "self._stage.link.pass_on(None, residual)",
        (f"{STAGES}::test_more_stages_and_ranks[llama-2-1]",),
    ),
    Fault(
        "every-stage-reads-rows-alone",
        "A stage before the last drops the rows of which only keys and values are needed.",
        "workers/models/base.py",
        "self.own_layers.stop - 1 if self._stage.is_last else None",
        "self.own_layers.stop - 1",
        (f"{STAGED_PROCESSES}::test_two_stages_with_chunks_preemption_and_a_prefix_cache",),
    ),
    Fault(
        "the-ring-is-read-before-it-is-written",
        "A stage does not wait for hidden states.",
        "workers/cpu/stage_link.py",
        "if self._writes else self._seen - self._count",
        "if self._writes else _RING_BYTES",
        (f"{STAGES}::test_bytes_arrive_in_order",),
    ),
    Fault(
        "a-stage-waits-for-all-tokens",
        "A stage is idle while the others compute the rest of a step.",
        "workers/cpu/stage_runner.py",
        "while any(not part.awaited.isdisjoint(ids) for _, part in self._passed_on):",
        "while self._passed_on:",
        (f"{STAGES}::test_a_part_waits_only_for_the_tokens_it_continues",),
    ),
    Fault(
        "a-stage-does-not-wait-for-tokens",
        "A request goes on before the last stage has said what it sampled.",
        "workers/cpu/stage_runner.py",
        "while any(not part.awaited.isdisjoint(ids) for _, part in self._passed_on):",
        "while False:",
        (f"{STAGES}::test_a_part_waits_only_for_the_tokens_it_continues",),
    ),
)
