"""Drafters that look for an earlier place like the present one and propose that it goes on as it did there.

n-gram lookup: Saxena, "Prompt Lookup Decoding", 2023. Suffix lookup: Oliaro et al., "SuffixDecoding", arXiv 2411.04975.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Protocol

# candidates that are compared at most: bounds the work per token where one n-gram comes again and again
_MAX_CANDIDATES = 16
_RECENT_TOKENS = 65536
_END = -1  # between two outputs; no token
_MIN_SHARE = 0.3
# an empty list of outputs in tokens' worth of memory: bounds the number of salts
_COST_OF_A_SALT = 64


class Drafter(Protocol):
    """Follows one sequence. A draft model's drafts come from its worker instead, see `ModelSpeculation`."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The sequence goes on with these tokens."""

    def propose(self, count: int) -> list[int]:
        """At most `count` draft tokens of what comes next; empty when there is nothing to go by."""

    def finish(self, num_prompt_tokens: int) -> None:
        """The sequence has ended."""


class TokenIndex:
    """A growing list of tokens and, for each n-gram of `width` tokens in it, its places from last to first."""

    def __init__(self, width: int) -> None:
        self.token_ids: list[int] = []
        self._width = width
        self._last: dict[tuple[int, ...], int] = {}
        self._previous: list[int] = []

    def extend(self, token_ids: Sequence[int]) -> None:
        tokens, width, last = self.token_ids, self._width, self._last
        start = len(tokens)
        tokens += token_ids
        for end in range(start + 1, len(tokens) + 1):
            if end < width:
                self._previous.append(-1)
                continue
            ngram = tuple(tokens[end - width : end])
            self._previous.append(last.get(ngram, -1))
            last[ngram] = end

    def places(self, pattern: Sequence[int]) -> list[int]:
        """Ends of occurrences of the last `width` tokens of `pattern`, the last first, not the end of the list itself:
        nothing follows there."""
        if len(pattern) < self._width:
            return []
        ends: list[int] = []
        end = self._last.get(tuple(pattern[-self._width :]), -1)
        while end >= 0 and len(ends) < _MAX_CANDIDATES:
            if end < len(self.token_ids):
                ends.append(end)
            end = self._previous[end - 1]
        return ends

    def match(self, end: int, pattern: Sequence[int], most: int) -> int:
        """How many tokens before `end` equal the end of `pattern`; `width` of them are known to, `most` are enough."""
        tokens = self.token_ids
        most = min(most, end, len(pattern))
        length = self._width
        while length < most and tokens[end - 1 - length] == pattern[-1 - length]:
            length += 1
        return length


class NgramDrafter:
    """Takes the longest match of `shortest` to `longest` tokens within the sequence itself, the last of equals."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._index = TokenIndex(shortest)
        self._longest = longest

    def extend(self, token_ids: Sequence[int]) -> None:
        self._index.extend(token_ids)

    def propose(self, count: int) -> list[int]:
        tokens = self._index.token_ids
        best, best_length = 0, 0
        for end in self._index.places(tokens):
            length = self._index.match(end, tokens, self._longest)
            if length > best_length:
                best, best_length = end, length
                if length == self._longest:
                    break
        if not best_length:
            return []
        following = tokens[best : best + count]
        # what overlaps its own pattern is a loop: it goes on turning
        period = len(following)
        return [following[i % period] for i in range(count)] if best + count > len(tokens) else following

    def finish(self, num_prompt_tokens: int) -> None:
        pass


class RecentOutputs:
    """The outputs of the last sequences that have ended, about 65,536 tokens of them."""

    def __init__(self, width: int, capacity: int = _RECENT_TOKENS) -> None:
        self._width = width
        self._capacity = capacity
        self.index = TokenIndex(width)

    def add(self, token_ids: Sequence[int]) -> None:
        self.index.extend([*token_ids, _END])
        if len(self.index.token_ids) > 2 * self._capacity:
            kept = self.index.token_ids[-self._capacity :]
            self.index = TokenIndex(self._width)
            self.index.extend(kept)


class SaltedOutputs:
    """The recent outputs of each `cache_salt` by themselves: no request learns of those of another salt.

    Together they hold about `capacity` tokens more than one of them may; beyond, the salts that were not used for the
    longest are forgotten.
    """

    def __init__(self, width: int, capacity: int = _RECENT_TOKENS) -> None:
        self._width = width
        self._capacity = capacity
        self._by_salt: dict[str | None, RecentOutputs] = {}

    def of(self, salt: str | None) -> RecentOutputs:
        """Return those of one salt; None stands for requests without one."""
        recent = self._by_salt.pop(salt, None) or RecentOutputs(self._width, self._capacity)
        self._by_salt[salt] = recent  # now the last in order
        total = sum(len(outputs.index.token_ids) + _COST_OF_A_SALT for outputs in self._by_salt.values())
        while total > 3 * self._capacity and len(self._by_salt) > 1:
            oldest = self._by_salt.pop(next(iter(self._by_salt)))
            total -= len(oldest.index.token_ids) + _COST_OF_A_SALT
        return recent


class SuffixDrafter:
    """Takes the longest match in the sequence itself and in recent outputs; where several places match as long, the
    next token is the one most of them go on with, as long as `_MIN_SHARE` of them do."""

    def __init__(self, recent: RecentOutputs, shortest: int, longest: int) -> None:
        self._recent = recent
        self._own = TokenIndex(shortest)
        self._longest = longest

    def extend(self, token_ids: Sequence[int]) -> None:
        self._own.extend(token_ids)

    def propose(self, count: int) -> list[int]:
        pattern = self._own.token_ids
        places = [
            (index.match(end, pattern, self._longest), index.token_ids, end)
            for index in (self._own, self._recent.index)
            for end in index.places(pattern)
        ]
        if not places:
            return []
        longest = max(length for length, _, _ in places)
        following = [(tokens, end) for length, tokens, end in places if length == longest]
        return _most_common_path(following, count)

    def finish(self, num_prompt_tokens: int) -> None:
        self._recent.add(self._own.token_ids[num_prompt_tokens:])


def _most_common_path(places: list[tuple[list[int], int]], length: int) -> list[int]:
    """Tokens that follow most of the places, one after the other; of equals the one of the earliest place given."""
    path: list[int] = []
    total = len(places)
    for offset in count():
        if offset == length:
            break
        places = [(tokens, end) for tokens, end in places if end + offset < len(tokens)]
        tally = Counter(tokens[end + offset] for tokens, end in places)
        tally.pop(_END, None)
        if not tally:
            break
        token_id, votes = tally.most_common(1)[0]
        if votes < _MIN_SHARE * total:
            break
        path.append(token_id)
        places = [(tokens, end) for tokens, end in places if tokens[end + offset] == token_id]
    return path
