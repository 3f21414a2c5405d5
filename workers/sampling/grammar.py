"""What a request's grammar allows next, as a bit per token; a function of the tokens generated so far.

A matcher keeps up with the sampler and follows the request's own list of tokens: forward token by token, and back when
a position is requested again. A request that is resumed, or computed by another worker, starts over and reads the
tokens known then.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from sempre.ipc.errors import ModelError
from sempre.ipc.messages import SamplingSpec
from sempre.ipc.model_files import MAX_TOKENIZER_BYTES, read_text
from sempre.workers.sampling.row_error import NotReady, RowError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
from collections.abc import Callable

from sempre.ipc.messages import ReasoningSpec

Words = npt.NDArray[np.int32]
Result = TypeVar("Result")

OPERATION = "structured_outputs"
# a slow grammar leaves one to the others
_THREADS = 2
# characters of cached grammars; compiled, they take some hundred times as many bytes
_MOST_COMPILED = 1 << 18
# An output whose first tokens hold no start tag does not reason.
_MOST_OPENING_TOKENS = 32


def grammar_library_version() -> str:
    """For the fingerprint: the library decides which tokens a grammar allows."""
    try:
        return importlib.metadata.version("llguidance")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class StepPatience:
    """How long the rows of one step may wait, in total, for work on their grammars."""

    def __init__(self, most_s: float | None) -> None:
        """None: no limit."""
        self._most_s = most_s
        self._left_s = most_s

    def begin_step(self) -> None:
        """Start a new step."""
        self._left_s = self._most_s

    def result_of(self, work: Future[Result]) -> Result:
        """Wait for a result. Raises NotReady when it is not ready in time, and what the work raises."""
        if work.done():
            return work.result()
        began = time.monotonic()
        done = wait([work], self._left_s).done
        if self._left_s is not None:
            self._left_s = max(0.0, self._left_s - (time.monotonic() - began))
        if not done:
            raise NotReady(OPERATION)
        return work.result()


class _Follower:
    """One grammar, and how far it has read the output; a thread reads, for one position at a time."""

    def __init__(
        self,
        threads: ThreadPoolExecutor,
        patience: StepPatience,
        matcher: Future[LLMatcher],
        token_ids: list[int],
        num_prompt_tokens: int,
    ) -> None:
        self._threads = threads
        self._patience = patience
        self._compiled = matcher
        self._matcher: LLMatcher | None = None
        self._sequence = token_ids
        # output tokens of sequence[:_end] are read
        self._end = num_prompt_tokens
        self._work: Future[Words | None] | None = None
        self._position = -1
        """the position `_work` is for"""

    def prepare(self, position: int) -> None:
        """Start computing what is allowed at `position`."""
        if self._work is not None and self._position != position:
            if not self._work.done():
                return
            self._work = None
        if self._work is None:
            self._position = position
            self._work = self._threads.submit(self._allowed_words, position)

    def allowed_words(self, position: int) -> Words | None:
        """Like GrammarState's, but of any length; None: the tokens before `position` have left this grammar.

        Raises NotReady, and RowError when there is no such grammar, or it needs more work than allowed per token.
        """
        self.prepare(position)
        assert self._work is not None
        if self._position != position:
            # for a position that nobody waits for any more
            self._finish()
            self.prepare(position)
        return self._finish()

    def _finish(self) -> Words | None:
        assert self._work is not None
        found = self._patience.result_of(self._work)
        self._work = None
        return found

    def _allowed_words(self, position: int) -> Words | None:
        if self._matcher is None:
            # requests with the same grammar share what is compiled, but not what they read
            self._matcher = self._compiled.result().deep_copy()
        matcher = self._matcher
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
    """The grammar of one output, and how far it has been read.

    An output that may reason has two grammars: one for a direct answer, one for reasoning first. What either allows may
    be sampled; the tokens decide, and once they begin with the start tag only the second applies.
    """

    def __init__(
        self,
        answer: _Follower | None,
        reasoned: _Follower | None,
        reasoning: ReasoningState | None,
        tokenizer: Future[LLTokenizer],
        patience: StepPatience,
        num_words: int,
    ) -> None:
        self._patience = patience
        self._answer = answer
        self._reasoned = reasoned
        self._reasoning = reasoning
        self._tokenizer = tokenizer
        self._num_words = num_words

    def prepare(self, position: int) -> None:
        """Start computing what is allowed at `position`, which will be requested."""
        for follower in (self._answer, self._reasoned):
            if follower is not None:
                follower.prepare(position)

    def allowed_words(self, position: int) -> Words:
        """int32 [V / 32], rounded up: bit v % 32 of word v // 32 is 1 if token v is allowed at `position`.

        Raises NotReady when that is still being computed; RowError when there is no such grammar, it needs more work
        than allowed per token, or the tokens so far do not follow it.
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
        return self._patience.result_of(self._tokenizer).decode_bytes(list(token_ids))


class GrammarCompiler:
    """Makes matchers for one model's tokenizer; compiling and matching run on threads, alongside the steps.

    A step waits at most `step_wait_s` for all its rows together, so that one request's grammar, however large, does not
    hold up the others: a row that is not ready is tried again in a later step.
    """

    def __init__(self, model_folder: Path, vocab_size: int, *, step_wait_s: float | None = None) -> None:
        """`step_wait_s` None: a step waits until its rows are ready."""
        self._path = model_folder / "tokenizer.json"
        self._vocab_size = vocab_size
        self.patience = StepPatience(step_wait_s)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        # the tokens that end an output belong to the request, but are mostly the same for all requests of a model
        self._tokenizers: dict[tuple[int, ...], Future[LLTokenizer]] = {}
        self._compiled: dict[tuple[str, tuple[int, ...]], Future[LLMatcher]] = {}

    def start(self, params: SamplingSpec, token_ids: list[int], num_prompt_tokens: int) -> GrammarState:
        """Start compiling the grammar of an output (`params.depends_on_output`); errors are raised by the state.

        `token_ids` is the worker's own list of the sequence, prompt first, which grows.
        """
        ends = tuple(params.eos_token_ids)
        tokenizer = self._tokenizers.get(ends)
        if tokenizer is None:
            tokenizer = self._tokenizers[ends] = self._threads.submit(self._tokenizer, ends)

        def follower(grammar: str | None) -> _Follower | None:
            if grammar is None:
                return None
            compiled = self._matcher(grammar, ends, tokenizer)
            return _Follower(self._threads, self.patience, compiled, token_ids, num_prompt_tokens)

        reasoning = params.reasoning
        return GrammarState(
            follower(params.grammar),
            None if reasoning is None else follower(reasoning.grammar),
            None if reasoning is None else ReasoningState(reasoning, token_ids, num_prompt_tokens),
            tokenizer,
            self.patience,
            -(-self._vocab_size // 32),
        )

    def _matcher(self, grammar: str, ends: tuple[int, ...], tokenizer: Future[LLTokenizer]) -> Future[LLMatcher]:
        key = (grammar, ends)
        found = self._compiled.get(key)
        if found is None:
            while self._compiled and sum(len(kept) for kept, _ in self._compiled) + len(grammar) > _MOST_COMPILED:
                del self._compiled[next(iter(self._compiled))]
            found = self._compiled[key] = self._threads.submit(self._compile, grammar, tokenizer)
        return found

    def _compile(self, grammar: str, tokenizer: Future[LLTokenizer]) -> LLMatcher:
        known = tokenizer.result()
        from llguidance import LLMatcher, LLParserLimits

        return LLMatcher(known, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))

    def _tokenizer(self, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise RowError(
                OPERATION, "needs the package llguidance where the workers run: pip install llguidance"
            ) from error
        try:
            text = read_text(self._path, MAX_TOKENIZER_BYTES)
            # without an end there is no grammar, and only text is decoded
            return LLTokenizer(text, n_vocab=self._vocab_size, eos_token=list(eos_token_ids) or [0])
        except (ModelError, ValueError) as error:
            raise RowError(OPERATION, f"{self._path} cannot be used with grammars: {error}") from error


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
        """The token of the end tag required at `position`; None: the budget requires none there."""
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
