"""`sempre complete`: completions from a running server."""

from __future__ import annotations

import argparse
import sys

from sempre.engine.cli.answers import PlainDisplay, show_answer
from sempre.engine.cli.arguments import add_model_flag, add_sampling_flags, sampling_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.answers import STREAMED, completion_text, pieces_of
from sempre.engine.cli.remote.connection import DEFAULT_URL, Server, add_server_flags, connect
from sempre.engine.cli.terminal_input import TerminalInput

_HELP = "Enter sends, Alt-Enter begins a new line; Ctrl-C stops a completion, Ctrl-D ends."
# A stream is one text; fields that HTTP or a stream does not support have no flag here.
_WITHOUT = ("n", "logprobs", "prompt_logprobs", "detokenize")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="complete this prompt, then exit")
    add_server_flags(parser)
    add_model_flag(parser)
    add_sampling_flags(parser, without=_WITHOUT)


def run(namespace: argparse.Namespace) -> int:
    """Print completions as they arrive; exit code 1 if the last request was refused."""
    if namespace.url is None:
        raise UsageError(f"--url is missing, for example --url {DEFAULT_URL}; without a server use sempre generate")
    with connect(namespace) as server:
        body = {"model": server.model(namespace.model), **STREAMED, **sampling_keywords(namespace)}
        if namespace.quick is not None:
            return _complete(server, {**body, "prompt": namespace.quick})
        typed = TerminalInput("complete")
        if typed.is_interactive:
            print(_HELP, file=sys.stderr)
        code = 0
        while True:
            try:
                line = typed.read()
            except EOFError:
                return code
            if line:
                code = _complete(server, {**body, "prompt": line})


def _complete(server: Server, body: dict[str, object]) -> int:
    pieces = pieces_of(server.stream("/v1/completions", body), completion_text)
    return int(show_answer(pieces, PlainDisplay()) is None)
