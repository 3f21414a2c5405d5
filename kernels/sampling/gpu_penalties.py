"""GPU kernels: the changes of logits before sampling, from device arrays per slot (see `penalties.py`).

They write a copy: the raw logits are kept for the log-probabilities. Every element belongs to one program lane and is
computed with one IEEE rounding per operation, so a row without changes is not affected by one with them.
"""

# R rows, V vocabulary

from __future__ import annotations

from typing import Any

import triton.language as tl

from sempre.kernels.gpu_jit import jit
from sempre.kernels.sampling import gpu_table
from sempre.kernels.sampling.gpu_elementary import saturated

_FLAGS, _EDITS = tl.constexpr(gpu_table.FLAGS), tl.constexpr(gpu_table.EDITS)
_WORDS = tl.constexpr(gpu_table.WORDS)
_REPETITION, _FREQUENCY = tl.constexpr(gpu_table.REPETITION), tl.constexpr(gpu_table.FREQUENCY)
_PRESENCE, _MIN_POSITION = tl.constexpr(gpu_table.PRESENCE), tl.constexpr(gpu_table.MIN_POSITION)
_NUM_PHRASES, _PHRASE_WIDTH = tl.constexpr(gpu_table.NUM_PHRASES), tl.constexpr(gpu_table.PHRASE_WIDTH)
_OUTPUT_START = tl.constexpr(gpu_table.OUTPUT_START)
_MASK, _END_MASK, _BIAS = (
    tl.constexpr(gpu_table.MASK),
    tl.constexpr(gpu_table.END_MASK),
    tl.constexpr(gpu_table.BIAS),
)
_COUNTS, _HISTORY = tl.constexpr(gpu_table.COUNTS), tl.constexpr(gpu_table.HISTORY)
_PHRASES = tl.constexpr(gpu_table.PHRASES)
_GRAMMAR = tl.constexpr(gpu_table.GRAMMAR)
_IN_PROMPT = tl.constexpr(gpu_table.IN_PROMPT)


@jit()
def _forbid_bits(x: Any, ids: Any, valid: Any, address: Any) -> Any:
    word = tl.load(address.to(tl.pointer_type(tl.int32)) + (ids >> 5), mask=valid, other=0)
    return tl.where(((word >> (ids & 31)) & 1) != 0, float("-inf"), x)


@jit()
def _penalise(x: Any, ids: Any, valid: Any, words: Any, address: Any, drafted: Any) -> Any:
    """`penalties.apply_penalties`, on the tokens whose count is not 0; `drafted` adds to it."""
    repetition = tl.load(words + _REPETITION).to(tl.float32, bitcast=True)
    frequency = tl.load(words + _FREQUENCY).to(tl.float32, bitcast=True)
    presence = tl.load(words + _PRESENCE).to(tl.float32, bitcast=True)
    word = tl.load(address.to(tl.pointer_type(tl.int32)) + ids, mask=valid, other=0) + drafted
    count = word & (_IN_PROMPT - 1)
    y = x
    if repetition != 1.0:
        y = tl.where(y > 0.0, tl.div_rn(y, repetition), y * repetition)
    if frequency != 0.0:
        y = y - frequency * count.to(tl.float32)
    if presence != 0.0:
        y = tl.where(count > 0, y - presence, y)
    return tl.where(word != 0, saturated(y, x), x)


@jit()
def edit(
    logits: Any,
    edited: Any,
    row_slots: Any,
    positions: Any,
    table: Any,
    addresses: Any,
    row_errors: Any,
    offsets: Any,
    inputs: Any,
    vocabulary: Any,
    BLOCK: tl.constexpr,
    VERIFIES: tl.constexpr,
) -> None:
    """edited[r] (float32 [R, V]) = logits[r] with masks, bias and penalties, for the rows whose flags request it.

    VERIFIES: the last offsets[r] tokens before row r's are drafts, the inputs of its own row and of those before. Sets
    row_errors[r] (int32) where the raw logits hold NaN or +inf, which a mask could hide.
    """
    row = tl.program_id(1)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    words = table + slot.to(tl.int64) * _WORDS
    if (tl.load(words + _FLAGS) & _EDITS) == 0:
        return
    tensors = addresses + slot.to(tl.int64) * (_WORDS // 2)
    ids = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = ids < vocabulary
    start = row.to(tl.int64) * vocabulary
    x = tl.load(logits + start + ids, mask=valid, other=0.0).to(tl.float32)
    # a NaN fails the comparison
    if tl.max(tl.where(x < float("inf"), 0, 1), axis=0) > 0:
        tl.store(row_errors + row, 1)
    mask = tl.load(tensors + _MASK)
    if mask != 0:
        x = _forbid_bits(x, ids, valid, mask)
    grammar = tl.load(tensors + _GRAMMAR)
    if grammar != 0:
        x = _forbid_bits(x, ids, valid, grammar)
    end_mask = tl.load(tensors + _END_MASK)
    if end_mask != 0:  # noqa: SIM102, Triton has no short circuit
        if tl.load(positions + row) < tl.load(words + _MIN_POSITION):
            x = _forbid_bits(x, ids, valid, end_mask)
    bias = tl.load(tensors + _BIAS)
    if bias != 0:
        x = x + tl.load(bias.to(tl.pointer_type(tl.float32)) + ids, mask=valid, other=0.0)
    counts = tl.load(tensors + _COUNTS)
    if counts != 0:
        drafted = tl.zeros([BLOCK], tl.int32)
        if VERIFIES:
            for back in range(tl.load(offsets + row)):
                drafted += (ids == tl.load(inputs + row - back)).to(tl.int32)
        x = _penalise(x, ids, valid, words, counts, drafted)
    tl.store(edited + start + ids, x, mask=valid)


@jit()
def forbid_phrases(
    edited: Any,
    row_slots: Any,
    positions: Any,
    table: Any,
    addresses: Any,
    offsets: Any,
    inputs: Any,
    vocabulary: Any,
    BLOCK: tl.constexpr,
    VERIFIES: tl.constexpr,
) -> None:
    """Set the token of edited[r] to -inf that would complete a phrase whose beginning ends the output so far.

    One program per row; BLOCK phrases at a time.
    """
    row = tl.program_id(0)
    slot = tl.load(row_slots + row)
    if slot < 0:
        return
    words = table + slot.to(tl.int64) * _WORDS
    num_phrases, width = tl.load(words + _NUM_PHRASES), tl.load(words + _PHRASE_WIDTH)
    if num_phrases == 0:
        return
    tensors = addresses + slot.to(tl.int64) * (_WORDS // 2)
    history = tl.load(tensors + _HISTORY).to(tl.pointer_type(tl.int32))
    phrases = tl.load(tensors + _PHRASES).to(tl.pointer_type(tl.int32))
    position = tl.load(positions + row).to(tl.int32)
    output_start = tl.load(words + _OUTPUT_START)
    for first in range(0, num_phrases, BLOCK):
        index = first + tl.arange(0, BLOCK)
        exists = index < num_phrases
        phrase = phrases + index.to(tl.int64) * (1 + width)
        length = tl.load(phrase, mask=exists, other=0)
        begin = position - length + 1
        matches = exists & (begin >= output_start)
        for offset in range(width - 1):
            compared = matches & (offset < length - 1)
            at = begin + offset
            known = compared
            if VERIFIES:
                known = compared & (at < position - tl.load(offsets + row))
            seen = tl.load(history + at, mask=known, other=0)
            if VERIFIES:
                drafted = tl.load(inputs + row - (position - 1 - at), mask=compared & ~known, other=0).to(tl.int32)
                seen = tl.where(known, seen, drafted)
            matches = matches & (
                (seen == tl.load(phrase + 1 + offset, mask=compared, other=0)) | (offset >= length - 1)
            )
        last = tl.load(phrase + length, mask=matches, other=0)
        tl.store(edited + row.to(tl.int64) * vocabulary + last, float("-inf"), mask=matches)
