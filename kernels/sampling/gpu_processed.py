"""GPU kernel: the logits that tokens are drawn from, without the noise, for the rows that report them.

Every element is computed as the argmax computes it (`gpu_noise.best_of_tiles`), with the same bits.
"""

# R rows, V vocabulary

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import divided, load_logits
from sempre.kernels.sampling.gpu_noise import keep_prefix

_FLAGS, _TEMPERATURE = tl.constexpr(gpu_table.FLAGS), tl.constexpr(gpu_table.TEMPERATURE)
_EDITS, _TRUNCATES = tl.constexpr(gpu_table.EDITS), tl.constexpr(gpu_table.TRUNCATES)
_KEEPS_PROCESSED, _WORDS = tl.constexpr(gpu_table.KEEPS_PROCESSED), tl.constexpr(gpu_table.WORDS)


@jit()
def keep_processed(
    logits: Any,
    edited: Any,
    row_slots: Any,
    table: Any,
    cut_keys: Any,
    cut_ids: Any,
    vocabulary: Any,
    EDITS: tl.constexpr,
    TRUNCATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """edited[r] (float32 [R, V]) = logits[r] (or `edited`) after the temperature and the cut, where flags request it.

    Each program owns BLOCK ids of one row, which it reads before it writes them.
    """
    row = tl.program_id(1)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    words = table + slot.to(tl.int64) * _WORDS
    flags = tl.load(words + _FLAGS)
    if (flags & _KEEPS_PROCESSED) == 0:
        return
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = row.to(tl.int64) * vocabulary
    x = load_logits(logits + start, edited + start, flags & _EDITS, ids, vocabulary, EDITS)
    temperature = tl.load(words + _TEMPERATURE).to(tl.float32, bitcast=True)
    if temperature != 0.0:
        if temperature != 1.0:
            x = divided(x, temperature)
        if TRUNCATES:  # noqa: SIM102, a constant and a value
            if (flags & _TRUNCATES) != 0:
                x = keep_prefix(x, ids, tl.load(cut_keys + row), tl.load(cut_ids + row))
    tl.store(edited + start + ids, x, mask=ids < vocabulary)
