"""A template that comes with a checkpoint has bounds of time and size in the user's process, too."""

from __future__ import annotations

import time
from typing import Any

import jinja2.sandbox
import msgspec
import pytest

from sempre.engine import RequestError
from sempre.engine.server.helper_process import answer
from sempre.engine.text import template_limits
from sempre.engine.text.chat_template import render_chat
from sempre.engine.text.template_limits import BoundedEnvironment

MESSAGES = [{"role": "user", "content": "Hi"}]
DOUBLING = "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = OPERATION %}{% endfor %}"


def rendered(template: str, **variables: Any) -> str:
    return render_chat(MESSAGES, template, bos_token=None, eos_token=None, **variables)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 1000000000000 }}",
        "{{ 1000000000000 * [1] }}",
        "{{ 7 ** 100000000000 }}",
        "{{ '%1000000000000d' % 1 }}",
        "{{ '%1000000000000d' | format(1) }}",
        "{{ '{:1000000000000}'.format(1) }}",
        "{{ 'a'.center(1000000000000) }}",
        "{{ 'a'.ljust(width) }}",
        "{{ 'a' | center(1000000000000) }}",
        "{{ 'a' | center(width=1000000000000) }}",
        "{{ 'a' | indent(1000000000000) }}",
        "{{ [1] | batch(1000000000000, 0) | list }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{{ ('b' * 999999).join(['a'] * 999999) }}",
        "{{ (['a'] * 999999) | join('b' * 999999) }}",
        "{{ range(1000000000000) | list }}",
        "{{ 1.5 | round(1000000000000, 'ceil') }}",
        "{{ [1] | slice(1000000000000) | list }}",
        "{{ width.to_bytes(width) }}",
        "{{ lipsum(n=1000000000000) }}",
        "{% macro wide(f, n) %}{{ f(n) }}{% endmacro %}{{ wide('a'.center, width) }}",
        "{{ ['a'] | map('center', 1000000000000) | list }}",
        DOUBLING.replace("OPERATION", "n.x ~ n.x"),
        DOUBLING.replace("OPERATION", "n.x + n.x"),
        DOUBLING.replace("OPERATION", "n.x + n.x").replace("x='a'", "x=[1]"),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_would_take_all_memory_is_refused(template: str) -> None:
    with pytest.raises(RequestError, match="chat_template refused these messages: "):
        rendered(template, width=10**12)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        # what would hide the clock's name, if it had one
        "{% set tick = 1 %}{% set environment = 1 %}{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}"
        "{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_what_would_take_all_time_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MAX_CPU_S", 0.2)
    began = time.thread_time()
    with pytest.raises(RequestError, match=r"it takes more than 0\.2 s"):
        rendered(template)
    # far below what they would take, which is minutes and more
    assert time.thread_time() - began < 20


@pytest.mark.parametrize(
    "shown",
    [
        "{{ n }}",
        "{{ n | string }}",
        "{{ n | tojson }}",
        "{{ n | abs }}",
        "{{ n | int }}",
        "{{ n | default(1) }}",
        "{{ none | default(n, true) }}",
        "{{ {}.get('a', n) }}",
        "{{ [1, n] | max }}",
        "{{ [n] | sum }}",
        "{{ [n] | first }}",
        "{{ dict(a=n)['a'] }}",
        "{% set s = namespace(a=n) %}{{ s.a }}",
        "{% macro m(a, b=1) %}{{ a if b == 1 else b }}{% endmacro %}{{ m(n) }}",
        "{% macro m(a, b=1) %}{{ b }}{% endmacro %}{{ m(1, b=n) }}",
        "{% macro m() %}{{ caller(n) }}{% endmacro %}{% call(a) m() %}{{ a }}{% endcall %}",
    ],
)
def test_a_number_that_is_no_size_may_be_large(shown: str) -> None:
    for number in (2**24 + 1, 10**15):
        assert rendered(shown, n=number) == str(number)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index ~ ': ' ~ m.content ~ none ~ x }}{% endfor %}",
        "{% macro show(m, sep='-') %}{{ sep * 3 }}{{ m.content | upper }}{% endmacro %}{{ show(messages[0]) }}",
        "{{ '%-10s|%05.1f' % ('a', 2) }}{{ '{:>4}'.format('b') }}{{ 'a,b'.split(',') | join(' ') }}",
        "{{ [1] + [2] }}{{ 'a' + 'b' }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ 'aXb'.replace('X', '--') }}{{ (1, 2) + (3,) }}",
        "{% for a in [1, 2] recursive %}{{ a }}{% if a == 1 %}{{ loop([3]) }}{% endif %}{% else %}none{% endfor %}",
        "{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k ~ v }}{% if not loop.last %}, {% endif %}{% endfor %}",
        "{{ messages | map(attribute='content') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list }}",
        "{% set n = namespace(t='') %}{% for c in 'abc' %}{% set n.t = n.t + c %}{% endfor %}{{ n.t }}",
        "{{ 'a' | indent(4, first=true) }}{{ 'é' | center(5) }}{% for x in [] %}{% else %}nothing{% endfor %}",
    ],
)
def test_ordinary_templates_render_as_they_do_without_bounds(template: str) -> None:
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    bounded = BoundedEnvironment(**options)
    expected = plain.from_string(template).render(messages=MESSAGES)
    assert expected
    assert bounded.from_string(template).render(messages=MESSAGES) == expected


def _call(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [*MESSAGES, {"role": "assistant", "tool_calls": [call]}]


_SHOWS_ARGUMENTS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments.a }}{% endfor %}{% endfor %}"
)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    names: dict[str, Any] = {"bos_token": None, "eos_token": None}
    assert render_chat(_call(r'{"a": "\ud83d\ude00"}'), _SHOWS_ARGUMENTS, **names) == "😀"
    for messages, template in ((_call(r'{"a": "\ud800"}'), _SHOWS_ARGUMENTS), (MESSAGES, r"{{ '\ud800' }}")):
        with pytest.raises(RequestError, match="no UTF-8 form: surrogates not allowed at character 0") as caught:
            render_chat(messages, template, **names)
        assert caught.value.parameter == "messages"


@pytest.mark.parametrize("template", [r"{{ '\ud800' }}", r"{{ raise_exception('\ud800') }}", r"{{ '\ud800' + 1 }}"])
def test_the_helper_process_answers_whatever_a_template_does(template: str) -> None:
    task = ["render_chat", {"messages": MESSAGES, "template": template, "bos_token": None, "eos_token": None}]
    is_done, [kind, told, parameter] = msgspec.json.decode(msgspec.json.encode(answer(msgspec.json.encode(task))))
    assert (is_done, kind, parameter) == (False, "RequestError", "messages")
    assert "memory" not in told
