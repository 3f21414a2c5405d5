"""Token ids to text as they arrive, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from sempre.engine.text.tokenizer import Tokenizer

# A UTF-8 character has at most four bytes, so an unfinished one at most three.
_MAX_UNFINISHED_BYTES = 3


class TextUpdate(NamedTuple):
    """What a call of `IncrementalDetokenizer.update` brought."""

    delta: str
    """Text to add to what was handed out before."""
    num_tokens: int
    """How many of the given tokens belong to the output; those behind a stop string do not."""
    stop_reason: str | None
    """The stop string that ended the output, None when none did."""


class IncrementalDetokenizer:
    """The growing text of one output.

    Tokens are taken one at a time, whatever the grouping in which they arrive, so neither the text nor the place
    where a stop string ends it depends on how many tokens a step brought. Joined deltas equal
    `tokenizer.decode` of the output's ids (for decoders that drop a text's first space: of the ids after the prompt's).

        output bytes:  | handed out | held: may begin a stop string | unfinished character |
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        min_tokens: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        """Start an output behind `prompt_token_ids`.

        A prompt may end inside a character, which the output then completes. `stop` strings are looked for in
        the text of the tokens after the first `min_tokens`: one that ends within those does not count.
        """
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._stop = tuple(stop)
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._finished = False
        self._handed_out: list[str] = []
        # The text's longest suffix that begins a stop string; a match can start nowhere before it.
        self._suffix = ""
        # The bytes of a character that is still incomplete.
        self._unfinished = b""
        self._decode(self._last_bytes(prompt_token_ids))

    @property
    def text(self) -> str:
        """All text handed out so far: the deltas, joined."""
        return "".join(self._handed_out)

    def update(self, token_ids: Sequence[int], *, finished: bool = False, stop_token: bool = False) -> TextUpdate:
        """Take the output's next tokens and return the new text.

        `finished` says that these are the last ones, so that all text comes out; `stop_token` says that the last one
        of them is a stop or end token that ended the output: its text is left out unless
        `include_stop_str_in_output`. A stop string ends the output by itself; calls after the end are an error.
        """
        assert not self._finished, "update() after the output ended"
        if not self._stop:
            delta = self.take_all(token_ids, ends=finished or stop_token, stop_token=stop_token)
            return TextUpdate(delta, len(token_ids), None)
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            is_stop_token = stop_token and index == len(token_ids) - 1
            hidden = is_stop_token and not self._include_stop
            skipped = hidden or token_id in self._skipped_ids
            piece = "" if skipped else self._decode(self._tokenizer.token_bytes(token_id))
            self._num_tokens += 1
            stop_string = self._take(piece, pieces)
            if stop_string is not None:
                return self._hand_out(pieces, index + 1, stop_string)
        if finished or stop_token:
            self._finished = True
            if not self._include_stop:
                pieces.append(self._suffix)
            pieces.append(self._decode(b"", final=True))
        return self._hand_out(pieces, len(token_ids), None)

    def take_all(self, token_ids: Sequence[int], *, ends: bool, stop_token: bool = False) -> str:
        """As `update`, where there are no stop strings, so that the text cannot end the output; return the new text."""
        assert not self._stop, "a stop string is looked for token by token"
        assert not self._finished, "tokens after the output ended"
        self._finished = ends
        if stop_token and not self._include_stop:
            token_ids = token_ids[:-1]
        skipped, bytes_of = self._skipped_ids, self._tokenizer.token_bytes
        if len(token_ids) == 1 and not ends and not self._unfinished:
            # a token of a stream, as a rule a whole number of characters
            [token_id] = token_ids
            data = b"" if token_id in skipped else bytes_of(token_id)
        else:
            pieces = [bytes_of(token_id) for token_id in token_ids if token_id not in skipped]
            data = self._unfinished + b"".join(pieces)
        delta, num_decoded = codecs.utf_8_decode(data, "replace", ends)
        self._unfinished = data[num_decoded:]
        if delta:
            self._handed_out.append(delta)
        return delta

    def _take(self, piece: str, pieces: list[str]) -> str | None:
        """Append to `pieces` what `piece` lets out; return the stop string that it completes."""
        if not piece:
            pieces.append(piece)
            return None
        text = self._suffix + piece
        # With the stop string included nothing is ever taken back, so its beginning need not be held.
        first_new = len(self._suffix) if self._include_stop else 0
        if self._num_tokens > self._min_tokens:
            match = _first_match(text, self._stop, len(self._suffix))
            if match is not None:
                start, stop_string = match
                end = start + len(stop_string) if self._include_stop else start
                pieces.append(text[first_new:end])
                self._finished = True
                return stop_string
        self._suffix = _longest_beginning(text, self._stop)
        pieces.append(text[first_new:] if self._include_stop else text[: len(text) - len(self._suffix)])
        return None

    def _hand_out(self, pieces: list[str], num_tokens: int, stop_string: str | None) -> TextUpdate:
        delta = "".join(pieces)
        if delta:
            self._handed_out.append(delta)
        return TextUpdate(delta, num_tokens, stop_string)

    def _decode(self, data: bytes, *, final: bool = False) -> str:
        """Return the characters that `data` completes; bytes that are no UTF-8 become U+FFFD."""
        data = self._unfinished + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", final)
        self._unfinished = data[num_decoded:]
        return text

    def _last_bytes(self, prompt_token_ids: Sequence[int]) -> bytes:
        """Return enough of the prompt's end to hold a character that it leaves unfinished."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            if len(tail) >= _MAX_UNFINISHED_BYTES:
                break
            if token_id not in self._skipped_ids:
                tail = self._tokenizer.token_bytes(token_id) + tail
        return tail


def _first_match(text: str, stop: Sequence[str], num_old: int) -> tuple[int, str] | None:
    """Return (start, stop string) of the match that starts first; of equal starts the first in `stop`.

    Only matches that end behind the first `num_old` characters count.
    """
    matches = []
    for rank, stop_string in enumerate(stop):
        start = text.find(stop_string, max(0, num_old - len(stop_string) + 1))
        if start >= 0:
            matches.append((start, rank))
    if not matches:
        return None
    start, rank = min(matches)
    return start, stop[rank]


def _longest_beginning(text: str, stop: Sequence[str]) -> str:
    """Return the longest suffix of `text` that is a beginning, but not the whole, of a stop string."""
    longest = max(len(stop_string) for stop_string in stop) - 1
    for length in range(min(longest, len(text)), 0, -1):
        suffix = text[-length:]
        if any(len(stop_string) > length and stop_string.startswith(suffix) for stop_string in stop):
            return suffix
    return ""
