"""Log-probabilities in the forms of /v1/completions and /v1/chat/completions.

Numbers are the worker's float32, written with as many digits as tell them apart from their neighbours. JSON knows no
infinity: a token of probability 0 has FLOOR.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
from sempre.engine.text.tokenizer import Tokenizer

FLOOR = -9999.0

Row = Mapping[int, Logprob]


class CompletionLogprobsWriter:
    """Writes one choice's tokens, part by part; `text_offset` goes on where the last part ended."""

    def __init__(self, *, as_token_ids: bool) -> None:
        self._as_token_ids = as_token_ids
        self._offset = 0

    def write(self, token_ids: Sequence[int], rows: Iterable[Row | None]) -> CompletionLogprobs:
        """A row is None for a prompt's first token, which nothing predicts."""
        written = CompletionLogprobs([], [], [], [])
        for token_id, row in zip(token_ids, rows, strict=True):
            name = f"token_id:{token_id}"
            top: TopLogprobs | None = None
            value = None
            if row is not None:
                own = row[token_id]
                value = _finite(own.logprob)
                name = self._name(token_id, own)
                top = {}
                for other, entry in row.items():
                    # Different tokens may look alike; the more probable one comes first and stands.
                    top.setdefault(self._name(other, entry), _finite(entry.logprob))
            written.text_offset.append(self._offset)
            written.tokens.append(name)
            written.token_logprobs.append(value)
            written.top_logprobs.append(top)
            self._offset += len(name)
        return written

    def write_first(self, token_id: int, text: str) -> CompletionLogprobs:
        """Write a prompt's first token, which has no row to take its text from."""
        name = f"token_id:{token_id}" if self._as_token_ids else text
        written = CompletionLogprobs([self._offset], [None], [name], [None])
        self._offset += len(name)
        return written

    def _name(self, token_id: int, entry: Logprob) -> str:
        return f"token_id:{token_id}" if self._as_token_ids else entry.decoded_token or ""


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Return the tokens of both."""
    return CompletionLogprobs(
        first.text_offset + second.text_offset,
        first.token_logprobs + second.token_logprobs,
        first.tokens + second.tokens,
        first.top_logprobs + second.top_logprobs,
    )


def chat_logprobs(
    token_ids: Sequence[int], rows: Sequence[Row], *, num_top: int, tokenizer: Tokenizer, as_token_ids: bool
) -> ChatLogprobs:
    """Return each token with its `num_top` (-1: all) most probable alternatives, itself among them if it is one."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        most = len(row) if num_top == -1 else num_top
        best = sorted((entry.rank or 0, other) for other, entry in row.items() if (entry.rank or 0) <= most)
        top = [ChatTopLogprob(*_chat_token(other, row[other], tokenizer, as_token_ids)) for _, other in best]
        content.append(ChatTokenLogprob(*_chat_token(token_id, row[token_id], tokenizer, as_token_ids), top))
    return ChatLogprobs(content)


def prompt_logprobs(rows: Sequence[Row | None]) -> PromptLogprobs:
    """Return vLLM's form: per token an object of token id → entry, null for the first."""
    return [None if row is None else {str(token_id): _prompt_entry(row[token_id]) for token_id in row} for row in rows]


def _prompt_entry(entry: Logprob) -> PromptLogprob:
    return PromptLogprob(_finite(entry.logprob), entry.rank, entry.decoded_token)


def _chat_token(
    token_id: int, entry: Logprob, tokenizer: Tokenizer, as_token_ids: bool
) -> tuple[str, float, list[int]]:
    name = f"token_id:{token_id}" if as_token_ids else entry.decoded_token or ""
    return name, _finite(entry.logprob), list(tokenizer.token_bytes(token_id))


def _finite(logprob: float) -> float:
    return max(logprob, FLOOR)
