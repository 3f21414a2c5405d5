"""A rolling digest over an output, of which four bytes are kept per position, so that the first difference is found.

    h[-1] = SHA-256("sempre/output-chain/v1\\0")
    h[i]  = SHA-256(h[i-1] + token id i (uint32, little-endian) + float32 bits of its log-probability (little-endian))

The mark of position i is h[i][:4]; the digest of the output is the last h. Two outputs that first differ at position i
have other marks from there on, each equal by chance with a probability of 2**-32.

A second chain of the same form covers whole distributions, where a request reports them: for each position, the digest
of the row's token ids (int32) and log-probabilities (float32) in the order in which they are reported.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence

MARK_BYTES = 4
_START = hashlib.sha256(b"sempre/output-chain/v1\0").digest()


class OutputChain:
    """The digest of an output that grows."""

    def __init__(self) -> None:
        self._state = _START
        self._marks = bytearray()

    def add(self, entry: bytes) -> None:
        """Add one position."""
        self._state = hashlib.sha256(self._state + entry).digest()
        self._marks += self._state[:MARK_BYTES]

    def add_tokens(self, token_ids: Sequence[int], logprobs: bytes, stride: int) -> None:
        """Add tokens; the float32 of the first begins `logprobs`, that of each next one is `stride` bytes further."""
        for place, token_id in enumerate(token_ids):
            self.add(token_id.to_bytes(4, "little") + logprobs[place * stride : place * stride + 4])

    def add_rows(self, token_ids: bytes, logprobs: bytes, count: int, stride: int) -> None:
        """Add whole rows, each `stride` bytes of either."""
        for start in range(0, count * stride, stride):
            self.add(token_ids[start : start + stride] + logprobs[start : start + stride])

    @property
    def digest(self) -> str:
        """SHA-256 of everything so far, in hex digits."""
        return self._state.hex()

    @property
    def marks(self) -> bytes:
        """Four bytes per position."""
        return bytes(self._marks)

    @property
    def state(self) -> bytes:
        """The whole of the last h."""
        return self._state


def first_difference(a: bytes, b: bytes) -> int | None:
    """Return the first position whose marks differ, None if one output begins with the whole other one."""
    for position in range(min(len(a), len(b)) // MARK_BYTES):
        at = slice(position * MARK_BYTES, (position + 1) * MARK_BYTES)
        if a[at] != b[at]:
            return position
    return None


def recorded_bits(state: bytes, token_id: int, near: int, mark: bytes, reach: int) -> int | None:
    """Return the float32 bits of a log-probability that a mark was made of, searched around the bits `near`.

    `state` is the h before the position. Looks at most `reach` bit patterns away, the nearest first; None if none of
    them fits. A wrong one fits with a probability of `reach` * 2**-31.
    """
    head = state + token_id.to_bytes(4, "little")
    for bits in _around(near, reach):
        if hashlib.sha256(head + struct.pack("<I", bits)).digest()[:MARK_BYTES] == mark:
            return bits
    return None


def _around(near: int, reach: int) -> Iterator[int]:
    yield near
    for distance in range(1, reach + 1):
        for bits in (near - distance, near + distance):
            if 0 <= bits < 2**32:
                yield bits
