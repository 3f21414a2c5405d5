"""Where the reasoning of an output begins, and which tokens end it when its budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sempre.ipc.messages import ReasoningSpec

# An output whose first tokens hold no start tag does not reason.
_MOST_OPENING_TOKENS = 32


class ReasoningState:
    """A function of the output's tokens alone; nothing is kept between positions."""

    def __init__(self, spec: ReasoningSpec, token_ids: list[int], num_prompt_tokens: int) -> None:
        """`token_ids` is the worker's own list of the sequence, prompt first."""
        self._spec = spec
        self._sequence = token_ids
        self._output_start = num_prompt_tokens
        self._start_tag = spec.start.encode()
        self._end_tag = spec.end.encode()

    def first_position(self, position: int, decode: Callable[[Sequence[int]], bytes]) -> int | None:
        """The position of the first token of reasoning, or None: the tokens before `position` do not begin it."""
        begin = self._output_start
        if self._spec.begins_inside:
            return begin
        opening = self._sequence[begin : min(position, begin + _MOST_OPENING_TOKENS)]
        if not decode(opening).lstrip().startswith(self._start_tag):
            return None
        for count in range(1, len(opening)):
            if decode(opening[:count]).lstrip().startswith(self._start_tag):
                return begin + count
        return begin + len(opening)

    def forced_token(self, position: int, decode: Callable[[Sequence[int]], bytes]) -> int | None:
        """The token of the end tag that has to stand at `position`; None: the budget has nothing to say there."""
        budget, end_token_ids = self._spec.budget, self._spec.end_token_ids
        if budget is None or position < self._output_start + budget:
            return None
        first = self.first_position(position, decode)
        if first is None or not first + budget <= position < first + budget + len(end_token_ids):
            return None
        text = decode(self._sequence[self._output_start : first + budget])
        if not self._spec.begins_inside:
            text = text.lstrip()[len(self._start_tag) :]
        return None if self._end_tag in text else end_token_ids[position - first - budget]
