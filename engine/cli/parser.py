"""An argument parser that accepts `_` for `-`, and suggests a flag for a mistyped one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sempre.engine.near_names import near_name


class UsageError(Exception):
    """The command line is invalid."""


class Required(argparse.Action):
    """Stores the value of a flag that must be given; unlike argparse's own, reported after mistyped flags.

    `missing` ends the error's sentence.
    """

    def __init__(self, *, help: str, missing: str = "", **keywords: Any) -> None:
        super().__init__(help=f"{help} (required)", **keywords)
        self.missing = missing

    def __call__(self, parser: object, namespace: argparse.Namespace, values: object, option: object = None) -> None:
        setattr(namespace, self.dest, values)


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program; flags cannot be abbreviated."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; flags and positional arguments may be mixed; after `--` all are positional. Raises UsageError."""
        words = list(arguments)
        self._shorten_usage()
        end = words.index("--") if "--" in words else len(words)
        namespace, unknown = self.parse_known_intermixed_args([_with_dashes(word) for word in words[:end]])
        for argument in unknown:
            if argument.startswith("-") and argument != "-":
                self._refuse(argument.partition("=")[0])
        # Parsed by hand: intermixed parsing treats words after `--` as flags.
        lists = [action.dest for action in self._get_positional_actions() if action.nargs == "*"]
        if lists:
            setattr(namespace, lists[0], [*getattr(namespace, lists[0]), *words[end + 1 :]])
        else:
            unknown += words[end + 1 :]
        if unknown:
            raise UsageError(f"unexpected arguments: {' '.join(unknown)}. See {self.prog} --help.")
        for action in self._required_flags():
            if getattr(namespace, action.dest) is None:
                raise UsageError(f"{action.option_strings[-1]} is missing{action.missing}")
        return namespace

    def _required_flags(self) -> list[Required]:
        return [action for action in self._actions if isinstance(action, Required)]

    def format_help(self) -> str:
        self._shorten_usage()
        return super().format_help()

    def _shorten_usage(self) -> None:
        """One line: required flags and positional arguments; the other flags are listed below it anyway."""
        if self.usage is not None:
            return
        parts = [self.prog]
        parts += [f"{action.option_strings[-1]} {action.metavar}" for action in self._required_flags()]
        parts.append("[flags]")
        for action in self._get_positional_actions():
            shown = str(action.metavar or (action.choices and f"{{{','.join(action.choices)}}}") or action.dest)
            parts.append(shown if action.nargs is None else f"[{shown}]" if action.nargs == "?" else f"[{shown} …]")
        self.usage = " ".join(parts).replace("%", "%%")

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse's own method ignores a closed pipe
        (file or sys.stderr).write(message)

    def _refuse(self, flag: str) -> NoReturn:
        listed = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = near_name(flag, listed)
        hint = f"Did you mean {near}?" if near else f"See {self.prog} --help."
        raise UsageError(f"unknown flag {flag}. {hint}")


def _with_dashes(word: str) -> str:
    """Return `--max_tokens=3` as `--max-tokens=3`, and anything but a flag unchanged."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word
