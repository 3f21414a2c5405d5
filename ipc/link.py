"""One established link between two processes, without its socket: frames in and out, counted in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

from sempre.ipc.codec import UNSEQUENCED, FrameDecoder, FrameEncoder, MessageT
from sempre.ipc.errors import FrameLost, MessageMalformed, ProtocolError
from sempre.ipc.messages import Message


class Link(Generic[MessageT]):
    """Counts the frames of one link, so that a lost frame is an error and a repeated one is dropped."""

    def __init__(self, encoder: FrameEncoder, decoder: FrameDecoder[MessageT], *, received: int = 0) -> None:
        self._encoder = encoder
        self._decoder = decoder
        self._sent = 0
        self._received = received

    def pack(self, message: Message) -> bytearray:
        frame = self._encoder.encode(message, self._sent + 1)
        self._sent += 1
        return frame

    def unpack(self, parts: Sequence[bytes]) -> MessageT | None:
        """The message of one arrival; None for a repetition. Raises ProtocolError, after which the count goes on."""
        try:
            sequence, message = self._decoder.decode(single_part(parts))
        except ProtocolError:
            # whatever it was, it took the place of one frame
            self._received += 1
            raise
        if sequence == UNSEQUENCED:
            return message
        expected = self._received + 1
        if sequence < expected:
            return None
        self._received = sequence
        if sequence > expected:
            raise FrameLost(
                f"sequence: expected frame {expected} of this link, found {sequence}; what lies between was lost",
                expected=expected,
                found=sequence,
            )
        return message


def single_part(parts: Sequence[bytes]) -> bytes:
    """The one part of an arrival; raises MessageMalformed when there are more."""
    if len(parts) != 1:
        raise MessageMalformed(f"parts: expected 1 part, found {len(parts)}", field="parts")
    return parts[0]
