"""Faults of the GPU's kernels, which Triton's interpreter runs on the CPU."""

from __future__ import annotations

from planted_faults.fault import Fault

DECODE_INPUTS = "kernels/decode_inputs/gpu.py"
INPUT_TESTS = "tests/kernels/interpreter/test_decode_inputs.py"
TESTS = "tests/kernels/interpreter/test_interpreted.py"
DISPATCH = "kernels/moe/gpu_dispatch.py"
SCORES = "kernels/moe/gpu_scores.py"
EXPERT_TESTS = "tests/kernels/interpreter/test_moe.py"

GPU_KERNELS = (
    Fault(
        "new-block-not-entered",
        "A block that a request gets while it decodes is used once and then forgotten.",
        DECODE_INPUTS,
        "            tl.store(table + index, new_block)",
        "            tl.store(table + index, new_block, mask=index < 0)",
        (f"{INPUT_TESTS}::test_decode_inputs",),
    ),
    Fault(
        "context-without-the-token-of-the-step",
        "A decoding token does not see its own key.",
        DECODE_INPUTS,
        "        tl.store(context_lens + row, position + 1)",
        "        tl.store(context_lens + row, position)",
        (f"{INPUT_TESTS}::test_decode_inputs",),
    ),
    Fault(
        "tables-cut-at-256-blocks",
        "Of a context of more than 256 blocks the later tables are not gathered.",
        DECODE_INPUTS,
        "        for start in range(0, index + 1, CHUNK):",
        "        for start in range(0, tl.minimum(index + 1, CHUNK), CHUNK):",
        (f"{INPUT_TESTS}::test_decode_inputs",),
    ),
    Fault(
        "padding-records-a-token",
        "Rows that fill up a graph overwrite the last token of a request.",
        DECODE_INPUTS,
        "    tl.store(last_tokens + slot, token, mask=slot >= 0)",
        "    tl.store(last_tokens + tl.maximum(slot, 0), token, mask=row < num_rows)",
        (f"{INPUT_TESTS}::test_record_tokens",),
    ),
    Fault(
        "drafts-go-on-past-their-end",
        "A draft model makes one draft more than was asked for.",
        DECODE_INPUTS,
        "(position < tl.load(ends + row))",
        "(position <= tl.load(ends + row))",
        (f"{INPUT_TESTS}::test_next_draft_rows",),
    ),
    Fault(
        "norm-of-what-is-not-rounded",
        "What is normalised is not what the next layer reads.",
        "kernels/norms/gpu.py",
        "_normalised(total.to(tl.float32), w, width, eps)",
        "_normalised(value, w, width, eps)",
        (f"{TESTS}::test_norms_and_embedding",),
    ),
    Fault(
        "bias-left-out-of-the-last-columns",
        "Columns in the last tile of a matmul get the bias of another one.",
        "kernels/linear/gpu.py",
        "acc += tl.load(bias + n_in).to(tl.float32)[:, None]",
        "acc += tl.load(bias + n % BN).to(tl.float32)[:, None]",
        (f"{TESTS}::test_linear",),
    ),
    Fault(
        "gate-not-rounded-in-the-fused-matmul",
        "The matmul fused with its activation gives other bits than the two in turn.",
        "kernels/linear/gpu.py",
        "gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)",
        "up = up.to(dtype).to(tl.float32)",
        (f"{TESTS}::test_the_fused_matmul_has_the_bits_of_the_two_in_turn",),
    ),
    Fault(
        "window-one-wider-on-a-gpu",
        "A window lets one key more be seen.",
        "kernels/attention/gpu_tiles.py",
        "seen = seen & (key[None, :] > position[:, None] - WINDOW)",
        "seen = seen & (key[None, :] >= position[:, None] - WINDOW)",
        (f"{TESTS}::test_attention",),
    ),
    Fault(
        "second-split-not-merged",
        "Of a context of several splits that run side by side, the last one is left out.",
        "kernels/attention/gpu.py",
        "    for s in range(begin // SPLIT, position // SPLIT + 1):",
        "    for s in range(begin // SPLIT, tl.maximum(position // SPLIT, 1)):",
        (f"{TESTS}::test_attention",),
    ),
    Fault(
        "scores-without-their-cap",
        "Scores of attention are not capped where every key is seen.",
        "kernels/attention/gpu_tiles.py",
        "        if SOFT_CAP > 0:",
        "        if SOFT_CAP > 0 and MASKED:",
        (f"{TESTS}::test_attention",),
    ),
    Fault(
        "tanh-without-its-sign",
        "tanh of a number far below 0 is that of its magnitude.",
        "kernels/activation/gpu.py",
        "tl.where(x < 0.0, -large, large)",
        "large",
        (f"{TESTS}::test_gelu_and_soft_caps",),
    ),
    Fault(
        "of-equal-experts-the-last",
        "Of experts with equal logits the higher comes first.",
        DISPATCH,
        "tl.min(tl.where(x == value, e, BLOCK_E), axis=1)",
        "tl.max(tl.where(x == value, e, -1), axis=1)",
        (f"{EXPERT_TESTS}::test_route",),
    ),
    Fault(
        "rows-of-an-expert-backwards",
        "The sort of pairs by experts is not stable.",
        DISPATCH,
        "(local[None, :] < local[:, None])",
        "(local[None, :] > local[:, None])",
        (f"{EXPERT_TESTS}::test_sort",),
    ),
    Fault(
        "chunks-in-one-place",
        "Rows of a later chunk take the places of those before them.",
        DISPATCH,
        "    place = ends - total + before",
        "    place = ends - total",
        (f"{EXPERT_TESTS}::test_sort",),
    ),
    Fault(
        "experts-of-the-row-before",
        "A pair is computed with the activations of another row.",
        "kernels/moe/gpu.py",
        "    row = pair // PAIRS_OF_ROW",
        "    row = (pair + 1) // PAIRS_OF_ROW",
        (f"{EXPERT_TESTS}::test_experts_are_those_of_the_ordinary_matmuls",),
    ),
    Fault(
        "experts-added-backwards",
        "The parts of a row's experts are added from the last rank to the first.",
        "kernels/moe/gpu.py",
        "    for k in range(1, K):\n        total += tl.load(weights + row * K + k) * tl.load(at + k * width,",
        "    for k in range(K - 1, 0, -1):\n        total += tl.load(weights + row * K + k) * tl.load(at + k * width,",
        (f"{EXPERT_TESTS}::test_parts_are_added_as_on_a_cpu",),
    ),
    Fault(
        "group-by-its-best-alone",
        "A row keeps the groups with the best expert, not those with the best two.",
        SCORES,
        'totals = tl.where(group == g, first + tl.max(tl.where(e == best, float("-inf"), own), axis=0), totals)',
        "totals = tl.where(group == g, first, totals)",
        (f"{EXPERT_TESTS}::test_sigmoid_scores",),
    ),
    Fault(
        "weights-without-their-scale",
        "Weights by sigmoid scores are not scaled.",
        SCORES,
        'tl.where(before == before, score * scale, float("nan"))',
        'tl.where(before == before, score, float("nan"))',
        (f"{EXPERT_TESTS}::test_sigmoid_scores",),
    ),
    Fault(
        "gate-of-a-shared-expert-is-its-logit",
        "The expert of every row is multiplied by the logit of its gate.",
        SCORES,
        "value *= _sigmoid(tl.load(gate + row))",
        "value *= tl.load(gate + row)",
        (f"{EXPERT_TESTS}::test_shared_expert",),
    ),
    Fault(
        "draft-after-a-wrong-one-is-accepted-on-a-gpu",
        "A token sampled after a rejected draft is added to the sequence.",
        "kernels/sampling/gpu_verify.py",
        "accepted = follows & (drafted == token) &",
        "accepted = follows & (drafted >= 0) &",
        ("tests/kernels/interpreter/test_sampling.py::test_verification_equals_decoding_one_by_one_on_the_cpu",),
    ),
)
