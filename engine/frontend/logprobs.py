"""Unpacks rows of log-probabilities for users."""

from __future__ import annotations

import sys
from array import array
from typing import TypeVar

from sempre.engine.outputs import Logprob
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import LogprobRows

Number = TypeVar("Number", int, float)


def unpack_logprobs(rows: LogprobRows, tokenizer: Tokenizer | None) -> list[dict[int, Logprob]]:
    """Return one dict per row: the row's own token first, then the k best, then those requested by id, each once.

    Every `logprob` is exactly the worker's float32. `decoded_token` needs a tokenizer. Raises MessageMalformed if
    the packed sizes are inconsistent.
    """
    token_ids = _unpack("token_ids", array("i"), rows.token_ids, rows.num_rows * rows.width)
    logprobs = _unpack("logprobs", array("f"), rows.logprobs, rows.num_rows * rows.width)
    ranks = _unpack("ranks", array("i"), rows.ranks, rows.num_rows)
    num_listed = len(rows.listed_ranks) // (4 * rows.num_rows) if rows.num_rows else 0
    listed_ranks = _unpack("listed_ranks", array("i"), rows.listed_ranks, rows.num_rows * num_listed)
    first_listed = rows.width - num_listed
    unpacked = []
    for row in range(rows.num_rows):
        entries: dict[int, Logprob] = {}
        start = row * rows.width
        for column in range(rows.width):
            token_id = token_ids[start + column]
            if token_id in entries:
                continue
            if column >= first_listed:
                rank = listed_ranks[row * num_listed + column - first_listed]
            else:
                rank = column or ranks[row]
            text = None if tokenizer is None else tokenizer.token_text(token_id)
            entries[token_id] = Logprob(logprobs[start + column], rank, text)
        unpacked.append(entries)
    return unpacked


def _unpack(field: str, values: array[Number], data: bytes, count: int) -> array[Number]:
    """Fill the empty `values` from little-endian bytes."""
    if len(data) != count * values.itemsize:
        raise MessageMalformed(
            f"LogprobRows.{field}: expected {count * values.itemsize} bytes, found {len(data)}.", field=field
        )
    values.frombytes(data)
    if sys.byteorder == "big":
        values.byteswap()
    return values
