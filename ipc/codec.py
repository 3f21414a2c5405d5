"""Messages to bytes and back. One encoder and one decoder per direction of a link, reused for every frame.

A frame is a 16-byte header and the message in msgpack:

    magic (4) | CRC-32 of all that follows (4, little-endian) | sequence number (8, little-endian) | message

The checksum is there because a flipped bit in a token id would decode to another one; the sequence number, because we
would otherwise wait forever for a frame that never arrives. Sequence number 0 is not counted: it marks replies to peers
that have not been accepted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Mapping
from itertools import chain
from types import UnionType
from typing import Generic, TypeVar, get_args

import msgspec

from sempre.ipc.errors import MessageMalformed, MessageTooLarge
from sempre.ipc.field_path import field_path
from sempre.ipc.messages import CallMethod, CallMethodReply, CallWorkers, CallWorkersReply, Message

MAGIC = b"SMP\x01"
UNSEQUENCED = 0
_HEADER = struct.Struct("<4sIQ")
_SEQUENCE = struct.Struct("<Q")
_CHECKED_FROM = 8
HEADER_BYTES = _HEADER.size
MAX_DEPTH = 64
_FREE_FORM: Mapping[type, tuple[str, ...]] = {
    CallWorkers: ("args", "kwargs"),
    CallMethod: ("args", "kwargs"),
    CallMethodReply: ("result",),
    CallWorkersReply: ("results",),
}
_SHOWN = 200

MessageT = TypeVar("MessageT", bound=Message)


class FrameEncoder:
    """Encodes messages into frames of at most `limit_bytes`."""

    def __init__(self, limit_bytes: int) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._limit_bytes = limit_bytes

    def encode(self, message: Message, sequence: int) -> bytearray:
        """Raises MessageTooLarge; TypeError when a free-form value has no msgpack form, or is nested too deeply."""
        frame = bytearray(HEADER_BYTES)
        check_depth(message)
        try:
            self._encoder.encode_into(message, frame, HEADER_BYTES)
        # an integer beyond 64 bits, half of a surrogate pair
        except (OverflowError, UnicodeEncodeError) as error:
            raise TypeError(f"{type(message).__name__}: {error}") from error
        _refuse_large(len(frame), self._limit_bytes, type(message).__name__)
        _SEQUENCE.pack_into(frame, _CHECKED_FROM, sequence)
        _HEADER.pack_into(frame, 0, MAGIC, zlib.crc32(memoryview(frame)[_CHECKED_FROM:]), sequence)
        return frame


class FrameDecoder(Generic[MessageT]):
    """Decodes frames of one direction; `messages` is the union of the types that may arrive on it."""

    def __init__(self, messages: UnionType, limit_bytes: int) -> None:
        self._decoder = msgspec.msgpack.Decoder(messages)
        self._types = {member.__name__: member for member in get_args(messages)}
        self._limit_bytes = limit_bytes

    def decode(self, frame: bytes | bytearray | memoryview) -> tuple[int, MessageT]:
        """The frame's sequence number and message. Raises MessageTooLarge (before decoding) or MessageMalformed."""
        _refuse_large(len(frame), self._limit_bytes, "frame")
        if len(frame) < HEADER_BYTES:
            raise MessageMalformed(f"expected a header of {HEADER_BYTES} bytes, found {len(frame)}", field="header")
        magic, checksum, sequence = _HEADER.unpack_from(frame)
        if magic != MAGIC:
            raise MessageMalformed(f"magic: expected {MAGIC!r}, found {magic!r}", field="magic")
        view = memoryview(frame)
        found = zlib.crc32(view[_CHECKED_FROM:])
        if found != checksum:
            raise MessageMalformed(f"checksum: expected {checksum:08x}, found {found:08x}", field="checksum")
        return sequence, self._decode_message(view[HEADER_BYTES:])

    def _decode_message(self, payload: memoryview) -> MessageT:
        try:
            message: MessageT = self._decoder.decode(payload)
            check_depth(message)
        except msgspec.ValidationError as error:
            field = field_path(str(error), payload, self._types)
            # Not chained: the decoder's text may be as long as the frame.
            raise MessageMalformed(f"{field}: {_short(error)}", field=field) from None
        except TypeError as error:
            raise MessageMalformed(str(error), field="$") from None
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError, RecursionError) as error:
            raise MessageMalformed(f"not a message: {_short(error)}", field="$") from None
        return message


def check_depth(message: object) -> None:
    """Raise TypeError when a free-form value of `message` is nested deeper than every process can walk."""
    for name in _FREE_FORM.get(type(message), ()):
        level: list[object] = [getattr(message, name)]
        for _ in range(MAX_DEPTH):
            # by identity: what is reachable by several paths is walked once
            level = list({id(part): part for value in level for part in _parts(value)}.values())
            if not level:
                break
        else:
            raise TypeError(f"{type(message).__name__}.{name}: expected at most {MAX_DEPTH} nested levels, found more")


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return chain(value.keys(), value.values())
    return value if isinstance(value, list | tuple | set | frozenset) else ()


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} … {text[-_SHOWN:]}"


def _refuse_large(size_bytes: int, limit_bytes: int, what: str) -> None:
    if size_bytes > limit_bytes:
        raise MessageTooLarge(
            f"{what} of {size_bytes} bytes exceeds the limit of {limit_bytes} bytes (max_message_bytes)",
            size_bytes=size_bytes,
            limit_bytes=limit_bytes,
        )
