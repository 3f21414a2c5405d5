"""Bodies that ask for more work, or more memory, than their sender should be given. Each takes a port and sends one.

python tests/support/canary.py prompt_of_objects …     measures them by name
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_PATIENCE_S = 60.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ANSWERS: dict[str, tuple[int, str]] = {}
"""Name of an attack → status and beginning of the last answer to it."""


def post(port: int, path: str, body: bytes) -> tuple[int, str]:
    """Send a body whole; return the status and the answer's beginning, 0 where the server closed before."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    with suppress(ConnectionError):
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read(300).decode(errors="replace")
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


MESSAGE = {"role": "user", "content": "Hi"}
TEXT = "It is a truth "
PROPERTIES = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(4000)}}
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
    "a schema of 4,000 properties": (COMPLETIONS, lambda: form(json=PROPERTIES)),
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
}  # fmt: skip


def attack(name: str) -> Callable[[int], int]:
    """Return what sends the body three times and returns its size."""
    path, make = BODIES[name]

    def send(port: int) -> int:
        body = make()
        for _ in range(3):
            ANSWERS[name] = post(port, path, body)
        return len(body)

    return send


ATTACKS: dict[str, Callable[[int], int]] = {name: attack(name) for name in BODIES}
