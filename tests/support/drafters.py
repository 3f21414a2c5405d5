"""Drafters for tests: one that drafts at random, one that is right half of the time, one that knows the output."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sempre.engine.speculation import speculation
from sempre.ipc.config import SpeculativeConfig

VOCAB_SIZE = 4096


class ScriptedDrafter:
    """Drafts the known continuation of its sequence, each token with the given probability, else any token.

    Nothing while its own tokens are a prefix of sequences that continue differently: one prompt may begin another.
    """

    def __init__(self, outputs: Sequence[list[int]], share_right: float) -> None:
        self._outputs = outputs
        self._share_right = share_right
        self._tokens: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        self._tokens += token_ids

    def propose(self, count: int) -> list[int]:
        length = len(self._tokens)
        futures = {tuple(whole[length : length + count]) for whole in self._outputs if whole[:length] == self._tokens}
        if len(futures) > 1:
            return []
        known = futures.pop() if futures else ()
        digests = [hashlib.sha256(repr((self._tokens, i)).encode()).digest() for i in range(count)]
        return [
            known[i]
            if i < len(known) and digest[0] < 256 * self._share_right
            else int.from_bytes(digest[1:3]) % VOCAB_SIZE
            for i, digest in enumerate(digests)
        ]

    def finish(self, num_prompt_tokens: int) -> None:
        pass


@contextmanager
def drafting_with(outputs: Sequence[list[int]], share_right: float) -> Iterator[None]:
    """In this context, engines in this process with method "ngram" draft by this script. `outputs` are whole sequences,
    prompts first."""

    def make(config: SpeculativeConfig) -> speculation.MakeDrafter:
        return lambda cache_salt: ScriptedDrafter(outputs, share_right)

    before = speculation.DRAFTERS["ngram"]
    speculation.DRAFTERS["ngram"] = make
    try:
        yield
    finally:
        speculation.DRAFTERS["ngram"] = before
