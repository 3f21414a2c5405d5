"""What guesses from a sequence's own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Follows one sequence. A draft model's guesses come from its worker instead, see `ModelSpeculation`."""

    def extend(self, token_ids: Sequence[int]) -> None:
        """The sequence goes on with these tokens."""

    def propose(self, count: int) -> list[int]:
        """At most `count` guesses of what comes next; empty when there is nothing to go by."""

    def finish(self, num_prompt_tokens: int) -> None:
        """The sequence has ended."""
