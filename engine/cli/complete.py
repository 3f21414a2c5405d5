"""`sempre complete`: completions from a running server."""

from __future__ import annotations

import argparse
import sys

from sempre.engine.cli.arguments import add_model_flag, add_sampling_flags, sampling_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.prompt_source import TerminalInput
from sempre.engine.cli.remote.answers import completion_text, print_answer
from sempre.engine.cli.remote.connection import DEFAULT_URL, Server, add_server_flags, connect

_HELP = "Each line, or text pasted at once, is a prompt; Ctrl-C stops a completion, Ctrl-D ends."
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
        body = {"model": server.model(namespace.model), "stream": True, **sampling_keywords(namespace)}
        if namespace.quick is not None:
            return _complete(server, {**body, "prompt": namespace.quick})
        typed = TerminalInput()
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
    return int(print_answer(server.stream("/v1/completions", body), completion_text) is None)
