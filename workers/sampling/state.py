"""What the sampler keeps for one request, and the changes it makes to the request's logits.

Everything here is a function of (parameters, token ids, position): a state rebuilt for a resumed request equals the one
that went through all steps.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sempre.ipc.messages import SamplingSpec
from sempre.kernels.sampling import add_bias, allow_bits, allow_only, apply_penalties, forbid
from sempre.workers.sampling.grammar import GrammarState
from sempre.workers.sampling.row_error import RowError

Ids = npt.NDArray[np.int64]


class TokenCounts:
    """The distinct tokens of a sequence, which of them are in the prompt, and how often each was generated."""

    def __init__(self, token_ids: list[int], num_prompt_tokens: int) -> None:
        prompt = np.unique(np.asarray(token_ids[:num_prompt_tokens], np.int64))
        self._sequence = token_ids
        self._slots = {int(token): slot for slot, token in enumerate(prompt)}
        self._ids = prompt
        self._in_prompt = np.ones(prompt.size, np.bool_)
        self._output_counts = np.zeros(prompt.size, np.int32)
        # generated tokens of sequence[:_end] are counted
        self._end = num_prompt_tokens

    def advance_to(self, position: int) -> None:
        """Count the generated tokens before `position`, which may also be smaller than before."""
        while self._end < position:
            slot = self._slot(self._sequence[self._end])  # first: it may replace the arrays
            self._output_counts[slot] += 1
            self._end += 1
        self.retreat_to(position)

    def retreat_to(self, position: int) -> None:
        """Uncount the generated tokens from `position` on."""
        while self._end > position:
            self._end -= 1
            self._output_counts[self._slot(self._sequence[self._end])] -= 1

    def _slot(self, token: int) -> int:
        slot = self._slots.get(token)
        if slot is not None:
            return slot
        slot = len(self._slots)
        self._slots[token] = slot
        if slot == self._ids.size:  # grow by half
            extra = slot // 2 + 16
            self._ids = np.concatenate([self._ids, np.zeros(extra, np.int64)])
            self._in_prompt = np.concatenate([self._in_prompt, np.zeros(extra, np.bool_)])
            self._output_counts = np.concatenate([self._output_counts, np.zeros(extra, np.int32)])
        self._ids[slot] = token
        return slot

    def arrays(self) -> tuple[Ids, npt.NDArray[np.bool_], npt.NDArray[np.int32]]:
        """(token ids, in prompt, times generated), views."""
        size = len(self._slots)
        return self._ids[:size], self._in_prompt[:size], self._output_counts[:size]


class SamplingState:
    """Parameters, seed and history of one request.

    `token_ids` is the worker's own list of the sequence, prompt first: the worker appends to it, the state only reads.
    """

    @np.errstate(all="ignore")
    def __init__(
        self,
        params: SamplingSpec,
        seed: int,
        token_ids: list[int],
        num_prompt_tokens: int,
        grammar: GrammarState | None = None,
    ) -> None:
        """`grammar` is the one that `params` request for the output; it reads `token_ids` too."""
        self.params = params
        self.grammar = grammar
        self.seed = seed
        self.token_ids = token_ids
        self.num_prompt_tokens = num_prompt_tokens
        self._counts: TokenCounts | None = None
        self._allowed = (
            None if params.allowed_token_ids is None else np.unique(np.asarray(params.allowed_token_ids, np.int64))
        )
        self._bad_tokens = np.asarray([word[0] for word in params.bad_words_token_ids if len(word) == 1], np.int64)
        self._bad_phrases = [word for word in params.bad_words_token_ids if len(word) > 1]
        self.end_token_ids = np.unique(np.asarray([*params.eos_token_ids, *params.stop_token_ids], np.int64))
        biases = sorted(params.logit_bias.items())
        self._bias_ids = np.asarray([token for token, _ in biases], np.int64)
        self._biases = np.asarray([bias for _, bias in biases], np.float32)
        self.penalises = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) != (1, 0, 0)
        self._largest_ids = self._find_largest_ids()

    def rewind(self, position: int) -> None:
        """Called before the tokens from `position` on are replaced: uncount them."""
        if self._counts is not None:
            self._counts.retreat_to(position)

    @property
    def rewrites_logits(self) -> bool:
        """Whether `process` may do anything."""
        params = self.params
        return bool(
            self._allowed is not None
            or self.grammar is not None
            or params.bad_words_token_ids
            or (params.min_tokens and self.end_token_ids.size)
            or params.logit_bias
            or self.penalises
        )

    def process(self, row: npt.NDArray[np.float32], position: int) -> None:
        """Steps 2 to 7 of `Sampler` on the logits (float32 [V], in place) for the token at `position`.

        Raises RowError when a parameter names a token outside the vocabulary, or the grammar cannot be followed.
        """
        self.check_ids(row.size)
        output_length = position - self.num_prompt_tokens
        if self._allowed is not None:
            allow_only(row, self._allowed)
        if self.grammar is not None:
            allow_bits(row, self.allowed_words(self.grammar, position))
        if self.params.bad_words_token_ids:
            forbid(row, self._bad_tokens)
            forbid(row, self._last_tokens_of_bad_phrases(position))
        if output_length < self.params.min_tokens and self.grammar is None:
            # an id outside the vocabulary can never end the request
            forbid(row, self.end_token_ids[self.end_token_ids < row.size])
        if self._bias_ids.size:
            add_bias(row, self._bias_ids, self._biases)
        if self.penalises:
            self._penalise(row, position)

    def allowed_words(self, grammar: GrammarState, position: int) -> npt.NDArray[np.int32]:
        """What `grammar` allows at `position`, without ends while the output is shorter than `min_tokens`.

        A complete output wins: where only an end may follow, it is allowed. Raises RowError.
        """
        words = grammar.allowed_words(position)
        if position - self.num_prompt_tokens >= self.params.min_tokens:
            return words
        ends = self.end_token_ids[self.end_token_ids < words.size * 32]
        longer = words.view(np.uint32).copy()
        np.bitwise_and.at(longer, ends // 32, ~(np.uint32(1) << (ends % 32).astype(np.uint32)))
        return longer.view(np.int32) if longer.any() else words

    def _find_largest_ids(self) -> dict[str, int]:
        groups = {
            "allowed_token_ids": self.params.allowed_token_ids or [],
            "bad_words": [token for word in self.params.bad_words_token_ids for token in word],
            "logit_bias": list(self.params.logit_bias),
        }
        return {name: max(ids) for name, ids in groups.items() if ids}

    def check_ids(self, vocab_size: int) -> None:
        """Raises RowError when a parameter names a token outside the vocabulary."""
        for name, largest in self._largest_ids.items():
            if largest >= vocab_size:
                raise RowError(name, f"expected token ids below the vocabulary size {vocab_size}, found {largest}")

    def _last_tokens_of_bad_phrases(self, position: int) -> Ids:
        """The tokens that would complete a bad phrase whose beginning ends the output so far."""
        tokens = self.token_ids
        last = [
            phrase[-1]
            for phrase in self._bad_phrases
            if position - len(phrase) + 1 >= self.num_prompt_tokens
            and tokens[position - len(phrase) + 1 : position] == phrase[:-1]
        ]
        return np.asarray(last, np.int64)

    def _penalise(self, row: npt.NDArray[np.float32], position: int) -> None:
        if self._counts is None:
            self._counts = TokenCounts(self.token_ids, self.num_prompt_tokens)
        self._counts.advance_to(position)
        token_ids, in_prompt, output_counts = self._counts.arrays()
        if token_ids.max(initial=0) >= row.size:
            raise RowError("penalties", f"expected token ids below {row.size}, found {token_ids.max()} in the sequence")
        params = self.params
        apply_penalties(
            row,
            token_ids,
            in_prompt,
            output_counts,
            repetition=params.repetition_penalty,
            frequency=params.frequency_penalty,
            presence=params.presence_penalty,
        )
