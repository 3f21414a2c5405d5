"""Log-probabilities in a few flat lists, which the garbage collector need not walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from sempre.engine.outputs import Logprob


@dataclass(eq=False)
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """As many rows as tokens; entries `[start_indices[i], end_indices[i])` of the other lists are row i.

    Reads like a list of dicts, one built per access; a slice is flat, too. What nothing predicts, a prompt's first
    token, has an empty row. Equal to any sequence of the same rows.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def append(self, row: Mapping[int, Logprob] | None) -> None:
        """Add a row; None is an empty one."""
        self.start_indices.append(len(self.token_ids))
        for token_id, entry in (row or {}).items():
            self.token_ids.append(token_id)
            self.logprobs.append(entry.logprob)
            self.ranks.append(entry.rank)
            self.decoded_tokens.append(entry.decoded_token)
        self.end_indices.append(len(self.token_ids))

    def extend(self, rows: Sequence[Mapping[int, Logprob] | None]) -> None:
        """Add rows."""
        for row in rows:
            self.append(row)

    def __len__(self) -> int:
        return len(self.start_indices)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...

    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...

    def __getitem__(self, index: int | slice) -> dict[int, Logprob] | FlatLogprobs:
        places = range(len(self))[index]
        if isinstance(places, range):
            part = FlatLogprobs()
            part.extend([self[place] for place in places])
            return part
        span = slice(self.start_indices[places], self.end_indices[places])
        entries = map(Logprob, self.logprobs[span], self.ranks[span], self.decoded_tokens[span])
        return dict(zip(self.token_ids[span], entries, strict=True))
