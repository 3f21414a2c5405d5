"""`sempre chat`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from sempre.engine.cli.arguments import (
    add_engine_flags,
    add_model_flag,
    add_sampling_flags,
    engine_keywords,
    model_of,
    sampling_keywords,
)
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.ipc.errors import RequestError

if TYPE_CHECKING:
    from sempre.engine.llm import LLM

_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer."
_WITHOUT = ("n", "logprobs", "prompt_logprobs", "detokenize")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--system", metavar="TEXT", help="system message that begins the conversation")
    add_model_flag(parser)
    add_engine_flags(parser)
    add_sampling_flags(parser, without=_WITHOUT, defaults={"max_tokens": None})


def run(namespace: argparse.Namespace) -> int:
    """Read messages and print answers until /exit or the end of input."""
    model = model_of(namespace)
    given = sampling_keywords(namespace)
    SamplingParams(**{"max_tokens": None, **given})

    from sempre.engine.llm import LLM

    with LLM(model, **engine_keywords(namespace)) as llm:
        changes = {"max_tokens": None, **given, "output_kind": RequestOutputKind.DELTA}
        params = dataclasses.replace(llm.get_default_sampling_params(), **changes)
        opening = [] if namespace.system is None else [{"role": "system", "content": namespace.system}]
        _converse(llm, params, opening)
    return 0


def _converse(llm: LLM, params: SamplingParams, opening: list[dict[str, str]]) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        # With it imported, input() edits lines and remembers them.
        import readline  # noqa: F401

        print(_HELP, file=sys.stderr)
    messages = list(opening)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line.startswith("/"):
            print(f"unknown command {line}. {_HELP}", file=sys.stderr)
        elif line:
            question = {"role": "user", "content": line}
            answer = _answer(llm, params, [*messages, question])
            if answer is not None:
                messages += [question, {"role": "assistant", "content": answer}]


def _answer(llm: LLM, params: SamplingParams, messages: list[dict[str, str]]) -> str | None:
    """Print the answer as it comes; return it, or None when the request was refused."""
    pieces: list[str] = []
    try:
        for output in llm.stream(llm.render_chat(messages), params):
            pieces.append(output.outputs[0].text)
            print(pieces[-1], end="", flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    except RequestError as error:
        print(f"sempre: error: {error}", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(pieces)
