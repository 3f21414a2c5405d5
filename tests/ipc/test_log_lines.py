"""Untrusted text in logs: no character has an effect, no line is forged, none exceeds a bound."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest

from sempre.engine.server.logs import REQUEST_ID, JsonFormatter, TextFormatter
from sempre.ipc.log_lines import PlainFormatter, for_terminal, plain, plain_lines

C0_AND_DELETE = [*map(chr, range(32)), "\x7f"]
C1 = [*map(chr, range(0x80, 0xA0))]
SEPARATORS = ["\u2028", "\u2029"]
BIDIRECTIONAL = [*"\u061c\u200e\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))]
INVISIBLE = ["\u00ad", "\u200b", "\u200d", "\ufeff", "\U000e0041", "\ufff9", "\ue000"]
HALF_PAIRS = ["\ud800", "\udfff"]
TROUBLE = [*C0_AND_DELETE, *C1, *SEPARATORS, *BIDIRECTIONAL, *INVISIBLE, *HALF_PAIRS]
FORMATTERS: dict[str, logging.Formatter] = {
    "text": TextFormatter(),
    "json": JsonFormatter(),
    "processes": PlainFormatter("worker 0: %(levelname)s: %(message)s"),
}


def record(message: str, *args: object, error: BaseException | None = None, **facts: Any) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    made = logging.LogRecord("sempre.test", logging.INFO, __file__, 1, message, args, info)
    made.facts = facts
    return made


@pytest.mark.parametrize("name", FORMATTERS)
def test_no_character_has_an_effect(name: str) -> None:
    for character in TROUBLE:
        check_a_character(name, character)


def check_a_character(name: str, character: str) -> None:
    text = f"/x{character}2026-11-28T00:00:00Z INFO forged"
    line = FORMATTERS[name].format(record("GET %s", text, path=text, many=[text], params={"a": text}))
    assert line.isprintable()
    assert "forged" in line
    if name == "json":
        # nothing is lost for a reader of JSON
        assert json.loads(line)["path"] == text


@pytest.mark.parametrize("name", FORMATTERS)
def test_an_exception_forges_no_line(name: str) -> None:
    for character in TROUBLE:
        check_an_exception(name, character)


def check_an_exception(name: str, character: str) -> None:
    try:
        raise ValueError(f"a{character}2026-11-28T00:00:00Z INFO forged\n2026-11-28T00:00:00Z INFO forged")
    except ValueError as error:
        text = FORMATTERS[name].format(record("failed", error=error))
    first, *others = text.split("\n")
    assert text.replace("\n", "").isprintable()
    assert "forged" not in first or name == "json"
    assert all(line.startswith("  ") for line in others)


@pytest.mark.parametrize("name", FORMATTERS)
def test_no_line_is_longer_than_a_bound(name: str) -> None:
    huge = "\x1b" * 8_000_000
    facts = {"prompt": huge, "prompt_token_ids": list(range(100_000)), "params": {str(n): huge for n in range(100)}}
    for made in (record(huge), record("%s", huge), record("request", **facts)):
        line = FORMATTERS[name].format(made)
        assert len(line) < 500_000
        assert name != "json" or json.loads(line)["level"] == "INFO"


def test_ordinary_lines_stay_as_they_are() -> None:
    assert plain("GET /v1/completions — Größe, 東京, שלום, 🌶") == "GET /v1/completions — Größe, 東京, שלום, 🌶"
    token = REQUEST_ID.set("an-id")
    try:
        text = TextFormatter().format(record("GET %s", "/health", status=200, prompt="It is"))
        line = json.loads(JsonFormatter().format(record("GET %s", "/health", status=200, ids=[1, 2])))
    finally:
        REQUEST_ID.reset(token)
    assert text.endswith("Z INFO [an-id] GET /health status=200 prompt=It is")
    assert {"request_id": "an-id", "status": 200, "ids": [1, 2], "message": "GET /health"}.items() <= line.items()


def test_a_long_text_of_many_lines_keeps_its_end() -> None:
    kept = plain_lines("".join(f"line {number}\n" for number in range(100_000)) + "ValueError: why")
    assert len(kept) < 200_000
    assert kept.endswith("  ValueError: why")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_model_wrote_does_not_command_a_terminal() -> None:
    text = "a\n\tb\x1b]0;title\x07\x9b2J\r — 👩‍🚀 שלום"
    assert for_terminal(text, io.StringIO()) == text
    assert for_terminal(text, Terminal()) == "a\n\tb\\x1b]0;title\\x07\\x9b2J\\r — 👩‍🚀 שלום"
