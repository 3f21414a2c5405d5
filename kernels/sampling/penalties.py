"""Changes of one row of logits, in place, in plain numpy float32: every operation is one IEEE rounding per element.

Each touches only the listed ids, so its cost does not grow with the vocabulary (except `allow_only` and `allow_bits`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]
_LARGEST = np.finfo(np.float32).max
Ids = npt.NDArray[np.int64]


def allow_only(row: Row, token_ids: Ids) -> None:
    """Set everything but `token_ids` to -inf."""
    kept = row[token_ids]
    row.fill(-np.inf)
    row[token_ids] = kept


def allow_bits(row: Row, words: npt.NDArray[np.int32]) -> None:
    """Set to -inf every token whose bit is 0.

    Id v is bit v % 32 of words[v // 32]; ids beyond the words are forbidden.
    """
    allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: row.size]
    row[: allowed.size][allowed == 0] = -np.inf
    row[allowed.size :] = -np.inf


def forbid(row: Row, token_ids: Ids) -> None:
    """Set `token_ids` to -inf."""
    row[token_ids] = -np.inf


def add_bias(row: Row, token_ids: Ids, bias: Row) -> None:
    """row[token_ids] += bias; the ids are distinct."""
    row[token_ids] += bias


def apply_penalties(
    row: Row,
    token_ids: Ids,
    in_prompt: npt.NDArray[np.bool_],
    output_counts: npt.NDArray[np.int32],
    *,
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Penalise distinct `token_ids`, of which `in_prompt` are in the prompt and `output_counts` were generated.

    In this order: repetition divides positive logits and multiplies others, for tokens of prompt or output; frequency
    is subtracted once per generated occurrence (one multiply, one subtract); presence once if there is any. A finite
    logit stays finite: beyond float32 it is the largest number.
    """
    raw = x = row[token_ids]
    generated = output_counts > 0
    if repetition != 1.0:
        factor = np.float32(repetition)
        x = np.where(in_prompt | generated, np.where(x > 0, x / factor, x * factor), x)
    if frequency != 0.0:
        x = x - np.float32(frequency) * output_counts.astype(np.float32)
    if presence != 0.0:
        x = np.where(generated, x - np.float32(presence), x)
    row[token_ids] = np.where(np.isfinite(raw), np.clip(x, -_LARGEST, _LARGEST), x)
