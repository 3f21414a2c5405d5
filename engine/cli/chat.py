"""`sempre chat`: with its own engine, or with a running server."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sempre.engine.cli.arguments import (
    add_engine_flags,
    add_model_flag,
    add_sampling_flags,
    engine_keywords,
    model_of,
    sampling_keywords,
)
from sempre.engine.cli.prompt_source import TerminalInput
from sempre.engine.cli.remote.connection import add_server_flags
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.ipc.errors import RequestError
from sempre.ipc.log_lines import for_terminal, plain

if TYPE_CHECKING:
    from sempre.engine.llm import LLM

_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer."
Message = dict[str, str]
Answer = Callable[[Sequence[Message]], str | None]
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
    opening = [] if namespace.system is None else [{"role": "system", "content": namespace.system}]
    given = sampling_keywords(namespace)
    SamplingParams(**{"max_tokens": None, **given})
    if namespace.url is not None:
        from sempre.engine.cli.remote.answers import RemoteChat, refuse_engine_flags
        from sempre.engine.cli.remote.connection import connect

        refuse_engine_flags(namespace)
        with connect(namespace) as server:
            return _talk(RemoteChat(server, namespace.model, given).answer, opening, namespace.quick)
    model = model_of(namespace)

    from sempre.engine.llm import LLM

    with LLM(model, **engine_keywords(namespace)) as llm:
        changes = {"max_tokens": None, **given, "output_kind": RequestOutputKind.DELTA}
        params = dataclasses.replace(llm.get_default_sampling_params(), **changes)
        return _talk(lambda messages: _answer(llm, params, messages), opening, namespace.quick)


def _talk(answer: Answer, opening: list[Message], quick: str | None) -> int:
    if quick is not None:
        return int(answer([*opening, {"role": "user", "content": quick}]) is None)
    _converse(answer, opening)
    return 0


def _converse(answer: Answer, opening: list[Message]) -> None:
    typed = TerminalInput()
    if typed.is_interactive:
        print(_HELP, file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            line = typed.read().strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/") and "\n" not in line:
            print(f"unknown command {line}. {_HELP}", file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            text = answer([*messages, question])
            if text is not None:
                messages += [question, {"role": "assistant", "content": text}]


def _answer(llm: LLM, params: SamplingParams, messages: Sequence[Message]) -> str | None:
    """Print the answer as it arrives; return it, or None if the request was refused."""
    pieces: list[str] = []
    try:
        for output in llm.stream(llm.render_chat(list(messages)), params):
            pieces.append(output.outputs[0].text)
            print(for_terminal(pieces[-1], sys.stdout), end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"sempre: error: {plain(str(error))}", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(pieces)
