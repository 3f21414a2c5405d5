"""An argument parser that accepts `_` for `-`, and suggests a flag for a mistyped one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sempre.engine.near_names import near_name


class UsageError(Exception):
    """The command line is invalid."""


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program; flags cannot be abbreviated."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; flags and positional arguments may be mixed; after `--` all are positional. Raises UsageError."""
        words = list(arguments)
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
        return namespace

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
