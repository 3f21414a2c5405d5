"""The text of token ids as they arrive, equal to decoding all of them at once."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Sequence
from itertools import islice
from typing import NamedTuple

from sempre.engine.text.tokenizer import Tokenizer

# A UTF-8 character has at most four bytes, an unfinished one at most three.
_MAX_UNFINISHED_BYTES = 3
# Enough of a prompt to tell whether it has any text.
_NUM_LEADING = 8


class TokenStream:
    """Takes tokens one at a time and returns their text once later tokens can no longer change it.

    Decoders treat bytes differently. Most join the bytes of all tokens; invalid UTF-8 becomes U+FFFD. Those with byte
    fallback (Llama 2, Gemma) decode each run of byte tokens as a whole: one invalid byte turns every byte of the run
    into U+FFFD, so a run's text is certain only after its end, or once it is invalid. Some treat a text's first token
    differently (they drop its space): until there is any text, tokens are decoded together from the start.
    """

    def __init__(
        self, tokenizer: Tokenizer, skipped_ids: Collection[int] = (), prompt_token_ids: Sequence[int] = ()
    ) -> None:
        """Start after a prompt, whose unfinished last character is completed here. `skipped_ids` have no text."""
        self._tokenizer = tokenizer
        self._skipped = skipped_ids
        self._unfinished = b""
        self._run: list[int] = []
        self._run_is_wrong = False
        self.tentative = ""
        """The text that the last tokens add if none follows: the complete characters of an unfinished run."""
        last = unfinished_tokens(tokenizer, skipped_ids, prompt_token_ids)
        self._lead: list[int] | None = None
        """The tokens so far, while they have no text; None once they have."""
        if not tokenizer.is_byte_level:
            lead = _first_visible(prompt_token_ids, skipped_ids)
            if len(lead) < _NUM_LEADING:
                lead = lead[: len(lead) - len(last.token_ids)]
                if not tokenizer.decode(lead, skip_special_tokens=False):
                    self._lead = lead
        if not tokenizer.has_byte_fallback:
            self._unfinished = last.data
        else:
            for token_id in last.token_ids:
                self.push(token_id)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that has become certain."""
        if token_id in self._skipped:
            return ""
        if self._tokenizer.byte_of(token_id) is not None:
            return self._push_byte(token_id)
        if not self._tokenizer.knows(token_id):
            return ""
        text = self._end_run()
        if self._lead is not None:
            return text + self._decode_lead([token_id])
        return text + self._utf8(self._tokenizer.token_bytes(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Add several tokens; equal to `push` on each."""
        if self._tokenizer.has_byte_fallback or self._lead is not None:
            return "".join([self.push(token_id) for token_id in token_ids])
        skipped, bytes_of = self._skipped, self._tokenizer.token_bytes
        return self._utf8(b"".join([bytes_of(token_id) for token_id in token_ids if token_id not in skipped]))

    def end(self) -> str:
        """End the stream; return the remaining text."""
        return self._end_run() + self._utf8(b"", final=True)

    def _utf8(self, data: bytes, *, final: bool = False) -> str:
        data = self._unfinished + data
        text, num_decoded = codecs.utf_8_decode(data, "replace", final)
        self._unfinished = data[num_decoded:]
        return text

    def _decode_lead(self, token_ids: Sequence[int]) -> str:
        assert self._lead is not None
        lead = [*self._lead, *token_ids]
        text = self._tokenizer.decode(lead, skip_special_tokens=False)
        self._lead = None if text else lead
        return text

    def _push_byte(self, token_id: int) -> str:
        if self._run_is_wrong:
            return "\ufffd"
        self._run.append(token_id)
        try:
            self.tentative, _ = codecs.utf_8_decode(self._bytes_of(self._run), "strict", False)
        except UnicodeDecodeError:
            text = self._end_run()
            self._run_is_wrong = True
            return text
        if self._lead is not None and self.tentative:
            whole = len(self.tentative.encode())
            self.tentative = self._tokenizer.decode([*self._lead, *self._run[:whole]], skip_special_tokens=False)
        return ""

    def _end_run(self) -> str:
        """The run's text, now known to be complete or invalid."""
        run, self._run, self._run_is_wrong, self.tentative = self._run, [], False, ""
        if not run:
            return ""
        if self._lead is not None:
            return self._decode_lead(run)
        data = self._bytes_of(run)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(data)

    def _bytes_of(self, run: Sequence[int]) -> bytes:
        return bytes([self._tokenizer.byte_of(token_id) or 0 for token_id in run])


class UnfinishedTokens(NamedTuple):
    """The last tokens of a text, which hold the bytes of an incomplete character."""

    token_ids: list[int]
    data: bytes


def unfinished_tokens(tokenizer: Tokenizer, skipped_ids: Collection[int], token_ids: Sequence[int]) -> UnfinishedTokens:
    """Return the last visible tokens of `token_ids` that form an incomplete character."""
    last: list[int] = []
    data = b""
    for token_id in reversed(token_ids):
        if len(data) >= _MAX_UNFINISHED_BYTES:
            break
        if token_id in skipped_ids:
            continue
        if tokenizer.has_byte_fallback and tokenizer.byte_of(token_id) is None:
            break
        last.insert(0, token_id)
        data = tokenizer.token_bytes(token_id) + data
    _, num_decoded = codecs.utf_8_decode(data, "replace", False)
    data = data[num_decoded:]
    if tokenizer.has_byte_fallback:  # one byte per token
        last = last[len(last) - len(data) :]
    return UnfinishedTokens(last if data else [], data)


def finished_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of a prompt without an incomplete last character, which the output may complete."""
    last = unfinished_tokens(tokenizer, (), token_ids)
    if not tokenizer.has_byte_fallback:
        text = tokenizer.decode(token_ids)
        return text.removesuffix("\ufffd") if last.data else text
    return tokenizer.decode(token_ids[: len(token_ids) - len(last.token_ids)])


def _first_visible(token_ids: Sequence[int], skipped_ids: Collection[int]) -> list[int]:
    return list(islice((token_id for token_id in token_ids if token_id not in skipped_ids), _NUM_LEADING))
