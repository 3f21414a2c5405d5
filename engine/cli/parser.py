"""An argument parser that takes `_` for `-`, and suggests the near flag for a mistyped one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from sempre.engine.near_names import near_name


class UsageError(Exception):
    """The command line cannot be understood."""


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program; flags must be written out."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; flags and positional arguments may be mixed, and after `--` all is positional. Raises UsageError."""
        words = list(arguments)
        end = words.index("--") if "--" in words else len(words)
        namespace, unknown = self.parse_known_intermixed_args([_with_dashes(word) for word in words[:end]])
        for argument in unknown:
            if argument.startswith("-") and argument != "-":
                self._refuse(argument.partition("=")[0])
        # Parsed by hand: intermixed parsing takes words behind `--` for flags.
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
        # argparse's own passes over a reader who has left
        (file or sys.stderr).write(message)

    def _refuse(self, flag: str) -> NoReturn:
        listed = [name for name, action in self._option_string_actions.items() if action.help != argparse.SUPPRESS]
        near = near_name(flag, listed)
        hint = f"Did you mean {near}?" if near else f"See {self.prog} --help."
        raise UsageError(f"unknown flag {flag}. {hint}")


def _with_dashes(word: str) -> str:
    """Return `--max_tokens=3` as `--max-tokens=3`, anything but a flag as it is."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word
