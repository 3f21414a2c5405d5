"""A template that does not end, or takes all memory, costs its sender an error and nobody else anything."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from sempre.engine.server.errors import BadRequest
from sempre.engine.server.offload import Offload
from sempre.engine.text.chat_template import render_chat
from sempre.ipc.errors import RequestError

MESSAGES = [{"role": "user", "content": "Hé"}]


def arguments(template: str, **variables: object) -> dict[str, Any]:
    return {"messages": MESSAGES, "template": template, "bos_token": "<s>", "eos_token": None, **variables}


def run(work: Callable[[Offload], Awaitable[None]]) -> None:
    async def main() -> None:
        offload = Offload()
        try:
            async with asyncio.timeout(120):
                await work(offload)
        finally:
            await offload.close()

    asyncio.run(main())


def test_the_helper_renders_as_the_server_does() -> None:
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ x }}{% endfor %}"

    async def work(offload: Offload) -> None:
        given = arguments(template, x="ü", tools=[{"a": None}])
        assert await offload.in_helper("a", "render_chat", given) == render_chat(**given) == "<s>[user]Héü"

    run(work)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% set n = namespace(l=[]) %}{% for i in range(999) %}{% set n.l = n.l + ['a' * 9999999] %}{% endfor %}",
            "MiB of memory",
        ),
        ("{{ 'x' * 999999999 }}", "larger than"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 2 s"),
        (
            "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
            # of two bounds, which come close to each other
            "larger than|MiB of memory",
        ),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_a_template_beyond_its_limits_is_an_error_of_its_request(template: str, message: str) -> None:
    async def work(offload: Offload) -> None:
        with pytest.raises((BadRequest, RequestError), match=message):
            await offload.in_helper("a", "render_chat", arguments(template))
        assert await offload.in_helper("a", "render_chat", arguments("{{ 1 }}")) == "1"

    run(work)


def test_errors_of_the_helper_are_those_of_the_template() -> None:
    async def work(offload: Offload) -> None:
        with pytest.raises(RequestError, match="not valid Jinja") as refused:
            await offload.in_helper("a", "render_chat", arguments("{% if %}"))
        assert refused.value.parameter == "chat_template"

    run(work)


def test_a_client_waits_for_its_own_jobs_only() -> None:
    async def work(offload: Offload) -> None:
        began, go_on = threading.Event(), threading.Event()

        def first() -> str:
            began.set()
            assert go_on.wait(60)
            return "first"

        blocked = asyncio.create_task(offload.in_thread("a", first))
        await asyncio.to_thread(began.wait, 60)
        own = asyncio.create_task(offload.in_helper("a", "render_chat", arguments("{{ 2 }}")))
        assert await offload.in_helper("b", "render_chat", arguments("{{ 3 }}")) == "3"
        assert not own.done()
        go_on.set()
        assert await asyncio.gather(blocked, own) == ["first", "2"]

    run(work)


def test_a_short_task_waits_for_no_long_one() -> None:
    async def work(offload: Offload) -> None:
        endless = arguments("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
        long = asyncio.create_task(offload.in_helper("a", "render_chat", endless))
        assert await offload.in_urgent_helper("render_chat", arguments("{{ 5 }}")) == "5"
        assert not long.done()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long

    run(work)


def test_a_cancelled_job_leaves_no_answer_to_the_next() -> None:
    async def work(offload: Offload) -> None:
        endless = arguments("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await offload.in_helper("a", "render_chat", endless)
        assert await offload.in_helper("a", "render_chat", arguments("{{ 4 }}")) == "4"

    run(work)
