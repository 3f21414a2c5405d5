"""What the grammar of a request allows next, as a bit per token; a function of the tokens generated so far.

The matcher stands where the sampler stands, and follows the request's own list of tokens: forward token by token, and
back when a position is asked for again. A request that is resumed, or computed by another worker, starts from the
beginning and reads the tokens known then.
"""

# V vocabulary

from __future__ import annotations

import importlib.metadata
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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


class GrammarState:
    """The grammar of one request, and how far its output has been read."""

    def __init__(
        self, matcher: Future[LLMatcher], token_ids: list[int], num_prompt_tokens: int, num_words: int
    ) -> None:
        self._matcher = matcher
        self._sequence = token_ids
        # output tokens of sequence[:_end] are read
        self._end = num_prompt_tokens
        self._num_words = num_words

    def allowed_words(self, position: int) -> Words:
        """int32 [V / 32], rounded up: bit v % 32 of word v // 32 is 1 if token v may stand at `position`.

        Raises RowError when there is no such grammar, or it needs more work than one token may cost.
        """
        matcher = self._matcher.result()
        self._advance(matcher, position)
        mask = matcher.compute_bitmask()
        _check(matcher)
        return np.frombuffer(mask, "<i4")[: self._num_words]

    def _advance(self, matcher: LLMatcher, position: int) -> None:
        if position < self._end:
            matcher.rollback(self._end - position)
        elif position > self._end:
            matcher.consume_tokens(self._sequence[self._end : position])
        self._end = position
        _check(matcher)


def _check(matcher: LLMatcher) -> None:
    if matcher.is_error():
        # the first line says what is wrong; the rest is the library's view of the grammar
        raise RowError(OPERATION, matcher.get_error().partition("\n")[0])


class GrammarCompiler:
    """Makes matchers for one model's tokenizer, on a thread of its own, beside the steps."""

    def __init__(self, model_folder: Path, vocab_size: int) -> None:
        self._path = model_folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        # the tokens that end an output are the request's; they are the same in all requests of a model, mostly
        self._tokenizers: dict[tuple[int, ...], LLTokenizer] = {}

    def start(
        self, grammar: str, eos_token_ids: list[int], token_ids: list[int], num_prompt_tokens: int
    ) -> GrammarState:
        """Begin to compile; what goes wrong is raised by the state."""
        matcher = self._threads.submit(self._compile, grammar, tuple(eos_token_ids))
        return GrammarState(matcher, token_ids, num_prompt_tokens, -(-self._vocab_size // 32))

    def _compile(self, grammar: str, eos_token_ids: tuple[int, ...]) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise RowError(
                OPERATION, "needs the llguidance package where the workers run: pip install 'sempre[structured]'"
            ) from error
        limits = LLParserLimits(verbose_errors=False)
        return LLMatcher(self._tokenizer(eos_token_ids), grammar, log_level=0, limits=limits)

    def _tokenizer(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        from llguidance import LLTokenizer

        tokenizer = self._tokenizers.get(eos_token_ids)
        if tokenizer is None:
            try:
                text = self._path.read_text(encoding="utf-8")
                tokenizer = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(eos_token_ids))
            except (OSError, ValueError) as error:
                raise RowError(OPERATION, f"{self._path} cannot be used with grammars: {error}") from error
            self._tokenizers[eos_token_ids] = tokenizer
        return tokenizer
