"""Entry point: selects the command, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from sempre.engine.cli.exit_codes import (
    EXIT_CLOSED_OUTPUT,
    EXIT_DIFFERENT,
    EXIT_ENGINE,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_MODEL,
    EXIT_NOT_JUDGED,
    EXIT_OK,
    EXIT_USAGE,
)
from sempre.engine.cli.parser import CommandParser, UsageError
from sempre.engine.near_names import near_name
from sempre.engine.version import __version__
from sempre.ipc.errors import (
    ConfigError,
    EngineDeadError,
    InvarianceError,
    ModelError,
    ProtocolError,
    SeedMismatch,
    SempreError,
    StartupError,
)
from sempre.ipc.log_lines import PlainFormatter, plain, plain_lines

logger = logging.getLogger(__name__)

DEBUG_VARIABLE = "SEMPRE_DEBUG"

COMMANDS = {
    "generate": "complete prompts from arguments, standard input or a JSONL file",
    "chat": "chat with a model, in its own engine or on a running server",
    "complete": "complete prompts on a running server",
    "run-batch": "answer an OpenAI batch file",
    "serve": "serve a model over HTTP, with OpenAI's interface",
    "list-models": "print the architectures that are supported, and those that are refused",
    "pull": "download a model of the catalogue or the hub",
    "list": "print the models on this machine",
    "show": "print what a model on this machine is",
    "rm": "delete models that were downloaded",
    "bench": "measure latency, throughput or start-up",
    "bench serve": "measure a running server under load",
    "bench compare": "show the figures of two results of `bench` beside each other",
    "fingerprint": "print what the outputs of a model depend on, and its digest",
    "replay": "make the outputs of receipts again, and say whether they are equal",
    "verify": "check on this machine, or from outside on a server, that outputs depend on nothing else",
    "bisect": "find the first token, layer and operation in which two settings or checkpoints differ",
    "debug ranks": "print what each worker of a running server does, with stacks of those that lag",
    "compare": "compare two runs or servers, output by output and bit for bit",
    "completion": "print a script that completes commands and flags in a shell",
    "collect-env": "print versions and facts of this machine",
}

_EPILOG = f"""exit codes: {EXIT_OK} success, {EXIT_FAILURE} other failure, {EXIT_USAGE} usage or setting,
{EXIT_MODEL} model, {EXIT_ENGINE} engine could not start or died, {EXIT_DIFFERENT} outputs differ,
{EXIT_NOT_JUDGED} none differs but some could not be judged, {EXIT_INTERRUPTED} interrupted,
{EXIT_CLOSED_OUTPUT} the reader closed the output (as with `| head`).
`sempre COMMAND --help` describes a command, `sempre COMMAND --help=WORD` its flags with this word."""

HELP_HINT = (
    "--help=WORD shows the flags with this word in their name, or else in their description; --help=GROUP a group, "
    "--help=listgroup the names of all, --help=page everything in a pager."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = os.environ.get(DEBUG_VARIABLE) == "1" or "--debug" in arguments
    try:
        return _flushed(arguments, debug)
    except KeyboardInterrupt:
        print("sempre: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader has closed our output; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_OUTPUT
    except (UsageError, SempreError, OSError) as error:
        _report(error, debug)
        return exit_code(error)


def _flushed(arguments: list[str], debug: bool) -> int:
    """Run, and flush output here, where a closed pipe can be handled."""
    try:
        code = _run(arguments, debug)
    except SystemExit:  # from --help and --version
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return code


def exit_code(error: BaseException) -> int:
    """Return the exit code for this kind of error."""
    match error:
        case UsageError() | ConfigError():
            return EXIT_USAGE
        case ModelError():
            return EXIT_MODEL
        case StartupError() | EngineDeadError() | SeedMismatch() | InvarianceError() | ProtocolError():
            return EXIT_ENGINE
        case _:
            return EXIT_FAILURE


def _run(arguments: list[str], debug: bool) -> int:
    if not arguments or arguments[0].startswith("-"):
        parser = _top_parser()
        parser.parse(arguments)
        parser.print_help()
        return EXIT_OK
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    command, rest = " ".join(arguments[:words]), arguments[words:]
    if command not in COMMANDS:
        near = near_name(command, COMMANDS)
        hint = f" Did you mean {near!r}?" if near else f" Commands: {', '.join(COMMANDS)}."
        raise UsageError(f"unknown command {command!r}.{hint}")
    module = command_module(command)
    description = COMMANDS[command]
    parser = CommandParser(prog=f"sempre {command}", description=f"{description[0].upper()}{description[1:]}.")
    parser.epilog = HELP_HINT
    module.add_flags(parser)
    parser.add_argument("--debug", action="store_true", help="log everything, and show tracebacks of errors")
    flags = rest[: rest.index("--")] if "--" in rest else rest
    topic = next((word.removeprefix("--help=") for word in flags if word.startswith("--help=")), None)
    if topic is not None:
        from sempre.engine.cli.help import topic_help

        print(topic_help(parser, topic), end="")
        return EXIT_OK
    namespace = parser.parse(rest)
    _set_up_output(debug)
    _warn_of_variables()
    code: int = module.run(namespace)
    return code


def command_module(command: str) -> ModuleType:
    """Import what runs this command: its `add_flags` and `run`."""
    return import_module(f"sempre.engine.cli.{command.replace('-', '_').replace(' ', '.')}")


def _top_parser() -> CommandParser:
    parser = CommandParser(
        prog="sempre",
        usage="sempre COMMAND [flags]",
        description="LLM inference whose outputs are reproducible bit for bit.\n\ncommands:\n"
        + "\n".join(f"  {name:<13} {text}" for name, text in COMMANDS.items()),
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sempre {__version__}")
    return parser


def _warn_of_variables() -> None:
    """Warn of variables with our prefix that nothing reads, such as SEMPRE_CACH."""
    if any(name.startswith("SEMPRE_") for name in os.environ):
        # imports every setting
        from sempre.engine.cli.serve import ignored_variables

        for sentence in ignored_variables(os.environ):
            logger.warning("%s", sentence)


def _set_up_output(debug: bool) -> None:
    """Log to standard error, and write UTF-8 in every locale, so that output is the same everywhere."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("sempre: %(levelname)s: %(message)s"))
    root = logging.getLogger("sempre")
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8")


def _report(error: BaseException, debug: bool) -> None:
    if debug:
        print(plain_lines("".join(traceback.format_exception(error))), file=sys.stderr)
        worker_traceback = getattr(error, "worker_traceback", "")
        if worker_traceback:
            print(f"last traceback of the worker:\n{plain_lines(worker_traceback)}", file=sys.stderr)
    first_line, *more = str(error).strip().splitlines() or [type(error).__name__]
    print(f"sempre: error: {plain(first_line)}", file=sys.stderr)
    if more and not debug:
        print(f"sempre: {len(more)} more lines with --debug or {DEBUG_VARIABLE}=1", file=sys.stderr)
