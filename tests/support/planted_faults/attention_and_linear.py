"""Faults of the kernels of the CPU: attention, rope, norms, and linear layers."""

from __future__ import annotations

from planted_faults.fault import RANDOM_LIVES, Fault

ATTENTION = "kernels/attention/cpu.py"
ATTENTION_TILES = "kernels/attention/cpu_tiles.py"
LINEAR = "kernels/linear/cpu.py"
LINEAR_TILES = "kernels/linear/cpu_tiles.py"
ATTENTION_TESTS = "tests/kernels/test_attention.py"
LINEAR_TESTS = "tests/kernels/test_linear.py"
CHUNKS = f"{ATTENTION_TESTS}::test_decode_and_chunks_give_the_bits_of_the_whole_prompt"

ATTENTION_AND_LINEAR = (
    Fault(
        "sees-one-key-ahead",
        "A token attends to the one after it.",
        ATTENTION,
        "low, position + 1 - tile, left_scale",
        "low, position + 2 - tile, left_scale",
        (f"{ATTENTION_TESTS}::test_accuracy_against_float64",),
    ),
    Fault(
        "window-one-wider",
        "A window lets one key more be seen.",
        ATTENTION,
        "low = position - window + 1 - tile if window > 0 else 0",
        "low = position - window - tile if window > 0 else 0",
        (f"{ATTENTION_TESTS}::test_accuracy_against_float64",),
    ),
    Fault(
        "window-shifts-the-tiles",
        "Under a window tiles begin at any block, so that a token's sums depend on how its prompt was cut.",
        ATTENTION,
        "start = (first_position - window + 1) // TILE * TILE",
        "start = (first_position - window + 1) // BLOCK * BLOCK",
        (CHUNKS,),
    ),
    Fault(
        "third-block-of-a-tile-repeated",
        "The last block of a tile is never read.",
        ATTENTION,
        "n3 = table[first + min(3, last_block)]",
        "n3 = table[first + min(2, last_block)]",
        (f"{ATTENTION_TESTS}::test_accuracy_against_float64",),
    ),
    Fault(
        "masked-values-are-added",
        "Values that a token must not see are added with a weight of zero, which NaN survives.",
        ATTENTION,
        "        high = min(past, position + t + 1)",
        "        high = past",
        (f"{ATTENTION_TESTS}::test_masked_values_are_not_read",),
    ),
    Fault(
        "values-of-a-block-share-a-scale",
        "In an fp8 cache a value is read with the scale of the one that was written to its block last.",
        "kernels/rope/cpu.py",
        "v_scales + (first_slot + offset) * 4",
        "v_scales + first_slot * 4",
        (CHUNKS, "tests/kernels/test_fp8_cache.py::test_what_is_read_is_near_what_was_written"),
    ),
    Fault(
        "lone-rows-without-fma-in-attention",
        "A row that is computed alone rounds its scores otherwise than among others.",
        ATTENTION_TILES,
        "following += [fma(b, factor, keys[j], sums[i * BLOCKS + j]) for j in range(BLOCKS)]",
        "following += [b.fadd(b.fmul(factor, keys[j]), sums[i * BLOCKS + j]) if rows == 1"
        " else fma(b, factor, keys[j], sums[i * BLOCKS + j]) for j in range(BLOCKS)]",
        (CHUNKS, RANDOM_LIVES),
    ),
    Fault(
        "correction-left-out-of-the-sum",
        "The sum of weights is not rescaled when a later tile has a greater score.",
        ATTENTION_TILES,
        "store(b, b.fadd(rescaled, tile_sum), b.add(state, I64(4)))",
        "store(b, b.fadd(old_sum, tile_sum), b.add(state, I64(4)))",
        (f"{ATTENTION_TESTS}::test_accuracy_against_float64",),
    ),
    Fault(
        "small-steps-rotate-one-off",
        "In a step of a few rows all but the first are rotated as the token before them.",
        "kernels/rope/cpu.py",
        "            table + positions[t] * dim * 4,",
        "            table + (positions[t] - (0 < t < len(positions) < PARALLEL_ROWS and positions[t] > 0)) * dim * 4,",
        (CHUNKS,),
    ),
    Fault(
        "values-of-the-first-head-are-not-normed",
        "Where values are normed, those of the first key head are kept as they are.",
        "kernels/rope/cpu.py",
        "        if v_norm:\n",
        "        if v_norm and h > 0:\n",
        (f"{ATTENTION_TESTS}::test_rows_of_keys_that_are_values_and_of_queries_only",),
    ),
    Fault(
        "rows-with-keys-are-read-as-if-without",
        "Rows of queries and of keys that are values are taken to be as wide as rows of queries only.",
        ATTENTION,
        "    q_row_bytes, out_row_bytes = row_heads * dim * 4,",
        "    q_row_bytes, out_row_bytes = (row_heads if row_heads != heads + kv_heads else heads) * dim * 4,",
        (f"{ATTENTION_TESTS}::test_rows_of_keys_that_are_values_and_of_queries_only",),
    ),
    Fault(
        "norm-of-a-lone-row-reads-another-mean",
        "The mean of squares leaves out the epsilon where few rows are normalised.",
        "kernels/norms/cpu.py",
        "    run = _rms_norm.parallel if x.numel() >= PARALLEL_ELEMENTS else _rms_norm.serial\n    run(x.data_ptr()",
        "    run = _rms_norm.parallel if x.numel() >= PARALLEL_ELEMENTS else _rms_norm.serial\n"
        "    eps = eps if rows > 1 else 0.0\n    run(x.data_ptr()",
        ("tests/kernels/test_rowwise.py::test_rms_norm",),
    ),
    Fault(
        "lone-rows-without-fma-in-matmuls",
        "A row that is multiplied alone rounds otherwise than among others.",
        LINEAR_TILES,
        "return [fma(b, factors[i], columns[j], sums[i * VECTORS + j]) for i, j, _ in places]",
        "return [b.fadd(b.fmul(factors[i], columns[j]), sums[i * VECTORS + j]) if rows == 1"
        " else fma(b, factors[i], columns[j], sums[i * VECTORS + j]) for i, j, _ in places]",
        (f"{LINEAR_TESTS}::test_rows_do_not_depend_on_their_number_or_place",),
    ),
    Fault(
        "pairs-from-the-odd-element-on",
        "Of two terms that are added together the later one comes first.",
        "kernels/linear/cpu_pairs.py",
        "for one, other in zip(halves(b, x), halves(b, column), strict=True):",
        "for one, other in reversed(list(zip(halves(b, x), halves(b, column), strict=True))):",
        ("tests/kernels/test_bfloat16_linear.py::test_the_instruction_gives_the_bits_of_the_steps_it_stands_for",),
    ),
    Fault(
        "odd-depth-with-what-was-there",
        "The last term of an odd K is multiplied by whatever the memory holds.",
        "kernels/linear/cpu_pairs.py",
        "        store(b, upper, at)\n",
        "",
        ("tests/kernels/test_bfloat16_linear.py::test_rounding_is_that_of_torch_with_a_zero_after_an_odd_count",),
    ),
    Fault(
        "bias-of-the-first-panel",
        "All panels of 32 columns get the bias of the first.",
        LINEAR,
        "add_rows(bias + first_column * 4, 0,",
        "add_rows(bias, 0,",
        (f"{LINEAR_TESTS}::test_accuracy_against_float64",),
    ),
    Fault(
        "last-panel-written-past-its-row",
        "The columns that fill up the last panel are written into the next row.",
        LINEAR,
        "out_at, columns * 4, block_rows, width)\n            keep(part)",
        "out_at, columns * 4, block_rows, PANEL)\n            keep(part)",
        (f"{LINEAR_TESTS}::test_nothing_is_written_past_a_row",),
    ),
    Fault(
        "row-scales-of-the-first-block",
        "Beyond 240 rows each gets the fp8 scale of another one.",
        LINEAR,
        "scales_at = row_scales + first_row * leaves * 4 if",
        "scales_at = row_scales if",
        ("tests/kernels/test_fp8.py::test_rows_do_not_depend_on_their_number_or_place",),
    ),
    Fault(
        "sinks-of-the-first-group",
        "Heads that share a key head have the sinks of those that share the first.",
        ATTENTION,
        "sinks[head * group + i % group]",
        "sinks[i % group]",
        (f"{ATTENTION_TESTS}::test_sinks",),
    ),
    Fault(
        "clamped-on-one-side",
        "The other half of a clamped activation may be far below zero.",
        "kernels/activation/cpu.py",
        'up = b.select(b.fcmp_ordered("<", up, least), least, up)',
        'up = b.select(b.fcmp_ordered("<", up, least), up, up)',
        ("tests/kernels/test_activations.py::test_clamped_is_that_of_float64",),
    ),
    Fault(
        "upper-bits-first",
        "Of two numbers of 4 bits in a byte the second is taken for the first.",
        "kernels/packed/codes.py",
        "torch.stack([pairs & 15, pairs >> 4], dim=-1)",
        "torch.stack([pairs >> 4, pairs & 15], dim=-1)",
        ("tests/workers/test_gpt_oss.py::test_every_code_and_scale_is_exact",),
    ),
    Fault(
        "smallest-scale-is-zero",
        "A block with the smallest scale is read as zeros.",
        "kernels/packed/codes.py",
        "torch.where(wide > 0, wide << 23, _SMALLEST)",
        "(wide << 23)",
        ("tests/workers/test_gpt_oss.py::test_every_code_and_scale_is_exact",),
    ),
    Fault(
        "experts-compute-the-first-row",
        "On a CPU every expert of a step computes the first row.",
        "kernels/moe/cpu.py",
        "tokens[places[g]] = t",
        "tokens[places[g]] = 0",
        ("tests/workers/test_moe.py::test_a_row_alone_has_its_bits",),
    ),
    Fault(
        "panels-between-threads-are-lost",
        "Of the weights of several rows, the last panel before another thread's first is computed by none.",
        "kernels/linear/cpu_groups.py",
        "min(num_panels, -((before - last) // cost))",
        "min(num_panels, -((before - last) // cost) - 1)",
        ("tests/kernels/test_group_linear.py::test_every_row_has_the_bits_of_its_own_weight",),
    ),
    Fault(
        "gates-not-taken-apart",
        "Outputs of gates that take turns with the others are taken for the first half.",
        "workers/layers/moe.py",
        "halves = (*range(0, 2 * inner, 2), *range(1, 2 * inner, 2))",
        "halves = tuple(range(2 * inner))",
        ("tests/workers/test_families.py::test_greedy_tokens_are_those_of_transformers_and_bits_their_own[gpt-oss]",),
    ),
)
