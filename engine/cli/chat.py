"""`sempre chat`: with its own engine, or with a running server."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.answers import Display, Piece, PlainDisplay, engine_pieces, show_answer
from sempre.engine.cli.arguments import (
    add_engine_flags,
    add_model_flag,
    add_sampling_flags,
    engine_keywords,
    model_of,
    sampling_field_names,
    sampling_keywords,
)
from sempre.engine.cli.conversation import KEYS, Ask, Conversation, Message
from sempre.engine.cli.remote.connection import add_server_flags
from sempre.engine.cli.terminal_input import TerminalInput
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from sempre.engine.llm import LLM

_WITHOUT = ("n", "logprobs", "prompt_logprobs", "detokenize")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--system", metavar="TEXT", help="system message that begins the conversation")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="answer this message, then exit")
    add_server_flags(parser)
    add_model_flag(parser)
    add_engine_flags(parser)
    add_sampling_flags(parser, without=_WITHOUT, defaults={"max_tokens": None})


def run(namespace: argparse.Namespace) -> int:
    """Read messages and print answers until /exit or the end of input; exit code 1 if `--quick` was refused."""
    given = sampling_keywords(namespace)
    SamplingParams(**{"max_tokens": None, **given})
    if namespace.url is not None:
        from sempre.engine.cli.remote.answers import RemoteChat, refuse_engine_flags
        from sempre.engine.cli.remote.connection import connect

        refuse_engine_flags(namespace)
        with connect(namespace) as server:
            waits = namespace.quick is None and sys.stdin.isatty()
            return _talk(RemoteChat(server, namespace.model, waits=waits).pieces, namespace, given)
    model = model_of(namespace)

    from sempre.engine.llm import LLM

    with LLM(model, **engine_keywords(namespace)) as llm:
        return _talk(lambda messages, sampling: _pieces(llm, messages, sampling), namespace, given)


def _pieces(llm: LLM, messages: Sequence[Message], sampling: Mapping[str, Any]) -> Iterator[Piece]:
    changes = {"max_tokens": None, **sampling, "output_kind": RequestOutputKind.DELTA}
    params = dataclasses.replace(llm.get_default_sampling_params(), **changes)
    yield from engine_pieces(llm, llm.render_chat(list(messages)), params)


def _talk(ask: Ask, namespace: argparse.Namespace, sampling: Mapping[str, Any]) -> int:
    if namespace.quick is not None:
        opening = [] if namespace.system is None else [{"role": "system", "content": namespace.system}]
        answer = show_answer(ask([*opening, {"role": "user", "content": namespace.quick}], sampling), display())
        return int(answer is None)
    converse(ask, namespace.system, sampling)
    return 0


def converse(ask: Ask, system: str | None, sampling: Mapping[str, Any]) -> None:
    """Take texts from standard input until it ends, or /exit."""
    conversation = Conversation(
        ask,
        display,
        system=system,
        sampling=sampling,
        settable=[name for name in sampling_field_names() if name not in _WITHOUT],
        survives=sys.stdin.isatty(),
    )
    typed = TerminalInput("chat", conversation.completions)
    if typed.is_interactive:
        print(f"/help shows the commands. {KEYS}", file=sys.stderr)
    while True:
        try:
            text = typed.read()
        except EOFError:
            return
        if not conversation.take(text):
            return


def display() -> Display:
    """Markdown at a terminal, plain text anywhere else."""
    if not sys.stdout.isatty():
        return PlainDisplay()
    # not needed for help and pipes
    from sempre.engine.cli.markdown_display import MarkdownDisplay

    return MarkdownDisplay()
