"""Beam search: against a reference over whole rows of log-probabilities, against transformers, and on the axes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM
from workload import KV_BLOCK_BYTES

from sempre.engine import LLM, AsyncLLM, BeamSearchOutput, BeamSearchParams, ConfigError, Logprob, RequestError
from sempre.engine.frontend.beam_search import BeamSearch
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.models import resolve_model
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.messages import RequestSpec, SamplingSpec

PROMPTS = ["It is a truth universally acknowledged", "The whale", "She was not at all"]
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 32, "num_threads": 1, "max_logprobs": -1}
PARAMS = BeamSearchParams(beam_width=3, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as engine:
        yield engine


def facts(outputs: list[BeamSearchOutput]) -> list[Any]:
    return [output.to_dict() for output in outputs]


def reference(llm: LLM, prompt: str, params: BeamSearchParams, end_ids: set[int]) -> list[tuple[list[int], float]]:
    """All continuations of all beams, from whole rows, ordered by a stable sort; output tokens and total."""
    prompt_ids = llm.get_tokenizer().encode(prompt)
    row_of = SamplingParams(temperature=0.0, max_tokens=1, logprobs=-1, ignore_eos=True)
    beams: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(params.max_tokens):
        going_on: list[tuple[float, int, int]] = []
        for parent, (tokens, total) in enumerate(beams):
            [output] = llm.generate([{"prompt_token_ids": prompt_ids + tokens}], row_of, use_tqdm=False)
            rows = output.outputs[0].logprobs
            assert rows is not None
            best = sorted((-entry.logprob, token) for token, entry in rows[0].items())[: 2 * params.beam_width]
            going_on += [(total - cost, token, parent) for cost, token in best]
        going_on.sort(key=lambda item: (-item[0], item[1], item[2]))
        ended += [(beams[parent][0], total) for total, token, parent in going_on if token in end_ids]
        beams = [(beams[p][0] + [t], total) for total, t, p in going_on if t not in end_ids][: params.beam_width]
    everything = ended + beams
    everything.sort(key=lambda beam: beam[1] / (len(prompt_ids) + len(beam[0])) ** params.length_penalty, reverse=True)
    return everything[: params.beam_width]


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5])
def test_the_beams_are_those_of_the_reference(llm: LLM, length_penalty: float) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=5, length_penalty=length_penalty)
    [found] = llm.beam_search(PROMPTS[0], params)
    num_prompt = len(llm.get_tokenizer().encode(PROMPTS[0]))
    expected = reference(llm, PROMPTS[0], params, set(llm.get_tokenizer().eos_token_ids))
    assert [(each.tokens[num_prompt:], each.cum_logprob) for each in found.sequences] == expected
    assert len({tuple(each.tokens) for each in found.sequences}) == 3


def test_transformers_finds_the_same_beams(llm: LLM) -> None:
    # without an end token all beams have one length, and the definitions of a score agree
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny").path, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    for prompt in PROMPTS:
        prompt_ids = llm.get_tokenizer().encode(prompt)
        theirs = model.generate(
            torch.tensor([prompt_ids]),
            num_beams=4,
            num_return_sequences=4,
            max_new_tokens=10,
            do_sample=False,
            pad_token_id=0,
        )
        [ours] = llm.beam_search(prompt, BeamSearchParams(beam_width=4, max_tokens=10, ignore_eos=True))
        assert [each.tokens for each in ours.sequences] == theirs.tolist()


def test_one_beam_is_greedy(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, greedy, use_tqdm=False), strict=True):
        [found] = llm.beam_search([prompt], BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True))
        [beam] = found.sequences
        assert beam.tokens == output.prompt_token_ids + output.outputs[0].token_ids
        assert beam.cum_logprob == output.outputs[0].cumulative_logprob
        assert beam.text == llm.get_tokenizer().decode(beam.tokens)
        assert (beam.finish_reason, beam.stop_reason) == ("length", None)


def test_nothing_beside_a_search_changes_it(llm: LLM) -> None:
    together = llm.beam_search(PROMPTS, PARAMS)
    alone = [llm.beam_search([prompt], PARAMS)[0] for prompt in PROMPTS]
    assert facts(alone) == facts(together)
    assert facts(llm.beam_search(PROMPTS, PARAMS, concurrency_limit=1)) == facts(together)
    other = BeamSearchParams(beam_width=3, max_tokens=8, temperature=0.7)
    assert facts(llm.beam_search(PROMPTS, other)) == facts(together)
    # the control: a width of 2 is another search
    assert facts(llm.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=8))) != facts(together)


@pytest.mark.parametrize(
    "changes",
    [
        {"enable_prefix_caching": False, "max_num_batched_tokens": 16, "max_num_seqs": 2},
        {"multiprocessing": False},
        {"kv_cache_memory_bytes": 20 * KV_BLOCK_BYTES},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"seed": 7},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_engine_around_a_search_does_not_change_it(llm: LLM, changes: dict[str, Any]) -> None:
    with LLM("tiny", **{**SETTINGS, **changes}) as other:
        assert facts(other.beam_search(PROMPTS, PARAMS)) == facts(llm.beam_search(PROMPTS, PARAMS))


def test_the_asynchronous_engine_finds_the_same(llm: LLM) -> None:
    async def search() -> list[BeamSearchOutput]:
        async with AsyncLLM("tiny", **SETTINGS) as engine:
            some, others = await asyncio.gather(
                engine.beam_search(PROMPTS[:1], PARAMS), engine.beam_search(PROMPTS[1:], PARAMS, concurrency_limit=1)
            )
            return some + others

    assert facts(asyncio.run(search())) == facts(llm.beam_search(PROMPTS, PARAMS))


def test_a_search_leaves_unseeded_requests_as_they_are() -> None:
    outputs = []
    for searches in (False, True):
        with LLM("tiny", **SETTINGS) as engine:
            if searches:
                engine.beam_search(PROMPTS, PARAMS)
            params = SamplingParams(max_tokens=8)
            outputs.append([output.outputs[0].token_ids for output in engine.generate(PROMPTS, params, use_tqdm=False)])
    assert outputs[0] == outputs[1]


def test_the_context_ends_a_search(llm: LLM) -> None:
    token_ids = [5 + i % 90 for i in range(252)]
    [found] = llm.beam_search([{"prompt_token_ids": token_ids}], BeamSearchParams(beam_width=2, max_tokens=50))
    assert max(len(each.tokens) for each in found.sequences) == 256


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        ({"beam_width": 0}, "beam_width"),
        ({"beam_width": 2.5}, "beam_width"),
        ({"beam_width": 10**6}, "beam_width"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"length_penalty": 11.0}, "length_penalty"),
        ({"temperature": -1.0}, "temperature"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(values: dict[str, Any], parameter: str) -> None:
    with pytest.raises(ConfigError, match=parameter):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **values})


def test_errors_of_a_call(llm: LLM) -> None:
    for prompts in ([], ["good", [10**6]], [""]):
        if prompts:
            with pytest.raises(RequestError):
                llm.beam_search(prompts, PARAMS)  # type: ignore[arg-type]
        else:
            assert llm.beam_search([], PARAMS) == []
    with pytest.raises(ConfigError, match="concurrency_limit"):
        llm.beam_search(PROMPTS, PARAMS, concurrency_limit=0)
    with LLM("tiny", **{**SETTINGS, "max_logprobs": 5, "multiprocessing": False}) as engine:
        with pytest.raises(RequestError, match=r"beam_width=3 compares 6 .* max_logprobs=5"):
            engine.beam_search(PROMPTS, PARAMS)
        assert len(engine.beam_search(PROMPTS, BeamSearchParams(beam_width=2, max_tokens=2))) == 3


# The search alone, on rows written by hand.


def search_of(params: BeamSearchParams, *, end_ids: list[int] | None = None, num_prompt: int = 4) -> BeamSearch:
    prompt_ids = list(range(num_prompt))
    spec = RequestSpec(
        request_id="0", prompt_token_ids=prompt_ids, params=SamplingSpec(max_tokens=1), seed=0, ordinal=0
    )
    request = PreparedRequest(
        "0", None, prompt_ids, SamplingParams(), [spec], [0], time.time(), cast(PromptReasoning, None)
    )
    return BeamSearch(request, params, end_ids or [], room=100)


def row(**logprobs: float) -> dict[int, Logprob]:
    return {int(name[1:]): Logprob(value, 1) for name, value in logprobs.items()}


def test_equal_scores_are_ordered_by_token_and_parent() -> None:
    search = search_of(BeamSearchParams(beam_width=2, max_tokens=2))
    search.advance([row(t9=-1.0, t7=-1.0, t8=-1.0, t3=-2.0)])
    assert [beam.token_ids for beam in search.best()] == [(7,), (8,)]
    search.advance([row(t6=-1.0, t5=-1.0, t4=-9.0, t3=-9.0), row(t5=-1.0, t6=-1.0, t4=-9.0, t3=-9.0)])
    assert [beam.token_ids for beam in search.best()] == [(7, 5), (8, 5)]
    assert search.prompts == []


@pytest.mark.parametrize("shows_end", [False, True])
def test_a_complete_beam_takes_no_place_among_the_live_ones(shows_end: bool) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=2, include_stop_str_in_output=shows_end)
    search = search_of(params, end_ids=[1])
    search.advance([row(t1=-0.5, t2=-1.0, t3=-1.5, t4=-2.0)])
    assert [list(prompt["prompt_token_ids"])[4:] for prompt in search.prompts] == [[2], [3]]
    search.advance([row(t4=-0.1, t1=-7.0, t6=-8.0, t7=-9.0), row(t4=-9.0, t5=-9.0, t6=-9.0, t7=-9.0)])
    found = search.best()
    # the end token does not count towards the length: -0.5 / 4 is above -1.1 / 6
    assert [(beam.token_ids, beam.total, beam.end_token) for beam in found] == [
        ((1,) if shows_end else (), -0.5, 1),
        ((2, 4), -1.1, None),
    ]


def test_a_search_without_live_beams_ends() -> None:
    search = search_of(BeamSearchParams(beam_width=1, max_tokens=9), end_ids=[1, 2])
    search.advance([row(t1=-0.5, t2=-1.0)])
    assert search.prompts == []
    assert [beam.total for beam in search.best()] == [-0.5]
