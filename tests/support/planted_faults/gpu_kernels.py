"""Faults of the GPU's kernels, which Triton's interpreter runs on the CPU."""

from __future__ import annotations

from planted_faults.fault import Fault

DECODE_INPUTS = "kernels/decode_inputs/gpu.py"
INPUT_TESTS = "tests/kernels/interpreter/test_decode_inputs.py"
TESTS = "tests/kernels/interpreter/test_interpreted.py"

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
        "Columns in the last tile of a product get the bias of another one.",
        "kernels/linear/gpu.py",
        "acc += tl.load(bias + n_in).to(tl.float32)[:, None]",
        "acc += tl.load(bias + n % BN).to(tl.float32)[:, None]",
        (f"{TESTS}::test_linear",),
    ),
    Fault(
        "gate-not-rounded-in-the-fused-product",
        "The fused product with its activation gives other bits than the two in turn.",
        "kernels/linear/gpu.py",
        "silu_times(gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32))",
        "silu_times(gate, up.to(dtype).to(tl.float32))",
        (f"{TESTS}::test_the_fused_product_has_the_bits_of_the_two_in_turn",),
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
        "draft-behind-a-wrong-one-stands-on-a-gpu",
        "A token sampled behind a rejected draft joins the sequence.",
        "kernels/sampling/gpu_verify.py",
        "stands = follows & (drafted == token) &",
        "stands = follows & (drafted >= 0) &",
        ("tests/kernels/interpreter/test_sampling.py::test_verification_equals_decoding_one_by_one_on_the_cpu",),
    ),
)
