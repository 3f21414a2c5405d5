"""Requests with a grammar beside others on a GPU: valid, the same bits alone and together, with graphs and without."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from sempre.engine import LLM, SamplingParams, StructuredOutputsParams

pytestmark = pytest.mark.gpu

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
}
PROMPTS = [f"Chapter {i}. It was" for i in range(16)]
SETTINGS: dict[str, Any] = {"device": "cuda", "max_model_len": 512}


def make_params() -> list[SamplingParams]:
    """Every third request is free."""
    forms = [
        StructuredOutputsParams(json=PERSON, disable_any_whitespace=True),
        StructuredOutputsParams(regex="[a-z]{5,20}-[0-9]{3}"),
        None,
    ]
    return [
        SamplingParams(max_tokens=40, seed=i, temperature=(i % 2) * 1.0, logprobs=2, structured_outputs=forms[i % 3])
        for i in range(len(PROMPTS))
    ]


def run(llm: LLM, *, together: bool) -> list[Any]:
    params = make_params()
    if together:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    else:
        outputs = [llm.generate(p, q, use_tqdm=False)[0] for p, q in zip(PROMPTS, params, strict=True)]
    return [output.outputs[0] for output in outputs]


def bits(choices: list[Any]) -> list[Any]:
    return [(choice.token_ids, choice.logprobs, choice.finish_reason) for choice in choices]


def test_forms_are_kept_and_bits_equal() -> None:
    with LLM("tiny", **SETTINGS, multiprocessing=False) as llm:
        alone = run(llm, together=False)
        together = run(llm, together=True)
        other = llm.generate(PROMPTS[1], SamplingParams(max_tokens=40, seed=99, logprobs=2), use_tqdm=False)[0].outputs
    for index, choice in enumerate(together):
        assert choice.error is None
        if choice.finish_reason == "stop" and index % 3 == 0:
            assert set(json.loads(choice.text)) == {"name", "sizes"}
        if index % 3 == 1:
            assert re.fullmatch("[a-z]{5,20}-[0-9]{3}", choice.text)
    assert bits(together) == bits(alone)
    assert bits(other) != bits(alone[1:2]), "the control gave equal bits"
    small = {"enforce_eager": True, "max_num_seqs": 5, "max_num_batched_tokens": 64}
    with LLM("tiny", **SETTINGS, **small, multiprocessing=False) as llm:
        assert bits(run(llm, together=True)) == bits(alone)


def test_in_processes_of_their_own() -> None:
    with LLM("tiny", **SETTINGS, multiprocessing=False) as llm:
        expected = run(llm, together=True)
    with LLM("tiny", **SETTINGS) as llm:
        assert bits(run(llm, together=True)) == bits(expected)
