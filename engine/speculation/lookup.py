"""Drafters that search for an earlier match of the last tokens and propose the tokens that followed it.

n-gram lookup: Saxena, "Prompt Lookup Decoding", 2023. Suffix lookup: Oliaro et al., "SuffixDecoding", arXiv 2411.04975.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Protocol

# maximum candidates to compare: bounds the work per token if one n-gram repeats often
_MAX_CANDIDATES = 16
_RECENT_TOKENS = 65536
_END = -1  # separates two outputs; not a token
_MIN_SHARE = 0.3
# memory of an empty list of outputs, in tokens: bounds the number of salts
_COST_OF_A_SALT = 64


class Drafter(Protocol):
    """Follows one sequence. A draft model's drafts come from its worker instead, see `ModelSpeculation`."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """Append tokens to the sequence."""

    def propose(self, count: int) -> list[int]:
        """Return at most `count` draft tokens; empty without a match."""

    def finish(self, num_prompt_tokens: int) -> None:
        """The sequence has ended."""


class TokenIndex:
    """A growing list of tokens and, for each n-gram of `width` tokens, its places from last to first."""

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
        """Ends of occurrences of the last `width` tokens of `pattern`, the last first, without the end of the list,
        where nothing follows."""
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
        """How many tokens before `end` equal the end of `pattern`: at least `width`, counted up to `most`."""
        tokens = self.token_ids
        most = min(most, end, len(pattern))
        length = self._width
        while length < most and tokens[end - 1 - length] == pattern[-1 - length]:
            length += 1
        return length


class NgramDrafter:
    """Uses the longest match of `shortest` to `longest` tokens within the sequence, the last one on a tie."""

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
        # a match that overlaps its own pattern is a loop: continue it
        period = len(following)
        return [following[i % period] for i in range(count)] if best + count > len(tokens) else following

    def finish(self, num_prompt_tokens: int) -> None:
        pass


class RecentOutputs:
    """The outputs of recently ended sequences, about 65,536 tokens."""

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
    """Separate recent outputs per `cache_salt`: no request learns about those of another salt.

    Together they hold about `capacity` tokens more than one of them may; beyond that, the least recently used salts
    are forgotten.
    """

    def __init__(self, width: int, capacity: int = _RECENT_TOKENS) -> None:
        self._width = width
        self._capacity = capacity
        self._by_salt: dict[str | None, RecentOutputs] = {}

    def of(self, salt: str | None) -> RecentOutputs:
        """Return those of one salt; None means requests without one."""
        recent = self._by_salt.pop(salt, None) or RecentOutputs(self._width, self._capacity)
        self._by_salt[salt] = recent  # now the last in order
        total = sum(len(outputs.index.token_ids) + _COST_OF_A_SALT for outputs in self._by_salt.values())
        while total > 3 * self._capacity and len(self._by_salt) > 1:
            oldest = self._by_salt.pop(next(iter(self._by_salt)))
            total -= len(oldest.index.token_ids) + _COST_OF_A_SALT
        return recent


class SuffixDrafter:
    """Uses the longest match in the sequence and in recent outputs; if several matches are equally long, the next token
    is the most common one after them, as long as at least `_MIN_SHARE` of them have it."""

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
    """The most common tokens after the places, one after the other; on a tie that of the earliest place given."""
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
