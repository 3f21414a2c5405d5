"""Beam search over ordinary requests: the most probable continuations of a prompt, without sampling.

Each round asks the engine for one token after every beam, with its 2·W best log-probabilities (W beams), and keeps the
W best of all continuations. One that ends the sequence is complete and takes no place among them. A score is the sum of
the tokens' float32 log-probabilities, added in float64 in their order, over length**length_penalty; the length counts
the prompt, but not the end token (Wu et al. 2016, arXiv 1609.08144, with vLLM's length). Equal scores are ordered by
token id, then by parent. So a result is as independent of other requests as the log-probabilities are.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.frontend.request_builder import PreparedRequest, RequestBuilder
from sempre.engine.outputs import BeamSearchOutput, BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
from sempre.engine.parameter_checks import boolean, finite, integer, refusal, shown
from sempre.engine.proof.logprob_bits import float32_bytes
from sempre.engine.proof.output_chain import OutputChain
from sempre.engine.proof.recorder import Finished, Recorder, Recording
from sempre.engine.sampling_params import MAX_N, RequestOutputKind, SamplingParams
from sempre.engine.text.detokenizer import IncrementalDetokenizer
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import RequestError

if TYPE_CHECKING:
    from sempre.engine.output_stream import OutputStream

Round = list[RequestOutput]
# far beyond use, and a length to this power is still a float
MAX_LENGTH_PENALTY = 10


@dataclass
class BeamSearchParams:
    """Parameters of a beam search. Raises ConfigError (a ValueError) that names the parameter."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    """Accepted as vLLM does; beams are ranked by the model's own log-probabilities, which it does not change."""
    length_penalty: float = 1.0
    """Exponent of the length by which a score is divided; above 1 prefers longer sequences."""
    include_stop_str_in_output: bool = False
    """Whether the end token is part of a sequence."""

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_N), ("max_tokens", None)):
            value = integer(name, getattr(self, name))
            if value < 1 or (most is not None and value > most):
                raise refusal(name, value, f"must be at least 1{f' and at most {most}' if most else ''}, got {value}.")
            setattr(self, name, value)
        for name in ("ignore_eos", "include_stop_str_in_output"):
            boolean(name, getattr(self, name))
        self.length_penalty = finite("length_penalty", self.length_penalty)
        if abs(self.length_penalty) > MAX_LENGTH_PENALTY:
            bounds = f"must be within ±{MAX_LENGTH_PENALTY}, got {self.length_penalty}."
            raise refusal("length_penalty", self.length_penalty, bounds)
        self.temperature = finite("temperature", self.temperature)
        if self.temperature < 0.0:
            raise refusal("temperature", self.temperature, f"must be non-negative, got {self.temperature}.")


class Beam(NamedTuple):
    """A continuation of the prompt."""

    token_ids: tuple[int, ...] = ()
    """what follows the prompt"""
    logprobs: tuple[dict[int, Logprob], ...] = ()
    """per token, all that were compared"""
    total: float = 0.0
    """sum of the tokens' log-probabilities"""
    end_token: int | None = None
    """the token that ended the sequence"""

    @property
    def finish_reason(self) -> str:
        return "length" if self.end_token is None else "stop"


class _Candidate(NamedTuple):
    """A beam and the token after it; the smallest is the best."""

    cost: float
    token_id: int
    parent: int


class BeamSearch:
    """The search after one prompt."""

    def __init__(self, request: PreparedRequest, params: BeamSearchParams, end_token_ids: Sequence[int], room: int):
        """`room`: how many tokens the context has left after the prompt."""
        self.request = request
        self.params = params
        self._end_token_ids = frozenset(() if params.ignore_eos else end_token_ids)
        self._rounds_left = min(params.max_tokens, room)
        self._live = [Beam()]
        self._complete: list[Beam] = []
        self._receipts: list[str] = []
        """of the best beams, once they are recorded"""

    @property
    def has_ended(self) -> bool:
        """Whether there are no more rounds."""
        return not self._rounds_left

    @property
    def prompts(self) -> list[TokensPrompt]:
        """What is asked for in the next round, one per beam; none when the search has ended."""
        if self.has_ended:
            return []
        token_ids, salt = self.request.prompt_token_ids, self.request.sequences[0].cache_salt
        prompts = [TokensPrompt(prompt_token_ids=[*token_ids, *beam.token_ids]) for beam in self._live]
        for prompt in prompts:
            if salt is not None:
                prompt["cache_salt"] = salt
        return prompts

    def advance(self, rows: Sequence[dict[int, Logprob]]) -> None:
        """Take the log-probabilities after each beam."""
        width = self.params.beam_width
        candidates = sorted(
            _Candidate(cost=-(beam.total + entry.logprob), token_id=token_id, parent=parent)
            for parent, (beam, row) in enumerate(zip(self._live, rows, strict=True))
            for token_id, entry in _best(row, 2 * width)
        )
        live: list[Beam] = []
        for candidate in candidates:
            beam, token_id, total = self._live[candidate.parent], candidate.token_id, -candidate.cost
            logprobs = (*beam.logprobs, rows[candidate.parent])
            if token_id in self._end_token_ids:
                shown_ids = (token_id,) if self.params.include_stop_str_in_output else ()
                self._complete.append(Beam((*beam.token_ids, *shown_ids), logprobs, total, token_id))
            elif len(live) < width:
                live.append(Beam((*beam.token_ids, token_id), logprobs, total))
        self._live = live
        self._rounds_left = self._rounds_left - 1 if live else 0

    def best(self) -> list[Beam]:
        """The best beams, best first; complete ones precede others of the same score."""
        beams = [*self._complete, *self._live]
        return sorted(beams, key=self._score, reverse=True)[: self.params.beam_width]

    def record(self, recorder: Recorder) -> None:
        """Make a receipt of each of the best beams. Raises RecordError."""
        asked = {name: value for name, value in asdict(self.params).items() if name != "temperature"}
        for index, beam in enumerate(self.best()):
            chain = OutputChain()
            for token_id, row in zip(beam.token_ids, beam.logprobs, strict=False):
                chain.add_tokens([token_id], float32_bytes([row[token_id].logprob]), 4)
            finished = Finished(
                request=self.request,
                index=index,
                token_ids=list(beam.token_ids),
                recording=Recording(chain, None),
                finish_reason=beam.finish_reason,
                stop_reason=beam.end_token,
                finished_time=time.time(),
                beam_search={**asked, "index": index},
            )
            self._receipts.append(recorder.receipt(finished))

    def output(self, tokenizer: Tokenizer) -> BeamSearchOutput:
        """The best beams for a caller in Python: tokens and text begin with the prompt."""
        return BeamSearchOutput([self._sequence(i, beam, tokenizer) for i, beam in enumerate(self.best())])

    def _receipt(self, index: int) -> str | None:
        return self._receipts[index] if self._receipts else None

    def request_output(self, tokenizer: Tokenizer, given: SamplingParams, fingerprint: str) -> RequestOutput:
        """The best beams as the completions of one request, with the log-probabilities that were asked for."""
        request = self.request
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            prompt_logprobs=None,
            outputs=[self._completion(i, beam, tokenizer, given) for i, beam in enumerate(self.best())],
            finished=True,
            fingerprint=fingerprint,
        )

    def _completion(self, index: int, beam: Beam, tokenizer: Tokenizer, given: SamplingParams) -> CompletionOutput:
        detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=given.skip_special_tokens,
            prompt_token_ids=self.request.prompt_token_ids,
        )
        rows = None
        if given.logprobs is not None:
            pairs = zip(beam.token_ids, beam.logprobs, strict=False)  # an end token that is not shown has a row
            rows = [{token_id: row[token_id], **dict(_best(row, given.logprobs))} for token_id, row in pairs]
        return CompletionOutput(
            index=index,
            text=detokenizer.take_all(beam.token_ids, ends=True),
            token_ids=list(beam.token_ids),
            cumulative_logprob=beam.total,
            logprobs=rows,
            finish_reason=beam.finish_reason,
            seed=self.request.seeds[0],
            receipt=self._receipt(index),
        )

    def _sequence(self, index: int, beam: Beam, tokenizer: Tokenizer) -> BeamSearchSequence:
        token_ids = [*self.request.prompt_token_ids, *beam.token_ids]
        return BeamSearchSequence(
            tokens=token_ids,
            logprobs=list(beam.logprobs),
            text=tokenizer.decode(token_ids) if tokenizer.makes_text else "",
            cum_logprob=beam.total,
            finish_reason=beam.finish_reason,
            stop_reason=beam.end_token,
            receipt=self._receipt(index),
        )

    def _score(self, beam: Beam) -> float:
        is_end_shown = beam.end_token is not None and self.params.include_stop_str_in_output
        length = len(self.request.prompt_token_ids) + len(beam.token_ids) - is_end_shown
        return float(beam.total / math.pow(length, self.params.length_penalty))


def _best(row: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` most probable tokens, all for -1."""
    ranked = sorted(row.items(), key=lambda item: (-item[1].logprob, item[0]))
    return ranked if count == -1 else ranked[:count]


class BeamSearches:
    """The searches of one call. Every round of theirs is one call of the engine."""

    def __init__(
        self,
        builder: RequestBuilder,
        prompts: object,
        params: BeamSearchParams,
        *,
        given: SamplingParams | None = None,
    ) -> None:
        """`given`: how prompts are cut, and how many log-probabilities are reported beside those compared.

        Raises RequestError for a refused prompt, or for more beams than the engine has log-probabilities.
        """
        self.is_recorded = builder.records_all
        """whether the beams have receipts"""
        limits = builder.limits
        params = replace(params)  # checks values that were assigned later
        wanted = 2 * params.beam_width
        if limits.logprobs_mode.endswith("logits"):
            raise RequestError(
                f"a beam search adds log-probabilities, and logprobs_mode={limits.logprobs_mode!r} reports logits. "
                "Start the engine with raw_logprobs or processed_logprobs.",
                parameter="logprobs_mode",
                value=limits.logprobs_mode,
            )
        if limits.max_logprobs != -1 and min(wanted, limits.vocab_size) > limits.max_logprobs:
            raise RequestError(
                f"beam_width={shown(params.beam_width)} compares {wanted} log-probabilities per token, more than the "
                f"engine's max_logprobs={limits.max_logprobs}. Raise max_logprobs of the engine.",
                parameter="beam_width",
                value=params.beam_width,
            )
        reported = given.logprobs if given is not None and given.logprobs is not None else 0
        most = -1 if reported == -1 or wanted >= limits.vocab_size else max(wanted, reported)
        self.params = replace(
            given or SamplingParams(),
            n=1,
            temperature=0.0,
            seed=limits.engine_seed,
            max_tokens=1,
            logprobs=most,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        requests = builder.build_all(prompts, replace(self.params, max_tokens=params.max_tokens), record=False)
        most_tokens = min(limits.max_model_len, limits.max_kv_tokens)
        self.searches = [
            BeamSearch(request, params, limits.eos_token_ids, most_tokens - len(request.prompt_token_ids))
            for request in requests
        ]

    @property
    def num_finished(self) -> int:
        """Number of prompts whose search has ended."""
        return sum(search.has_ended for search in self.searches)

    def record(self, recorder: Recorder) -> None:
        """Make the receipts of the beams, if they have some: all rounds are done. Raises RecordError."""
        if self.is_recorded:
            for search in self.searches:
                search.record(recorder)

    def outputs(self, tokenizer: Tokenizer) -> list[BeamSearchOutput]:
        """The results for a caller in Python, in the order of the prompts."""
        return [search.output(tokenizer) for search in self.searches]

    async def run(
        self, start: Callable[[list[TokensPrompt], SamplingParams], OutputStream], at_once: int | None = None
    ) -> None:
        """Run all rounds in an event loop. Raises the errors of `rounds` and of `start`."""
        rounds, outputs = self.rounds(at_once), None
        with suppress(StopIteration):
            while True:
                outputs = await start(rounds.send(outputs), self.params).finished()

    def rounds(self, at_once: int | None = None) -> Generator[list[TokensPrompt], Round | None, None]:
        """Yield the prompts of each round and take their outputs; at most `at_once` searches run at a time.

        Start it with `send(None)`. Raises RequestError for a request that failed, ConfigError for an `at_once` below 1.
        """
        if at_once is not None and integer("concurrency_limit", at_once) < 1:
            raise refusal("concurrency_limit", at_once, f"must be at least 1, got {shown(at_once)}.")
        for group in _groups(self.searches, at_once):
            while running := [(search, prompts) for search in group if (prompts := search.prompts)]:
                outputs = yield [prompt for _, prompts in running for prompt in prompts]
                assert outputs is not None
                rows = map(_row, outputs)
                for search, prompts in running:
                    search.advance(list(islice(rows, len(prompts))))


def _groups(searches: list[BeamSearch], at_once: int | None) -> Iterator[list[BeamSearch]]:
    size = at_once or max(len(searches), 1)
    for start in range(0, len(searches), size):
        yield searches[start : start + size]


def _row(output: RequestOutput) -> dict[int, Logprob]:
    [completion] = output.outputs
    if completion.error is not None or not completion.logprobs:
        raise RequestError(f"a beam search failed: {completion.error}", request_id=output.request_id)
    return completion.logprobs[0]
