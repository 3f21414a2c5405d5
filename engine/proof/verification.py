"""The axes of the guarantee, checked on the user's machine with the user's model, and controls that must fail.

The reference is each request alone. Every axis runs the same requests in another way, most of them in an engine of
other settings. A control does the same with the ordinary matmul, whose bits depend on the batch, and with other seeds:
if it is equal, the check could not have noticed anything.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.llm import LLM
from sempre.engine.proof.axis_result import AxisResult, judged, not_checked
from sempre.engine.proof.kept_output import KeptOutput, kept_completion, kept_completions
from sempre.engine.proof.replay import has_recurrent_layers
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.errors import SempreError

MAX_MODEL_LEN = 512
_MAX_TOKENS = 24
_LOGPROBS = 4
_MAX_IDS = 4000
_MIB = 2**20
# KV cache of the engines that are not short of it, enough for all requests of a small and of a large model
_KV_BYTES = (64 * _MIB, 512 * _MIB, 4096 * _MIB)
_SPECULATION = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}


class Asked(NamedTuple):
    """One request."""

    prompt: list[int]
    params: SamplingParams

    def with_seed(self, offset: int) -> Asked:
        """The same request with a higher seed."""
        return Asked(self.prompt, replace(self.params, seed=(self.params.seed or 0) + offset))


def requests(vocab_size: int) -> list[Asked]:
    """Return prompts of 1 to 300 tokens, some with a common beginning, under all kinds of sampling."""
    shared = _prompt(1, 80, vocab_size)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (_prompt(2, 1, vocab_size), {"temperature": 0.0}),
        (_prompt(3, 5, vocab_size), {}),
        (_prompt(4, 17, vocab_size), {"temperature": 0.7, "top_p": 0.9}),
        (_prompt(5, 64, vocab_size), {"temperature": 1.3, "top_k": 40}),
        (_prompt(6, 65, vocab_size), {"min_p": 0.05}),
        (_prompt(7, 130, vocab_size), {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4}),
        (_prompt(8, 300, vocab_size), {"presence_penalty": 0.7, "top_k": 100, "top_p": 0.95}),
        ([*shared, *_prompt(9, 3, vocab_size)], {"temperature": 0.0}),
        ([*shared, *_prompt(10, 20, vocab_size)], {}),
        ([*shared, *_prompt(11, 40, vocab_size)], {"logit_bias": {17: 2.5, 99: -3.0}, "min_tokens": 5}),
        # what repeats, so that drafts of n-grams are accepted
        (_prompt(12, 6, vocab_size) * 20, {"temperature": 0.0}),
        (_prompt(13, 200, vocab_size), {"temperature": 0.8}),
    ]
    common: dict[str, Any] = {"max_tokens": _MAX_TOKENS, "logprobs": _LOGPROBS, "ignore_eos": True}
    return [
        Asked(prompt, SamplingParams(seed=1000 + place, **common, **sampling))
        for place, (prompt, sampling) in enumerate(kinds)
    ]


def _prompt(start: int, length: int, vocab_size: int) -> list[int]:
    size = min(vocab_size, _MAX_IDS)
    return [(3 + start * 7919 + place * 104_729) % size for place in range(length)]


class EngineAxes(NamedTuple):
    """The axes that one engine is started for."""

    settings: dict[str, Any]
    axes: dict[str, Check]


class Verification:
    """Checks one model; `results` yields each axis as it is done."""

    def __init__(self, model: str, settings: Mapping[str, Any]) -> None:
        """`settings`: keywords of `LLM` that the user gave."""
        self._model = model
        self._settings = {"max_model_len": MAX_MODEL_LEN, "multiprocessing": False, **settings}
        self._asked: list[Asked] = []
        self._alone: list[KeptOutput] = []
        self._unseeded: list[KeptOutput] = []
        self._block_bytes = 0
        self.fingerprint = ""

    def results(self) -> Iterator[AxisResult]:
        """Start one engine after the other. Raises the errors of `LLM` if the first one does not start."""
        with self._first_engine() as llm:
            self.fingerprint = llm.fingerprint
            self._asked = requests(llm.llm_engine.model_config.vocab_size)
            self._unseeded = self._run(llm, self._without_seeds()[:4])
            self._alone = [self._run(llm, [asked])[0] for asked in self._asked]
            for name, check in _PLAIN.items():
                yield self._checked(name, check, llm)
        for settings, axes in self._others():
            yield from self._with_engine(settings, axes)
        yield self._control()

    def _first_engine(self) -> LLM:
        """Return an engine whose KV cache holds all requests, and note the size of a block."""
        if "kv_cache_memory_bytes" in self._settings:
            llm = LLM(self._model, **self._settings)
            self._block_bytes = self._settings["kv_cache_memory_bytes"] // llm.llm_engine.cache_config.num_gpu_blocks
            return llm
        for size in _KV_BYTES:
            try:
                llm = LLM(self._model, **self._settings, kv_cache_memory_bytes=size)
            except SempreError:
                if size == _KV_BYTES[-1]:
                    raise
                continue
            self._settings["kv_cache_memory_bytes"] = size
            self._block_bytes = -(-size // llm.llm_engine.cache_config.num_gpu_blocks)
            return llm
        raise AssertionError("every size was tried")

    def _others(self) -> Iterator[EngineAxes]:
        yield EngineAxes({"max_num_batched_tokens": 33, "max_num_seqs": 12}, _CHUNKS)
        yield EngineAxes({"enable_prefix_caching": False, "enforce_eager": True}, _WITHOUT)
        # half as much again as the longest sequence that may come
        blocks = -(-MAX_MODEL_LEN // 16) + 2
        yield EngineAxes({"kv_cache_memory_bytes": blocks * self._block_bytes, "max_num_seqs": 12}, _SHORT_OF_MEMORY)
        yield EngineAxes({"speculative_config": _SPECULATION}, _SPECULATING)
        yield EngineAxes({"multiprocessing": True}, _PROCESSES)
        yield EngineAxes({"multiprocessing": True, "data_parallel_size": 2}, _REPLICAS)

    def _with_engine(self, settings: dict[str, Any], axes: dict[str, Check]) -> Iterator[AxisResult]:
        try:
            llm = LLM(self._model, **{**self._settings, **settings})
        except SempreError as error:
            why = not_checked(f"the engine did not start: {error}")
            yield from (replace(why, axis=name) for name in axes)
            return
        with llm:
            for name, check in axes.items():
                yield self._checked(name, check, llm)

    def _checked(self, name: str, check: Check, llm: LLM) -> AxisResult:
        return replace(check(self, llm), axis=name)

    def _run(self, llm: LLM, asked: Sequence[Asked]) -> list[KeptOutput]:
        """Run requests at once; return their completions in order."""
        prompts: list[TokensPrompt] = [{"prompt_token_ids": each.prompt} for each in asked]
        outputs = llm.generate(prompts, [each.params for each in asked], use_tqdm=False)
        return [kept for output in outputs for kept in kept_completions(output)]

    def _changed(self, **params: Any) -> list[Asked]:
        """The requests with other parameters."""
        return [Asked(each.prompt, replace(each.params, **params)) for each in self._asked]

    def _without_seeds(self) -> list[Asked]:
        return [each for each in self._changed(seed=None) if not each.params.is_greedy]

    # the axes

    def together(self, llm: LLM) -> AxisResult:
        """All requests in one batch, which also share the keys of a common prefix."""
        return judged(self._alone, self._run(llm, self._asked))

    def backwards(self, llm: LLM) -> AxisResult:
        """In the reverse order."""
        return judged(self._alone, self._run(llm, self._asked[::-1])[::-1])

    def cold_then_warm(self, llm: LLM) -> AxisResult:
        """With an empty prefix cache, and with one that holds every prompt."""
        llm.reset_prefix_cache()
        twice = [*self._run(llm, self._asked), *self._run(llm, self._asked)]
        return judged([*self._alone, *self._alone], twice)

    def streamed(self, llm: LLM) -> AxisResult:
        """As a stream, the last output of which holds everything."""
        found = []
        for asked in self._asked[:4]:
            *_, last = llm.stream({"prompt_token_ids": asked.prompt}, asked.params)
            found.append(kept_completion(last, last.outputs[0]))
        return judged(self._alone[:4], found)

    def siblings(self, llm: LLM) -> AxisResult:
        """Completion i of n against a lone request with the seed plus i."""
        asked = [each for each in self._asked if not each.params.is_greedy][:4]
        lone = [each.with_seed(i) for each in asked for i in range(3)]
        expected = [self._run(llm, [each])[0] for each in lone]
        return judged(expected, self._run(llm, [Asked(each.prompt, replace(each.params, n=3)) for each in asked]))

    def reporting(self, llm: LLM) -> AxisResult:
        """Without text and log-probabilities, with one, and with those of the prompt."""
        found = [*self._run(llm, self._changed(logprobs=None, detokenize=False))]
        found += self._run(llm, self._changed(prompt_logprobs=1))
        return judged([*self._alone, *self._alone], found)

    def scoring(self, llm: LLM) -> AxisResult:
        """Log-probabilities of prompt and output, read as a prompt, against those given while generating."""
        if has_recurrent_layers(llm.model_folder):
            return not_checked("recurrent layers compute a prompt in another order than generated tokens")
        prompts = [[*each.prompt, *kept.token_ids] for each, kept in zip(self._asked, self._alone, strict=True)]
        scores = llm.score(prompts)
        found = [
            replace(kept, logprobs=[value or 0.0 for value in score.logprobs[-len(kept.token_ids) :]], rows=None)
            for kept, score in zip(self._alone, scores, strict=True)
        ]
        return judged(self._alone, found)

    def unseeded(self, llm: LLM) -> AxisResult:
        """Requests without a seed, in another order and after other requests; the first of this engine."""
        asked = self._without_seeds()
        found = self._run(llm, asked[::-1])[::-1]
        return judged(self._unseeded, found[:4])

    def preempted(self, llm: LLM) -> AxisResult:
        """With fewer blocks than the requests need."""
        return self._if_counted(llm, "num_preemptions", "nothing was preempted: the KV cache holds all requests")

    def speculating(self, llm: LLM) -> AxisResult:
        """With drafts, some of which are accepted."""
        return self._if_counted(llm, "spec_decode_num_draft_tokens", "nothing was drafted")

    def killed(self, llm: LLM) -> AxisResult:
        """A worker is killed while it computes."""
        prompts: list[TokensPrompt] = [{"prompt_token_ids": each.prompt} for each in self._asked]
        llm.enqueue(prompts, [each.params for each in self._asked])
        for pid in llm.llm_engine.parallel_config.worker_pids:
            os.kill(pid, signal.SIGKILL)
        outputs = llm.wait_for_completion(use_tqdm=False)
        return judged(self._alone, [kept for output in outputs for kept in kept_completions(output)])

    def other_seeds(self, llm: LLM) -> AxisResult:
        """A control: each request with the seed plus one."""
        asked = [each for each in self._asked if not each.params.is_greedy]
        expected = [kept for each, kept in zip(self._asked, self._alone, strict=True) if not each.params.is_greedy]
        found = self._run(llm, [each.with_seed(1) for each in asked])
        return judged(expected, found, is_control=True)

    def _if_counted(self, llm: LLM, counter: str, otherwise: str) -> AxisResult:
        result = self.together(llm)
        counts = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
        return result if counts.get(f"sempre:{counter}") else not_checked(otherwise)

    def _control(self) -> AxisResult:
        """The ordinary matmul: alone against together."""
        name = "control: the ordinary matmul"
        try:
            llm = LLM(self._model, **{**self._settings, "numerics": "control"})
        except SempreError as error:
            return replace(not_checked(f"the engine did not start: {error}", is_control=True), axis=name)
        with llm:
            alone = [self._run(llm, [asked])[0] for asked in self._asked]
            return replace(judged(alone, self._run(llm, self._asked), is_control=True), axis=name)


Check = Callable[[Verification, LLM], AxisResult]
_PLAIN: dict[str, Check] = {
    "batch: all at once": Verification.together,
    "order of arrival": Verification.backwards,
    "prefix cache: cold, warm": Verification.cold_then_warm,
    "streamed": Verification.streamed,
    "siblings of n": Verification.siblings,
    "what is reported": Verification.reporting,
    "scored as a prompt": Verification.scoring,
    "control: other seeds": Verification.other_seeds,
}
_CHUNKS: dict[str, Check] = {
    "without seeds, another order": Verification.unseeded,
    "prompts in chunks": Verification.together,
}
_WITHOUT: dict[str, Check] = {"no prefix cache, no graphs": Verification.together}
_SHORT_OF_MEMORY: dict[str, Check] = {"preempted": Verification.preempted}
_SPECULATING: dict[str, Check] = {"speculation": Verification.speculating}
_PROCESSES: dict[str, Check] = {
    "processes": Verification.together,
    "a worker killed": Verification.killed,
}
_REPLICAS: dict[str, Check] = {"two replicas": Verification.together}
