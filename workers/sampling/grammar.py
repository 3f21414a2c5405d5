"""What the form of a request's output allows next, as a bit per token; a function of the tokens generated so far.

A matcher stands where the sampler stands, and follows the request's own list of tokens: forward token by token, and
back when a position is asked for again. A request that is resumed, or computed by another worker, starts from the
beginning and reads the tokens known then.
"""

# V vocabulary

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from sempre.ipc.errors import ModelError
from sempre.ipc.messages import SamplingSpec
from sempre.ipc.model_files import MAX_TOKENIZER_BYTES, read_text
from sempre.workers.sampling.reasoning import ReasoningState
from sempre.workers.sampling.row_error import RowError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Words = npt.NDArray[np.int32]

OPERATION = "structured_outputs"


def grammar_library_version() -> str:
    """For the fingerprint: what decides which tokens a grammar allows."""
    try:
        return importlib.metadata.version("llguidance")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class _Follower:
    """One grammar, and how far the output has been read by it."""

    def __init__(self, matcher: Future[LLMatcher], token_ids: list[int], num_prompt_tokens: int) -> None:
        self._matcher = matcher
        self._sequence = token_ids
        # output tokens of sequence[:_end] are read
        self._end = num_prompt_tokens

    def allowed_words(self, position: int) -> Words | None:
        """As of GrammarState, though of any length; None: the tokens before `position` have left this grammar.

        Raises RowError when there is no such grammar, or it needs more work than one token may cost.
        """
        matcher = self._matcher.result()
        _check(matcher)
        if position < self._end:
            matcher.rollback(self._end - position)
            self._end = position
        elif position > self._end:
            self._end += matcher.try_consume_tokens(self._sequence[self._end : position])
        _check(matcher)
        if self._end < position:
            return None
        mask = matcher.compute_bitmask()
        _check(matcher)
        return np.frombuffer(mask, "<i4")


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        # the first line says what is wrong; the rest is the library's view of the grammar
        raise RowError(OPERATION, matcher.get_error().partition("\n")[0])


class GrammarState:
    """The form of one output, and how far it has been read.

    An output that may reason has two forms, of an answer at once and of reasoning before it. What either allows may be
    sampled; the tokens decide, and once they begin with the start tag only the second counts.
    """

    def __init__(
        self,
        answer: _Follower | None,
        reasoned: _Follower | None,
        reasoning: ReasoningState | None,
        tokenizer: Future[LLTokenizer],
        num_words: int,
    ) -> None:
        self._answer = answer
        self._reasoned = reasoned
        self._reasoning = reasoning
        self._tokenizer = tokenizer
        self._num_words = num_words

    def allowed_words(self, position: int) -> Words:
        """int32 [V / 32], rounded up: bit v % 32 of word v // 32 is 1 if token v may stand at `position`.

        Raises RowError when there is no such grammar, it needs more work than one token may cost, or the tokens so far
        do not follow it.
        """
        begun = False
        if self._reasoning is not None:
            decode = self._decode
            forced = self._reasoning.forced_token(position, decode)
            if forced is not None:
                return self._only(forced)
            begun = self._reasoned is not None and self._reasoning.first_position(position, decode) is not None
        followers = [self._reasoned] if begun else [self._answer, self._reasoned]
        present = [follower for follower in followers if follower is not None]
        if not present:
            return np.full(self._num_words, -1, np.int32)
        found = [words for follower in present if (words := follower.allowed_words(position)) is not None]
        if not found:
            raise RowError(OPERATION, "the tokens so far do not satisfy the grammar")
        allowed = found[0][: self._num_words]
        return allowed if len(found) == 1 else allowed | found[1][: self._num_words]

    def _only(self, token_id: int) -> Words:
        words = np.zeros(self._num_words, np.uint32)
        words[token_id // 32] = np.uint32(1 << (token_id % 32))
        return words.view(np.int32)

    def _decode(self, token_ids: Sequence[int]) -> bytes:
        return self._tokenizer.result().decode_bytes(list(token_ids))


class GrammarCompiler:
    """Makes matchers for one model's tokenizer, on a thread of its own, beside the steps."""

    def __init__(self, model_folder: Path, vocab_size: int) -> None:
        self._path = model_folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        # the tokens that end an output are the request's; they are the same in all requests of a model, mostly
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}

    def start(self, params: SamplingSpec, token_ids: list[int], num_prompt_tokens: int) -> GrammarState:
        """Begin to compile the form of an output, `params.depends_on_output`; what goes wrong is raised by the state.

        `token_ids` is the worker's own list of the sequence, prompt first, which grows.
        """
        ends = tuple(params.eos_token_ids)

        def follower(grammar: str | None) -> _Follower | None:
            if grammar is None:
                return None
            return _Follower(self._threads.submit(self._compile, grammar, ends), token_ids, num_prompt_tokens)

        reasoning = params.reasoning
        return GrammarState(
            follower(params.grammar),
            None if reasoning is None else follower(reasoning.grammar),
            None if reasoning is None else ReasoningState(reasoning, token_ids, num_prompt_tokens),
            self._threads.submit(self._tokenizer, ends),
            -(-self._vocab_size // 32),
        )

    def _compile(self, grammar: str, eos_token_ids: tuple[int, ...]) -> LLMatcher:
        tokenizer = self._tokenizer(eos_token_ids)
        from llguidance import LLMatcher, LLParserLimits

        return LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))

    def _tokenizer(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RowError(
                OPERATION, "needs the llguidance package where the workers run: pip install 'sempre[structured]'"
            ) from error
        tokenizer = self._tokenizers.get(eos_token_ids)
        if tokenizer is None:
            try:
                text = read_text(self._path, MAX_TOKENIZER_BYTES)
                # without an end there is no grammar, and only text is read
                ends = list(eos_token_ids) or [0]
                tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
            except (ModelError, ValueError) as error:
                raise RowError(OPERATION, f"{self._path} cannot be used with grammars: {error}") from error
            self._tokenizers[eos_token_ids] = tokenizer
        return tokenizer
