"""`sempre completion`: the script that completes commands, flags and values in a shell."""

from __future__ import annotations

import argparse
import sys

from sempre.engine.cli.bench import KINDS, add_workload_flags
from sempre.engine.cli.main import COMMANDS, command_module
from sempre.engine.cli.parser import CommandParser
from sempre.ipc.errors import ConfigError

SHELLS = ("bash", "zsh", "fish", "tcsh")
_FILES = ("FILE", "FOLDER", "PATH")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("shell", choices=SHELLS, help="for bash: sempre completion bash >> ~/.bash_completion")


def run(namespace: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError:
        raise ConfigError(
            "scripts for shells need the package shtab, which is not installed: pip install shtab"
        ) from None
    parser = whole_parser()
    for action in _all_actions(parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    sys.stdout.write(shtab.complete(parser, shell=namespace.shell))
    return 0


def whole_parser() -> CommandParser:
    """Return the parser of all commands at once, which otherwise are read one at a time."""
    parser = CommandParser(prog="sempre")
    commands = parser.add_subparsers()
    groups = {}
    for name, description in COMMANDS.items():
        group, _, word = name.rpartition(" ")
        if word == "bench":
            groups[word] = commands.add_parser(word, help=description).add_subparsers()
            for kind in KINDS:
                add_workload_flags(groups[word].add_parser(kind, help=description))
        else:
            if group == "debug" and group not in groups:
                groups[group] = commands.add_parser(group, help="look into a running server").add_subparsers()
            command = groups.get(group, commands).add_parser(word, help=description)
            command_module(name).add_flags(command)
    return parser


def _all_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in action.choices:
                found += _all_actions(action.choices[name])
    return found
