"""Converts token ids to text as they arrive, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sempre.engine.text.stop_strings import Found, StopStrings
from sempre.engine.text.token_stream import TokenStream
from sempre.engine.text.tokenizer import Tokenizer


class TextUpdate(NamedTuple):
    """Result of `IncrementalDetokenizer.update`."""

    delta: str
    """New text, to append to earlier text."""
    num_tokens: int
    """How many of the given tokens belong to the output; those after a stop string do not."""
    stop_reason: str | None
    """The stop string that ended the output, or None."""


class IncrementalDetokenizer:
    """The text of one output as it grows.

    Tokens are processed one at a time, so neither the text nor the position of a stop string depends on how many
    tokens a step brought. Joined deltas equal `tokenizer.decode` of prompt and output without that of the prompt
    (up to a character that the prompt leaves unfinished).

        output text:  | returned | held: may begin a stop string | not certain yet: unfinished characters |
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
        """Start an output after `prompt_token_ids`.

        A prompt may end inside a character, which the output then completes. A `stop` string that ends
        within the first `min_tokens` tokens does not count. One that contains a special token also matches if
        special tokens are left out of the text.
        """
        self._skipped_texts = tokenizer.special_texts if skip_special_tokens else {}
        self._stream = TokenStream(tokenizer, self._skipped_texts.keys(), prompt_token_ids)
        self._stop = (
            StopStrings(stop, list(self._skipped_texts.values()), include=include_stop_str_in_output) if stop else None
        )
        # searches the text of a run of bytes that may turn out to be invalid
        self._draft: StopStrings | None = None
        self._draft_text = ""
        self._draft_pieces: list[str] = []
        self._include_stop = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._finished = False
        self._handed_out: list[str] = []

    @property
    def text(self) -> str:
        """All text returned so far: the joined deltas."""
        return "".join(self._handed_out)

    def update(self, token_ids: Sequence[int], *, finished: bool = False, stop_token: bool = False) -> TextUpdate:
        """Add the output's next tokens and return the new text.

        `finished` says that these are the last tokens, so all text is returned; `stop_token` says that the last of
        them is a stop or end token that ended the output: its text is left out unless `include_stop_str_in_output`.
        A stop string ends the output by itself; calls after the end are an error.
        """
        assert not self._finished, "update() after the output ended"
        if self._stop is None:
            delta = self.take_all(token_ids, ends=finished or stop_token, stop_token=stop_token)
            return TextUpdate(delta, len(token_ids), None)
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if stop_token and index == len(token_ids) - 1 and not self._include_stop:
                continue
            stop_string = self._take(token_id, pieces)
            if stop_string is not None:
                self._finished = True
                return self._hand_out(pieces, index + 1, stop_string)
        if finished or stop_token:
            self._finished = True
            pieces.append(self._rest())
        return self._hand_out(pieces, len(token_ids), None)

    def take_all(self, token_ids: Sequence[int], *, ends: bool, stop_token: bool = False) -> str:
        """Like `update`, for outputs without stop strings, whose text cannot end them; return the new text."""
        assert self._stop is None, "a stop string is looked for token by token"
        assert not self._finished, "tokens after the output ended"
        self._finished = ends
        if stop_token and not self._include_stop:
            token_ids = token_ids[:-1]
        delta = self._stream.push_all(token_ids)
        if ends:
            delta += self._stream.end()
        if delta:
            self._handed_out.append(delta)
        return delta

    def _take(self, token_id: int, pieces: list[str]) -> str | None:
        """Append the text that a token releases to `pieces`; return the stop string that it completes."""
        assert self._stop is not None
        counts = self._num_tokens > self._min_tokens
        special_text = self._skipped_texts.get(token_id)
        if special_text is not None:
            if not self._stop.minds(special_text):
                return None
            if self._draft is None:
                return self._look(self._stop.feed(special_text, hidden=True, counts=counts), pieces)
            return self._look(self._draft.feed(special_text, hidden=True, counts=counts), self._draft_pieces, pieces)
        certain = self._settle(self._stream.push(token_id), pieces)
        stop_string = self._look(self._stop.feed(certain, counts=counts), pieces)
        if stop_string is not None:
            return stop_string
        tentative = self._stream.tentative
        if not tentative:
            return None
        if self._draft is None or not tentative.startswith(self._draft_text):
            self._draft, self._draft_text, self._draft_pieces = self._stop.copy(), "", []
        news, self._draft_text = tentative[len(self._draft_text) :], tentative
        return self._look(self._draft.feed(news, counts=counts), self._draft_pieces, pieces)

    def _look(self, found: Found, pieces: list[str], outer: list[str] | None = None) -> str | None:
        """Append the found text to `pieces`, and at the end of the output also `pieces` to `outer`."""
        pieces.append(found.text)
        if found.stop_string is not None and outer is not None:
            outer += pieces
        return found.stop_string

    def _settle(self, certain: str, pieces: list[str]) -> str:
        """Keep the tentative search if its text is now certain, or drop it; return the text still to search."""
        if not certain or self._draft is None or self._stop is None:
            return certain
        if certain.startswith(self._draft_text):
            self._stop = self._draft
            pieces += self._draft_pieces
            certain = certain[len(self._draft_text) :]
        self._draft = None
        return certain

    def _rest(self) -> str:
        """The remaining text when no token follows."""
        assert self._stop is not None
        pieces: list[str] = []
        rest = self._settle(self._stream.end(), pieces)
        return "".join(pieces) + self._stop.flush() + rest

    def _hand_out(self, pieces: list[str], num_tokens: int, stop_string: str | None) -> TextUpdate:
        delta = "".join(pieces)
        if delta:
            self._handed_out.append(delta)
        return TextUpdate(delta, num_tokens, stop_string)
