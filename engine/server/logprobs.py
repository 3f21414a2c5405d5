"""Log-probabilities in the forms of /v1/completions and /v1/chat/completions.

Numbers are the worker's float32, written with enough digits to identify them. JSON has no infinity: a token of
probability 0 gets FLOOR.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sempre.engine.outputs import Logprob
from sempre.engine.server.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    ChatTopLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprobs,
)
from sempre.engine.text.token_stream import TokenStream
from sempre.engine.text.tokenizer import Tokenizer

FLOOR = -9999.0

# ASCII without the backslash
_PRINTABLE = frozenset(range(0x20, 0x7F)) - {0x5C}

Row = Mapping[int, Logprob]


class TokenNames(dict[int, str]):
    """By id, computed when first read: a token's text or, for part of a character, its bytes: `bytes:\\xe3\\x81`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            data.decode()
        except UnicodeDecodeError:
            name = "bytes:" + "".join([chr(byte) if byte in _PRINTABLE else f"\\x{byte:02x}" for byte in data])
        else:
            name = self._tokenizer.token_text(token_id)
        self[token_id] = name
        return name


class IdNames(dict[int, str]):
    """`token_id:N` for each id."""

    def __missing__(self, token_id: int) -> str:
        return f"token_id:{token_id}"


class CompletionLogprobsWriter:
    """Writes the tokens of one text, part by part; `text_offset` continues where the last part ended.

    If names clash, the sampled token or else the most probable one keeps the name; the others are named `token_id:N`.
    """

    def __init__(self, names: TokenNames | IdNames, stream: TokenStream, offset: int = 0) -> None:
        """`stream` decodes the shown tokens; `offset` characters precede them."""
        self._names = names
        self._stream = stream
        self._offset = offset

    def write(self, token_ids: Sequence[int], rows: Iterable[Row | None]) -> CompletionLogprobs:
        """A row is None for a prompt's first token, which nothing predicts."""
        written = CompletionLogprobs([], [], [], [])
        for token_id, row in zip(token_ids, rows, strict=True):
            written.text_offset.append(self._offset + len(self._stream.tentative))
            written.tokens.append(self._names[token_id])
            written.token_logprobs.append(None if row is None else _finite(row[token_id].logprob))
            written.top_logprobs.append(None if row is None else self._top(token_id, row))
            self._offset += len(self._stream.push(token_id))
        return written

    def _top(self, token_id: int, row: Row) -> TopLogprobs:
        names = self._names
        top = {names[token_id]: _finite(row[token_id].logprob)}
        logprobs = [entry.logprob for entry in row.values()]
        top.update(zip(map(names.__getitem__, row), logprobs, strict=True))
        if len(top) == len(row) and min(logprobs) >= FLOOR:
            return top
        top = {names[token_id]: _finite(row[token_id].logprob)}
        for other, entry in row.items():
            if other != token_id:
                name = names[other]
                top[f"token_id:{other}" if name in top else name] = _finite(entry.logprob)
        return top


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return the tokens of both."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(
    token_ids: Sequence[int],
    rows: Sequence[Row],
    *,
    num_top: int,
    tokenizer: Tokenizer,
    as_token_ids: bool,
) -> ChatLogprobs:
    """Return each token with its `num_top` (-1: all reported) most probable alternatives, which may include itself,
    ordered by rank."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        most = math.inf if num_top == -1 else num_top
        best = sorted([(rank, other) for other, entry in row.items() if (rank := entry.rank or 0) <= most])
        top = [ChatTopLogprob(*_chat_token(other, row[other], tokenizer, as_token_ids)) for _, other in best]
        content.append(ChatTokenLogprob(*_chat_token(token_id, row[token_id], tokenizer, as_token_ids), top))
    return ChatLogprobs(content)


def prompt_logprobs(rows: Sequence[Row | None]) -> PromptLogprobs:
    """Return vLLM's format: per token an object of token id → entry, null for the first."""
    return [None if row is None else {str(token_id): _prompt_entry(row[token_id]) for token_id in row} for row in rows]


def base64_array(values: npt.NDArray[np.float32] | None) -> str | None:
    """Return vLLM's format for a matrix: NumPy's file format as base64."""
    if values is None:
        return None
    file = io.BytesIO()
    np.save(file, values, allow_pickle=False)
    return base64.b64encode(file.getbuffer()).decode("ascii")


def _prompt_entry(entry: Logprob) -> PromptLogprob:
    return PromptLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)


def _chat_token(
    token_id: int, entry: Logprob, tokenizer: Tokenizer, as_token_ids: bool
) -> tuple[str, float, list[int]]:
    name = f"token_id:{token_id}" if as_token_ids else entry.decoded_token or ""
    return name, _finite(entry.logprob), list(tokenizer.token_bytes(token_id))


def _finite(logprob: float) -> float:
    return logprob if logprob >= FLOOR else FLOOR  # `max` would take several times as long
