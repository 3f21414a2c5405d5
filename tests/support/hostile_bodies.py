"""Bodies that ask for more work, or more memory, than their sender should be given. Each takes a port and sends one.

python tests/support/canary.py --bodies ["prompt of objects, 1 MB" …]     measures them, or those named
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_PATIENCE_S = 120.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWERS: dict[str, tuple[int, str]] = {}
"""Name of an attack → status and beginning of the last answer to it."""


def post(port: int, path: str, body: bytes, key: str = "") -> tuple[int, str]:
    """Send a body whole, read the answer whole; return its status and beginning, 0 where the server closed before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    with suppress(ConnectionError):
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            told = answer.status, answer.read(300).decode(errors="replace")
            while answer.read(1 << 16):
                pass
            return told
        finally:
            connection.close()
    return 0, ""


def encoded(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def completion(**fields: Any) -> bytes:
    return encoded(**{"prompt": "a", "max_tokens": 1, **fields})


def form(**fields: Any) -> bytes:
    return completion(structured_outputs=fields)


def chat(**fields: Any) -> bytes:
    return encoded(**{"messages": [MESSAGE], "max_tokens": 1, **fields})


def tools(count: int, parameters: Any = None) -> list[dict[str, Any]]:
    function = {"description": "x", "parameters": parameters}
    return [{"type": "function", "function": {"name": f"f{i}", **function}} for i in range(count)]


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def within(field: str, value: bytes) -> bytes:
    return b'{"prompt":"a","max_tokens":1,"' + field.encode() + b'":' + value + b"}"


def properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


def called(arguments: str) -> dict[str, Any]:
    calls = [{"id": "a", "function": {"name": "f", "arguments": arguments}}]
    return {"role": "assistant", "tool_calls": calls}


MESSAGE = {"role": "user", "content": "Hi"}
TEXT = "It is a truth "
BODIES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "prompt of objects, 1 MB": (COMPLETIONS, lambda: completion(prompt=[{}] * 250_000)),
    "prompt of objects, 4 MB": (COMPLETIONS, lambda: completion(prompt=[{}] * 1_000_000)),
    "prompt of objects, as many as pass": (COMPLETIONS, lambda: completion(prompt=[{}] * 49_000)),
    "500,000 empty messages": (CHAT, lambda: chat(messages=[{}] * 500_000)),
    "49,000 empty messages": (CHAT, lambda: chat(messages=[{}] * 49_000)),
    "16,000 messages": (CHAT, lambda: chat(messages=[MESSAGE] * 16_000)),
    "messages of many parts": (
        CHAT, lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 40_000}])
    ),
    "a message of 7 MB": (CHAT, lambda: chat(messages=[{"role": "user", "content": TEXT * 500_000}])),
    "128 bad words of 60 KB": (COMPLETIONS, lambda: completion(bad_words=["x" * 60_000] * 128)),
    "a bad word of 7 MB": (COMPLETIONS, lambda: completion(bad_words=["x" * 7_000_000])),
    "logit_bias of 10⁶ keys": (COMPLETIONS, lambda: completion(logit_bias={str(i): 1 for i in range(10**6)})),
    "logit_bias of 90,000 keys": (COMPLETIONS, lambda: completion(logit_bias={str(i): 1 for i in range(90_000)})),
    "detokenize 10⁶ ids": ("/detokenize", lambda: encoded(tokens=[5] * 10**6)),
    "detokenize 4·10⁶ ids": ("/detokenize", lambda: b'{"tokens":[' + b"5," * (4 * 10**6 - 20) + b"5]}"),
    "detokenize 130,000 ids": ("/detokenize", lambda: encoded(tokens=[300] * 130_000)),
    "tokenize 7 MB": ("/tokenize", lambda: encoded(prompt=TEXT * 500_000)),
    "tokenize one word of 130 KB": ("/tokenize", lambda: encoded(prompt="x" * 130_000, return_token_strs=True)),
    "1,024 prompts of 4 KB": (COMPLETIONS, lambda: completion(prompt=[TEXT * 280] * 1024)),
    "a prompt of 7.9 MB": (COMPLETIONS, lambda: completion(prompt=TEXT * 560_000)),
    "a prompt of 130 KB without spaces": (COMPLETIONS, lambda: completion(prompt="x" * 130_000)),
    "10⁶ token ids": (COMPLETIONS, lambda: completion(prompt=[5] * 10**6)),
    "240,000 token ids": (COMPLETIONS, lambda: completion(prompt=[5] * 240_000)),
    "n = 128 with 9 prompts": (COMPLETIONS, lambda: completion(prompt=["a"] * 9, n=128)),
    "n = 128 with 6 prompts": (COMPLETIONS, lambda: completion(prompt=["a"] * 6, n=128)),
    "800 prompts": (COMPLETIONS, lambda: completion(prompt=[TEXT * 10] * 800)),
    "1,024 stop strings": (COMPLETIONS, lambda: completion(stop=["x" * 1000] * 1024)),
    "a stop string of 7 MB": (COMPLETIONS, lambda: completion(stop="x" * 7_000_000)),
    "10⁵ allowed ids": (COMPLETIONS, lambda: completion(allowed_token_ids=[5] * 10**5)),
    "10⁵ stop ids": (COMPLETIONS, lambda: completion(stop_token_ids=[5] * 10**5)),
    "nesting of 200,000": (COMPLETIONS, lambda: within("logit_bias", nested(200_000))),
    "nesting of 900": (COMPLETIONS, lambda: within("response_format", nested(900))),
    "lists of 4·10⁶ levels": (COMPLETIONS, lambda: within("prompt", b"[" * 4_000_000)),
    "a number of 7 MB": (COMPLETIONS, lambda: within("seed", b"1" * 7_000_000)),
    "numbers of 4,000 digits": (COMPLETIONS, lambda: within("stop_token_ids", b"[" + b"1" * 4000 + b"]")),
    "a string of escapes, 7 MB": (COMPLETIONS, lambda: within("user", b'"' + b"\\u00e9" * 1_100_000 + b'"')),
    "a string of quotes, 7 MB": (COMPLETIONS, lambda: within("user", b'"' + b'\\"' * 3_500_000 + b'"')),
    "duplicate keys": (COMPLETIONS, lambda: b'{"prompt":"a",' + b'"n":1,' * 90_000 + b'"n":1}'),
    "90,000 unknown keys": (COMPLETIONS, lambda: encoded(**{f"key{i}": i for i in range(90_000)})),
    "90,000 unknown nulls": (COMPLETIONS, lambda: completion(**{f"key{i}": None for i in range(90_000)})),
    "a key of 7 MB": (COMPLETIONS, lambda: completion(**{"k" * 7_000_000: 1})),
    "a model of 7 MB": (COMPLETIONS, lambda: completion(model="m" * 7_000_000)),
    "a salt of 7 MB": (COMPLETIONS, lambda: completion(cache_salt="s" * 7_000_000)),
    "10⁶ tools": (CHAT, lambda: b'{"messages":[{"role":"user","content":"a"}],"tools":[' + b"{}," * 10**6 + b"{}]}"),
    "128 tools of 60 KB": (CHAT, lambda: chat(tools=tools(128, {"description": "x" * 60_000}), tool_choice="required")),
    "128 tools of 300 properties": (
        CHAT, lambda: chat(tools=tools(128, {"properties": {f"p{i}": {} for i in range(300)}}), tool_choice="required")
    ),
    "a schema of 4,000 properties": (COMPLETIONS, lambda: form(json=properties(4000))),
    "a schema of 7 MB": (COMPLETIONS, lambda: form(json={"title": "x" * 7_000_000})),
    "a regular expression of 7 MB": (COMPLETIONS, lambda: form(regex="(a|b)" * 1_400_000)),
    "a regular expression of 100 KB": (
        COMPLETIONS,
        lambda: form(regex="|".join(f"x{i}[a-z]{{1,9}}" for i in range(6000))),
    ),
    "a grammar of nested repeats": (COMPLETIONS, lambda: form(regex="((a{1,99}){1,99}){1,99}")),
    "50,000 choices": (COMPLETIONS, lambda: form(choice=[f"c{i}" for i in range(50_000)])),
    "template variables of 7 MB": (CHAT, lambda: chat(chat_template_kwargs={"x": "y" * 7_000_000})),
    "90,000 template variables": (CHAT, lambda: chat(chat_template_kwargs={f"x{i}": i for i in range(90_000)})),
    "documents": (CHAT, lambda: chat(documents=[{"text": "x"}] * 40_000)),
    "template: a wide number": (CHAT, lambda: chat(chat_template="{{ '%1000000000d' % 1 }}")),
    "template: nested loops": (
        CHAT,
        lambda: chat(chat_template="{% for a in range(9999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"),
    ),
    "template: a long string": (CHAT, lambda: chat(chat_template="{{ 'x' * 999999999 }}")),
    "template: a huge power": (CHAT, lambda: chat(chat_template="{{ 9 ** 9 ** 9 }}")),
    "template: recursion": (CHAT, lambda: chat(chat_template="{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}")),
    "template: doubled strings": (
        CHAT,
        lambda: chat(chat_template="{% set n = namespace(s='x') %}{% for a in range(99) %}"
                     "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"),
    ),
    "template of 7 MB": (CHAT, lambda: chat(chat_template="{{ 1 }}" * 1_000_000)),
    "template of 60 KB": (CHAT, lambda: chat(chat_template="{{ 1 }}" * 8_500)),
    "49,000 empty prompts": (COMPLETIONS, lambda: completion(prompt=[[]] * 49_000)),
    "1,000 prompts of 240 ids": (COMPLETIONS, lambda: completion(prompt=[[5] * 240] * 1000)),
    "ids and a text at last": (COMPLETIONS, lambda: completion(prompt=[5] * 240_000 + ["a"])),
    "60 prompts of 128 KB without spaces": (COMPLETIONS, lambda: completion(prompt=["x" * 128_000] * 60)),
    "60 cut prompts of 128 KB": (
        COMPLETIONS, lambda: completion(prompt=["a b" * 42_000] * 60, truncate_prompt_tokens=5)
    ),
    "a prompt of digits": (COMPLETIONS, lambda: completion(prompt="7" * 130_000, truncate_prompt_tokens=5)),
    "a prompt of white space": (COMPLETIONS, lambda: completion(prompt=" \n\t" * 43_000, truncate_prompt_tokens=5)),
    "a prompt of emoji": (COMPLETIONS, lambda: completion(prompt="👩‍👩‍👧‍👦" * 18_000, truncate_prompt_tokens=5)),
    "a prompt of surrogates": (COMPLETIONS, lambda: within("prompt", b'"' + b"\\ud800" * 20_000 + b'"')),
    "a short prompt without spaces": (COMPLETIONS, lambda: completion(prompt="x" * 8000, truncate_prompt_tokens=5)),
    "30 prompts of 200 tokens": (COMPLETIONS, lambda: completion(prompt=[[5 + i] * 200 for i in range(30)])),
    "128 long answers": (COMPLETIONS, lambda: completion(n=128, max_tokens=60, ignore_eos=True)),
    "log-probabilities of prompts": (
        COMPLETIONS, lambda: completion(prompt=[[5 + i] * 300 for i in range(20)], prompt_logprobs=20)
    ),
    "echoed log-probabilities": (
        COMPLETIONS, lambda: completion(prompt=[[5 + i] * 300 for i in range(20)], echo=True, logprobs=20)
    ),
    "log-probabilities of answers": (
        COMPLETIONS, lambda: completion(n=64, max_tokens=60, ignore_eos=True, logprobs=20)
    ),
    "log-probabilities of many prompts": (
        COMPLETIONS, lambda: completion(prompt=[[5 + i] * 1900 for i in range(100)], prompt_logprobs=20)
    ),
    "8 long prompts": (COMPLETIONS, lambda: completion(prompt=[list(range(5 + i, 1905 + i)) for i in range(8)])),
    "a long prompt, scored": (COMPLETIONS, lambda: completion(prompt=list(range(5, 1905)), prompt_logprobs=20)),
    "log-probabilities of a stream": (
        COMPLETIONS, lambda: completion(n=64, max_tokens=60, ignore_eos=True, logprobs=20, stream=True)
    ),
    "log-probabilities of a chat": (
        CHAT, lambda: chat(n=32, max_tokens=60, ignore_eos=True, logprobs=True, top_logprobs=20)
    ),
    "10⁵ allowed ids for 128 answers": (COMPLETIONS, lambda: completion(allowed_token_ids=[5] * 10**5, n=128)),
    "all allowed ids for 128 answers": (
        COMPLETIONS, lambda: completion(allowed_token_ids=list(range(500)), n=128, max_tokens=20, ignore_eos=True)
    ),
    "4,000 biases for 128 answers": (
        COMPLETIONS, lambda: completion(logit_bias={str(i): 1 for i in range(400)}, n=128, max_tokens=20)
    ),
    "128 bad words for 128 answers": (
        COMPLETIONS,
        lambda: completion(bad_words=[f"w{i} " + "x" * 50 for i in range(128)], n=128, max_tokens=20, ignore_eos=True),
    ),
    "64 stop strings for 128 answers": (
        COMPLETIONS, lambda: completion(stop=["x" * 250] * 64, n=128, max_tokens=20, ignore_eos=True)
    ),
    "10⁵ ids to report": (COMPLETIONS, lambda: completion(logprob_token_ids=[5] * 10**5)),
    "a float of 7 MB": (COMPLETIONS, lambda: within("temperature", b"0." + b"1" * 7_000_000)),
    "an exponent of 7 MB": (COMPLETIONS, lambda: within("temperature", b"1e" + b"9" * 7_000_000)),
    "metadata of 49,000 keys": (COMPLETIONS, lambda: completion(metadata={f"k{i}": [] for i in range(49_000)})),
    "white space of 8 MB": (COMPLETIONS, lambda: b" " * 8_000_000 + completion()),
    "no JSON, 8 MB": (COMPLETIONS, lambda: b"x" * 8_000_000),
    "a wide string of 8 MB": (COMPLETIONS, lambda: within("user", b'"' + b"a" * 7_900_000 + "😀".encode() + b'"')),
    "wide escapes, 8 MB": (COMPLETIONS, lambda: within("user", b'"' + b"\\ud83d\\ude00" * 660_000 + b'"')),
    "300,000 values": (COMPLETIONS, lambda: completion(metadata={"k": list(range(299_000))})),
    "49,000 objects": (COMPLETIONS, lambda: completion(metadata={"k": [{}] * 48_000})),
    "a stream option of 49,000 keys": (
        COMPLETIONS, lambda: completion(stream=True, stream_options={f"k{i}": None for i in range(49_000)})
    ),
    "calls of 8,000 messages": (
        CHAT,
        lambda: chat(messages=[called('{"a":[1]}')] * 8000),
    ),
    "arguments of 7 MB": (
        CHAT,
        lambda: chat(messages=[MESSAGE, called("[" + "1," * 3_000_000 + "1]")]),
    ),
    "nested arguments": (
        CHAT,
        lambda: chat(messages=[called("[" * 100_000)]),
    ),
    "tokenize 130 KB as pieces": ("/tokenize", lambda: encoded(prompt=TEXT * 9000, return_token_strs=True)),
    "tokenize 16,000 messages": ("/tokenize", lambda: encoded(messages=[MESSAGE] * 16_000)),
    "detokenize broken characters": ("/detokenize", lambda: encoded(tokens=[200 + i % 50 for i in range(130_000)])),
    "invocations: 49,000 objects": ("/invocations", lambda: completion(metadata={"k": [{}] * 48_000})),
    "invocations: a message of 7 MB": (
        "/invocations", lambda: chat(messages=[{"role": "user", "content": TEXT * 500_000}])
    ),
    "messages: 24,000 blocks": (
        "/v1/messages",
        lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 24_000}]),
    ),
    "messages: 8,000 turns of calls": (
        "/v1/messages",
        lambda: chat(messages=[
            {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "name": "f", "input": {"a": [1]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "b"}]},
        ] * 8000),
    ),
    "messages: a text of 7 MB": (
        "/v1/messages", lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": TEXT * 500_000}]}])
    ),
    "messages: 128 tools": (
        "/v1/messages",
        lambda: chat(tools=[{"name": f"f{i}", "input_schema": properties(300)} for i in range(128)]),
    ),
    "responses: 16,000 items": (
        "/v1/responses", lambda: encoded(input=[MESSAGE] * 16_000, max_output_tokens=1)
    ),
    "responses: 40,000 items": (
        "/v1/responses", lambda: encoded(input=[MESSAGE] * 40_000, max_output_tokens=1)
    ),
    "responses: reasoning of 7 MB": (
        "/v1/responses",
        lambda: encoded(
            input=[{"type": "reasoning", "summary": [], "encrypted_content": "AAAA" * 1_700_000}], max_output_tokens=1
        ),
    ),
    "responses: 128 tools": (
        "/v1/responses",
        lambda: encoded(
            input="a",
            max_output_tokens=1,
            tools=[{"type": "function", "name": f"f{i}", "parameters": properties(300)} for i in range(128)],
        ),
    ),
    "responses: 8,000 calls": (
        "/v1/responses",
        lambda: encoded(
            input=[
                {"type": "function_call", "call_id": "x", "name": "f", "arguments": '{"a":[1]}'},
                {"type": "function_call_output", "call_id": "x", "output": "b"},
            ]
            * 8000,
            max_output_tokens=1,
        ),
    ),
    "count_tokens: 24,000 blocks": (
        "/v1/messages/count_tokens",
        lambda: encoded(messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 24_000}]),
    ),
    "count_tokens: a text of 7 MB": (
        "/v1/messages/count_tokens", lambda: encoded(messages=[{"role": "user", "content": TEXT * 500_000}])
    ),
    "count_tokens: a system text of 130 KB": (
        "/v1/messages/count_tokens", lambda: encoded(messages=[MESSAGE], system="x" * 130_000)
    ),
    "count_tokens: 128 tools": (
        "/v1/messages/count_tokens",
        lambda: encoded(
            messages=[MESSAGE], tools=[{"name": f"f{i}", "input_schema": properties(300)} for i in range(128)]
        ),
    ),
    "embeddings: 49,000 inputs": ("/v1/embeddings", lambda: encoded(input=["a"] * 49_000)),
    "embeddings: 2,048 inputs of 3 KB": ("/v1/embeddings", lambda: encoded(input=[TEXT * 200] * 2048)),
    "embeddings: 10⁶ ids": ("/v1/embeddings", lambda: encoded(input=[5] * 10**6)),
    "rerank: 40,000 documents": ("/rerank", lambda: encoded(query="a", documents=["b"] * 40_000)),
    "score: a query of 7 MB": ("/score", lambda: encoded(text_1=TEXT * 500_000, text_2=["b"] * 100)),
    "a body for an endpoint without": ("/health", lambda: b"x" * 8_000_000),
    "a schema of 100 properties": (COMPLETIONS, lambda: form(json=properties(100))),
    "a schema of 1,000 properties": (COMPLETIONS, lambda: form(json=properties(1000))),
    "a schema of 1,000 properties for 128 answers": (
        COMPLETIONS, lambda: completion(structured_outputs={"json": properties(1000)}, n=128, max_tokens=5)
    ),
    "a schema of doubled references": (
        COMPLETIONS,
        lambda: form(
            json={
                "$ref": "#/$defs/a0",
                "$defs": {
                    f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} if i < 40 else {} for i in range(41)
                },
            }
        ),
    ),
    "a schema of nested choices": (
        COMPLETIONS,
        lambda: form(
            json={
                "$ref": "#/$defs/a0",
                "$defs": {
                    f"a{i}": {
                        "anyOf": [
                            {"type": "object", "properties": {name: {"$ref": f"#/$defs/a{i + 1}"}}} for name in "abcdef"
                        ]
                    }
                    if i < 30
                    else {}
                    for i in range(31)
                },
            }
        ),
    ),
    "a schema of many cases": (
        COMPLETIONS, lambda: form(json={"oneOf": [{"properties": {f"p{i}": {"minimum": i}}} for i in range(2000)]})
    ),
    "a schema that recurs": (
        COMPLETIONS, lambda: form(json={"anyOf": [{"type": "array", "items": {"$ref": "#"}}] * 500})
    ),
    "a schema of 20,000 names": (
        COMPLETIONS, lambda: form(json={"enum": [f"value {i}" for i in range(15_000)]})
    ),
    "a schema of required names": (
        COMPLETIONS, lambda: form(json={"type": "object", "required": [f"name {i}" for i in range(9000)]})
    ),
    "a schema of huge bounds": (
        COMPLETIONS,
        lambda: form(json={"type": "array", "minItems": 10**9, "items": {"type": "string", "minLength": 10**9}}),
    ),
    "a schema of huge numbers": (
        COMPLETIONS,
        lambda: form(json={"type": "number", "minimum": -1.7e308, "maximum": 1.7e308, "multipleOf": 1.1e-300}),
    ),
    "a schema of patterns": (
        COMPLETIONS,
        lambda: form(
            json={
                "type": "object",
                "properties": {f"p{i}": {"type": "string", "pattern": "^(a?){50}b.*c.{99}d$"} for i in range(300)},
            }
        ),
    ),
    "a schema of pattern properties": (
        COMPLETIONS,
        lambda: form(
            json={"type": "object", "patternProperties": {f"^a{{0,99}}b{i}.*c": {"type": "null"} for i in range(500)}}
        ),
    ),
    "an expression of many states": (
        COMPLETIONS, lambda: completion(structured_outputs={"regex": "(a|b|.)*a(a|b|.){30}"}, max_tokens=20)
    ),
    "an expression of options": (COMPLETIONS, lambda: form(regex="(a?){2000}a{2000}")),
    "an expression of classes": (COMPLETIONS, lambda: form(regex=r"(\p{L}|\w|[^\x00]){1,5000}\p{Lu}{5000}")),
    "an expression of stars": (COMPLETIONS, lambda: form(regex="(" + ".*a" * 300 + ")*")),
    "a grammar of many ways": (
        COMPLETIONS, lambda: form(grammar='start: s\ns: s s s | s s | "a" | "b" | ' + '/[a-z ]+/ ' * 20)
    ),
    "a grammar of 128 KB": (
        COMPLETIONS,
        lambda: form(grammar="start: " + " | ".join(f"r{i}" for i in range(3000)) + "\n"
                     + "\n".join(f'r{i}: "x{i}" r{(i * 7) % 3000}' for i in range(3000))),
    ),
    "a grammar of repeats": (COMPLETIONS, lambda: form(grammar="start: a{1,9999}\na: b{1,9999}\nb: /x/{1,9999}")),
    "a form of white space": (
        COMPLETIONS, lambda: form(json={"type": "object"}, whitespace_pattern="( |\\n){0,9999}")
    ),
    "a form that begins after 7 MB": (COMPLETIONS, lambda: form(regex="a", begins_after="x" * 7_000_000)),
    "template: centred": (CHAT, lambda: chat(chat_template="{{ 'x'.center(10 ** 10) ~ 'x' | center(10 ** 9) }}")),
    "template: a format": (CHAT, lambda: chat(chat_template="{{ '{:>999999999}'.format(1) }}")),
    "template: a long list": (CHAT, lambda: chat(chat_template="{{ ([1] * 10 ** 9) | length }}")),
    "template: indented": (CHAT, lambda: chat(chat_template="{{ range(10 ** 5) | list | tojson(indent=9999) }}")),
    "template: prints 60 MB": (
        CHAT, lambda: chat(chat_template="{% for a in range(60) %}{{ 'x' * 1000000 }}{% endfor %}")
    ),
}  # fmt: skip


def attack(name: str, key: str = "", times: int = 3) -> Callable[[int], int]:
    """Return a function that sends the body that many times in sequence, and returns its size."""
    path, make = BODIES[name]

    def send(port: int) -> int:
        body = make()
        for _ in range(times):
            ANSWERS[name] = post(port, path, body, key)
        return len(body)

    return send


def attacks(key: str = "") -> dict[str, Callable[[int], int]]:
    """Return a function that sends each of the bodies."""
    return {name: attack(name, key) for name in BODIES}
