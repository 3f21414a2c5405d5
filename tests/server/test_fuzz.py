"""Bodies that nobody foresaw: never a 5xx, the server lives on, and its answers stay the same."""

from __future__ import annotations

import json
from typing import Any

import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from server_process import ServerProcess

from sempre.engine.server.agents.messages_requests import CountTokensRequest, MessagesRequest
from sempre.engine.server.agents.responses_requests import ResponsesRequest
from sempre.engine.server.neutral import NEUTRAL
from sempre.engine.server.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

ENDPOINTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "It is", "max_tokens": 2, "n": 1}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
    "/v1/responses": (ResponsesRequest, {"input": "Hi", "max_output_tokens": 2}),
    "/v1/messages": (MessagesRequest, {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}),
    "/v1/messages/count_tokens": (CountTokensRequest, {"messages": [{"role": "user", "content": "Hi"}]}),
    "/tokenize": (TokenizeRequest, {"prompt": "It is"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
# in range or just outside of it, for fields of every type
likely = st.sampled_from([None, True, False, 0, 1, -1, 2, 0.5, 20, 21, 2**31, 2**64, "", "a", "é\x00", [], [1], ["a"]])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_any_field_may_hold_anything(server: ServerProcess, path: str) -> None:
    model, base = ENDPOINTS[path]
    names = [*model.__struct_encode_fields__, *NEUTRAL[model], "unheard_of"]

    @FUZZ
    @given(st.dictionaries(st.sampled_from(names), json_values | likely, min_size=1, max_size=3))
    def check(fields: dict[str, Any]) -> None:
        body = json.dumps({**base, **fields}).encode()
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (200, 400, 404), (fields, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    check()
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("path", [*ENDPOINTS, "/health", "/metrics", "/nowhere"])
def test_any_bytes(server: ServerProcess, path: str) -> None:
    @FUZZ
    @given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
    def check(body: bytes) -> None:
        answer = server.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, answer.text

    check()
    assert server.http.get("/health").status_code == 200


def test_the_description_is_kept(server: ServerProcess) -> None:
    """Schemathesis makes requests from /openapi.json, good and bad ones; none is answered with a 5xx."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        seen.add(operation.path)

        # a failing case is shown as it was found: making it smaller takes minutes
        @settings(FUZZ, max_examples=10, phases=[Phase.generate])
        @given(case=operation.as_strategy())
        def check(case: Any) -> None:
            for name in ("max_tokens", "max_output_tokens"):
                if isinstance(case.body, dict) and isinstance(case.body.get(name), int):
                    case.body[name] = min(case.body[name], 4)
            answer = case.call()
            assert answer.status_code < 500, answer.text
            assert answer.status_code in (200, 400, 404, 415), (answer.status_code, answer.text)

        check()
    assert set(ENDPOINTS) <= seen
    assert server.http.get("/health").status_code == 200


def test_memory_is_flat_and_neighbours_unharmed(server: ServerProcess) -> None:
    """Refused requests leave nothing behind, and a good one among them answers as it does alone."""
    good: dict[str, Any] = {"prompt": "It is a truth", "max_tokens": 8, "seed": 5, "logprobs": 1}
    expected = server.complete(**good).json()["choices"]
    process = psutil.Process(server.process.pid)
    bad = json.dumps({"prompt": "x" * 20_000, "logit_bias": {"5": "a"}, "nested": [[["deep"]]]}).encode()

    def refuse(times: int) -> None:
        for _ in range(times):
            answer = server.http.post("/v1/completions", content=bad, headers={"Content-Type": "application/json"})
            assert answer.status_code == 400

    refuse(200)
    before = process.memory_info().rss
    refuse(1000)
    assert process.memory_info().rss - before < 10 * 2**20
    assert server.complete(**good).json()["choices"] == expected
