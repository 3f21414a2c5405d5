"""The float32 bits of a log-probability, which arrives as a Python float of the same value."""

from __future__ import annotations

import struct
from collections.abc import Iterable


def float32_bits(logprob: float) -> int:
    """Return the bit pattern of a value that a float32 holds exactly.

    Any NaN has the bits 0x7fc00000, since Python keeps no others. Raises OverflowError for a value beyond float32.
    """
    if logprob != logprob:
        return 0x7FC00000
    bits: int = struct.unpack("<I", struct.pack("<f", logprob))[0]
    return bits


def from_bits(bits: int) -> float:
    """Return the value of a bit pattern."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def float32_bytes(values: Iterable[float]) -> bytes:
    """Return the float32 of each value, little-endian."""
    return b"".join(float32_bits(value).to_bytes(4, "little") for value in values)


def shown_logprob(logprob: float) -> str:
    """Return the value with its bits, for a message."""
    return f"{logprob!r} (0x{float32_bits(logprob):08x})"


def ulps_between(a: float, b: float) -> int:
    """Return how many float32 values apart two finite values are."""
    return abs(_ordered(float32_bits(a)) - _ordered(float32_bits(b)))


def _ordered(bits: int) -> int:
    """Map bit patterns to integers in the order of their values."""
    return bits if bits < 0x80000000 else 0x80000000 - bits
