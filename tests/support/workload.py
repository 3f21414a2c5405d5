"""One set of requests under every kind of sampling, and how to run it; for tests and the processes they start."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness import Generation, compare_generations, generate, make_request
from sempre.ipc.messages import PromptCandidates, ReasoningSpec, RequestSpec

SETTINGS: dict[str, Any] = {"model": "tiny", "max_model_len": 512, "num_threads": 1}
KV_BLOCK_BYTES = 2 * 6 * 2 * 64 * 16 * 2  # k and v, 6 layers, 2 heads, 64 dimensions, 16 tokens, bfloat16
FP8_KV_BLOCK_BYTES = 2 * 6 * 2 * (64 + 4) * 16  # the same in fp8, with a float32 scale for each key and value

_JSON_GRAMMAR = """{"grammars": [{"json_schema": {"type": "object", "x-guidance": {"whitespace_flexible": false},
 "properties": {"name": {"type": "string"}, "sizes": {"type": "array", "items": {"type": "integer"}}},
 "required": ["name", "sizes"]}}]}"""
_REASONED_GRAMMAR = r"""{"grammars": [
 {"lark_grammar": "start: opened /[ ]{0,2}/ @body\nopened[lazy]: /(?s:.*)<\\/think>/"},
 {"name": "body", "lark_grammar": "start: /[a-z]{3,40}/"}]}"""
_LIST_GRAMMAR = """{"grammars": [{"lark_grammar": "start: (WORD \\"; \\")* \\"end\\"\\nWORD: /[a-z]+/"}]}"""


def _prompt(start: int, length: int) -> list[int]:
    return [3 + (start * 7919 + j * 104729) % 4000 for j in range(length)]


def _reasoning() -> ReasoningSpec:
    """Reasoning of six tokens, opened by the prompt."""
    tag = [30, 17, 400, 684, 32]
    return ReasoningSpec(start="<think>", end="</think>", end_token_ids=tag, begins_inside=True, budget=6)


def _candidates(num_prompt_tokens: int, start: int, width: int) -> dict[str, PromptCandidates]:
    """Ids to score for each token of the prompt after the first `start` + 1; some are none."""
    count = (num_prompt_tokens - 1 - start) * width
    token_ids = [-1 if i % 11 == 5 else (i * 7919) % 4000 for i in range(count)]
    packed = struct.pack(f"<{count}i", *token_ids)
    return {"prompt_candidates": PromptCandidates(start=start, width=width, token_ids=packed)}


def make_requests() -> list[RequestSpec]:
    """Prompts of 1 to 300 tokens, some with a common beginning, under every kind of sampling."""
    shared = _prompt(1, 80)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (_prompt(2, 1), {"temperature": 0.0}),
        (_prompt(3, 5), {"temperature": 1.0}),
        (_prompt(4, 17), {"temperature": 0.7, "top_p": 0.9}),
        (_prompt(5, 64), {"temperature": 1.3, "top_k": 40}),
        (_prompt(6, 65), {"temperature": 1.0, "min_p": 0.05, "prompt_logprobs": 3} | _candidates(65, 20, width=2)),
        (
            _prompt(7, 130),
            {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.4} | _candidates(130, 50, width=3),
        ),
        (_prompt(8, 300), {"temperature": 1.0, "presence_penalty": 0.7, "top_k": 100, "top_p": 0.95}),
        (shared + _prompt(9, 3), {"temperature": 0.0, "prompt_logprobs": 0}),
        (shared + _prompt(10, 20), {"temperature": 1.0}),
        (shared + _prompt(11, 40), {"temperature": 1.0, "logit_bias": {17: 2.5, 99: -3.0}, "min_tokens": 5}),
        (shared, {"temperature": 0.8, "bad_words_token_ids": [[11], [12, 13]]}),
        (_prompt(12, 200), {"temperature": 1.0, "allowed_token_ids": list(range(100, 900))}),
        (shared + _prompt(13, 7), {"temperature": 1.0, "grammar": _JSON_GRAMMAR, "eos_token_ids": [0, 2]}),
        (_prompt(14, 90), {"temperature": 0.9, "top_p": 0.9, "grammar": _LIST_GRAMMAR, "eos_token_ids": [0, 2]}),
        (_prompt(15, 60), {"temperature": 1.0, "reasoning": _reasoning(), "eos_token_ids": [0, 2]}),
        (
            shared + _prompt(16, 3),
            {"grammar": _REASONED_GRAMMAR, "reasoning": _reasoning(), "min_tokens": 20, "eos_token_ids": [0, 2]},
        ),
    ]
    return [
        make_request(prompt, seed=1000 + i, ordinal=i, max_tokens=24, **({"logprobs": 4} | sampling))
        for i, (prompt, sampling) in enumerate(kinds)
    ]


def launch_inproc(**settings: Any) -> InprocClient:
    return InprocClient.launch(engine_config(**(SETTINGS | {"multiprocessing": False} | settings)))


def run_inproc(requests: Sequence[RequestSpec], **settings: Any) -> list[Generation]:
    """All requests at once, in an engine of this process."""
    client = launch_inproc(**settings)
    try:
        return generate(client, requests)
    finally:
        client.close()


@cache
def run_alone(numerics: str, profile: str = "single") -> tuple[Generation, ...]:
    """Every request by itself, one after the other, without a prefix cache."""
    client = launch_inproc(enable_prefix_caching=False, numerics=numerics, numerics_profile=profile)
    try:
        return tuple(generate(client, [request])[0] for request in make_requests())
    finally:
        client.close()


def check_alone(run: Sequence[Generation], profile: str = "single") -> None:
    """Fail unless a run of all requests has the bits of `run_alone`."""
    comparison = compare_generations(run_alone("invariant", profile), run)
    assert comparison.equal, comparison.first_difference
