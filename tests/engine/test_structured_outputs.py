"""Outputs that follow a form: what is accepted, what is refused and how, and that the form is kept."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from sempre.engine import LLM, ConfigError, RequestError, SamplingParams, StructuredOutputsParams
from sempre.workers.sampling.grammar import StepPatience
from sempre.workers.sampling.row_error import NotReady

SCHEMA = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "tags": {"type": "array", "items": {"enum": ["sea", "land"]}, "minItems": 1, "maxItems": 3},
        "year": {"type": ["integer", "null"], "minimum": 1500, "maximum": 2100},
    },
    "required": ["title", "tags", "year"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", multiprocessing=False, max_model_len=512, num_threads=1) as engine:
        yield engine


def generated(llm: LLM, params: list[SamplingParams]) -> list[Any]:
    outputs = llm.generate([f"Chapter {i}." for i in range(len(params))], params, use_tqdm=False)
    return [output.outputs[0] for output in outputs]


def form(**fields: Any) -> SamplingParams:
    settings = {name: fields.pop(name) for name in ("temperature", "seed", "max_tokens", "n") if name in fields}
    structured = StructuredOutputsParams(**fields)
    return SamplingParams(**{"max_tokens": 100, "seed": 3, **settings}, structured_outputs=structured)


def test_a_schema_is_kept_at_every_temperature_and_seed(llm: LLM) -> None:
    params = [
        form(json=SCHEMA, disable_any_whitespace=True, temperature=t, seed=s) for t in (0.0, 0.7, 1.5) for s in range(4)
    ]
    for output in generated(llm, params):
        value = json.loads(output.text)
        assert output.finish_reason == "stop"
        assert list(value) == ["title", "tags", "year"]
        assert re.fullmatch("[A-Z][a-z]{2,8}", value["title"])
        assert 1 <= len(value["tags"]) <= 3
        assert set(value["tags"]) <= {"sea", "land"}
        assert value["year"] is None or 1500 <= value["year"] <= 2100
        assert ": " not in output.text


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"regex": r"\d{3}/[^/]x"}, r"\d{3}/.x"),
        ({"regex": "^[ab]{2}$"}, "[ab]{2}"),
        ({"choice": ["to \"be\"", "not\\to\nbe", "日本 😀", "\x7f"]}, "to \"be\"|not\\\\to\nbe|日本 😀|\x7f"),
        ({"grammar": '?start: pair ("," pair)~1\npair: /[a-z]/ "=" /[0-9]/'}, "[a-z]=[0-9],[a-z]=[0-9]"),
        ({"grammar": 'root ::= "<" inner ">"\ninner ::= [xyz]+ "!"'}, "<[xyz]+!>"),
        ({"json": json.dumps({"const": {"a": [1, None]}})}, r'\{\s*"a"\s*:\s*\[\s*1\s*,\s*null\s*\]\s*\}'),
    ],
)  # fmt: skip
def test_every_form_is_kept(llm: LLM, fields: dict[str, Any], pattern: str) -> None:
    for output in generated(llm, [form(**fields, temperature=t, max_tokens=300) for t in (0.0, 1.0)]):
        if output.finish_reason == "stop":
            assert re.fullmatch(pattern, output.text, re.DOTALL)
        else:
            assert "json" in fields, "only white space may go on forever"


def test_a_form_that_begins_later(llm: LLM) -> None:
    [output] = generated(llm, [form(choice=["ONE", "TWO"], begins_after=", ", temperature=1.0, max_tokens=300)])
    free, _, bound = output.text.partition(", ")
    assert free
    assert bound.lstrip() in ("ONE", "TWO")


REASONED = re.compile(r"<think>(?P<thoughts>.*?)</think>\s*(?:ONE|TWO)", re.DOTALL)


def test_an_output_reasons_or_answers_at_once(llm: LLM) -> None:
    """With a budget all of them come to their answer; without one, one that reasons may reach its limit."""
    structured = StructuredOutputsParams(choice=["ONE", "TWO"], after_reasoning=True)
    common = {"structured_outputs": structured, "temperature": 1.5, "max_tokens": 40}
    bounded = [SamplingParams(seed=seed, thinking_token_budget=9, **common) for seed in range(40)]
    outputs = generated(llm, bounded)
    reasoned = [output for output in outputs if REASONED.fullmatch(output.text)]
    assert {output.text for output in outputs if output not in reasoned} == {"ONE", "TWO"}
    assert reasoned
    assert all(output.finish_reason == "stop" for output in outputs)
    unbounded = [SamplingParams(seed=seed, **common) for seed in range(40)]
    for output, free in zip(outputs, generated(llm, unbounded), strict=True):
        assert free.token_ids[:13] == output.token_ids[:13]


def test_reasoning_that_the_prompt_has_opened(llm: LLM) -> None:
    def asked(prompt: str, **fields: Any) -> Any:
        params = SamplingParams(seed=4, temperature=1.0, max_tokens=60, **fields)
        return llm.generate(prompt, params, use_tqdm=False)[0].outputs[0]

    form = StructuredOutputsParams(regex="[0-9]{3}", after_reasoning=True)
    bound = asked("Think.<think>\n", structured_outputs=form, thinking_token_budget=5)
    assert re.fullmatch(r".+</think>\s{0,4}[0-9]{3}", bound.text, re.DOTALL)
    assert bound.finish_reason == "stop"
    tag = llm.get_tokenizer().encode("</think>", add_special_tokens=False)
    assert bound.token_ids[5 : 5 + len(tag)] == tag
    free = asked("Think.<think>\n", thinking_token_budget=5)
    assert free.token_ids[5 : 5 + len(tag)] == tag
    assert free.token_ids[:5] == bound.token_ids[:5] == asked("Think.<think>\n").token_ids[:5]
    switched_off = asked("Think.<think>\n\n</think>\n\n", structured_outputs=form, thinking_token_budget=5)
    assert re.fullmatch("[0-9]{3}", switched_off.text)
    endless = asked("Think.<think>\n", thinking_token_budget=5, ignore_eos=True)
    assert (endless.error, endless.token_ids[5 : 5 + len(tag)]) == (None, tag)
    never = asked("Think.", thinking_token_budget=5)
    assert never.token_ids == asked("Think.").token_ids


@pytest.mark.parametrize("min_tokens", [1, 20, 100])
def test_a_complete_form_ends_before_min_tokens(llm: LLM, min_tokens: int) -> None:
    for fields in ({"choice": ["ONE"]}, {"regex": "[a-c]{4}"}, {"json": {"const": 17}}):
        structured = StructuredOutputsParams(**fields)  # type: ignore[arg-type]
        params = SamplingParams(max_tokens=100, min_tokens=min_tokens, seed=2, structured_outputs=structured)
        [output] = generated(llm, [params])
        assert (output.finish_reason, output.error) == ("stop", None)
        assert len(output.token_ids) < 20 or min_tokens == 1
    longer = StructuredOutputsParams(regex="[a-z ]{1,400}")
    [output] = generated(llm, [SamplingParams(max_tokens=100, min_tokens=20, seed=2, structured_outputs=longer)])
    assert len(output.token_ids) >= 20


def test_siblings_have_a_state_each(llm: LLM) -> None:
    params = form(regex="[a-z]{5,9}[0-9]{3}", temperature=1.0, n=4, seed=10)
    texts = [choice.text for choice in llm.generate("It", params, use_tqdm=False)[0].outputs]
    lone = [form(regex="[a-z]{5,9}[0-9]{3}", temperature=1.0, seed=10 + i) for i in range(4)]
    assert texts == [llm.generate("It", params, use_tqdm=False)[0].outputs[0].text for params in lone]
    assert len(set(texts)) == 4


def test_no_token_depends_on_when_its_form_is_ready(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that waits for no form computes rows again and again until theirs are ready."""
    params = [form(json=SCHEMA, seed=seed, max_tokens=40) for seed in range(3)]
    params += [replace(params[0], logprobs=2, prompt_logprobs=1), SamplingParams(max_tokens=40, seed=1, logprobs=2)]
    patient = [(output.token_ids, output.logprobs) for output in generated(llm, params)]
    steps_that_waited = 0
    ready = StepPatience.result_of

    def never_the_first_time(patience: StepPatience, work: Future[Any]) -> Any:
        nonlocal steps_that_waited
        if not getattr(work, "was_asked_for", False):
            work.was_asked_for = True  # type: ignore[attr-defined]
            steps_that_waited += 1
            raise NotReady("structured_outputs")
        return ready(patience, work)

    monkeypatch.setattr(StepPatience, "result_of", never_the_first_time)
    again = generated(llm, params)
    assert [(output.token_ids, output.logprobs) for output in again] == patient
    assert steps_that_waited > 100


def test_a_request_that_runs_into_an_error_ends_alone(llm: LLM) -> None:
    ambiguous = StructuredOutputsParams(grammar="start: (a | b | c | d)+\na: X+\nb: X+\nc: X+\nd: X+\nX: /a/")
    endless = SamplingParams(max_tokens=400, structured_outputs=ambiguous, logit_bias={0: -100, 2: -100})
    healthy = SamplingParams(max_tokens=30, seed=9)
    [expected] = generated(llm, [healthy])
    outputs = llm.generate(["Chapter 0.", "Chapter 0."], [healthy, endless], use_tqdm=False)
    assert outputs[0].outputs[0].token_ids == expected.token_ids
    assert outputs[1].outputs[0].finish_reason == "error"
    assert "structured_outputs: " in (outputs[1].outputs[0].error or "")


@pytest.mark.parametrize(
    ("fields", "parameter", "message"),
    [
        (
            {},
            "structured_outputs",
            "exactly one of json, regex, choice, grammar, json_object, structural_tag, found none",
        ),
        ({"regex": "a", "json_object": True}, "structured_outputs", "found regex and json_object"),
        ({"json_object": False}, "structured_outputs", "found none"),
        ({"json": "{"}, "structured_outputs.json", "is not JSON"),
        ({"json": "[1]"}, "structured_outputs.json", "must be a JSON schema, which is an object, got list"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json", "has no JSON form"),
        ({"json": {"const": {1, 2}}}, "structured_outputs.json", "has no JSON form"),
        ({"regex": ""}, "structured_outputs.regex", "must be a string that is not empty"),
        ({"choice": "ab"}, "structured_outputs.choice", "must be a list of strings"),
        ({"choice": []}, "structured_outputs.choice", "at least one"),
        ({"choice": ["a", ""]}, "structured_outputs.choice", "not empty"),
        ({"grammar": 3}, "structured_outputs.grammar", "must be a string"),
        ({"regex": "a", "disable_any_whitespace": 1}, "structured_outputs.disable_any_whitespace", "True or False"),
        ({"structural_tag": "x"}, "structured_outputs.structural_tag", "is refused: JSON is malformed"),
        (
            {"regex": "a", "after_reasoning": True, "begins_after": "b"},
            "structured_outputs.after_reasoning",
            "give one",
        ),
    ],
)
def test_parameters_are_refused_by_name(fields: dict[str, Any], parameter: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        StructuredOutputsParams(**fields)
    assert refused.value.parameter == parameter


def test_an_unknown_parameter_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"no parameter 'jsn'\. Did you mean 'json'"):
        StructuredOutputsParams(jsn={})
    with pytest.raises(ConfigError, match="structured_outputs must be StructuredOutputsParams, got dict"):
        SamplingParams(structured_outputs={"regex": "a"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="ignore_eos cannot be used with structured_outputs"):
        SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"), ignore_eos=True)


DEEP: dict[str, Any] = {"type": "string"}
for _ in range(300):
    DEEP = {"type": "array", "items": DEEP}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": {"type": "objekt"}}, "structured_outputs.json is refused: .*objekt"),
        ({"json": {"not": {"pattern": "a"}}}, "structured_outputs.json is refused: .*not"),
        ({"json": {"$ref": "https://example.com/schema"}}, "structured_outputs.json is refused: "),
        ({"json": DEEP}, "structured_outputs.json is refused: recursion limit"),
        ({"json": {"enum": ["x" * 200 + str(i) for i in range(1000)]}}, "structured_outputs.json may have at most"),
        ({"json": {"x-guidance": 5}, "disable_any_whitespace": True}, "structured_outputs.json is refused: "),
        ({"regex": "a(?=b)"}, "structured_outputs.regex is refused: .*look-around"),
        ({"regex": "(" * 5000}, "structured_outputs.regex is refused: "),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar is refused: .*nothing"),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar is refused: "),
        ({"grammar": "start: <|nobody|>"}, "structured_outputs.grammar is refused: .*unknown special token"),
        ({"choice": ["a" * 200_000]}, "structured_outputs.choice may have at most 131072 bytes, found "),
    ],
)
def test_a_bad_form_is_refused_before_anything_runs(llm: LLM, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as refused:
        llm.generate("Chapter 1.", form(**fields), use_tqdm=False)
    assert re.search(message, str(refused.value), re.DOTALL)
    assert refused.value.parameter == message.split()[0]


def test_without_the_library_the_error_says_what_to_install(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=re.escape("pip install llguidance")):
        llm.generate("Chapter 1.", form(regex="a"), use_tqdm=False)
    assert llm.generate("Chapter 1.", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_the_fingerprint_names_the_library(llm: LLM) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", llm.fingerprint_parts["llguidance"])
