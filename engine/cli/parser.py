"""An argument parser that takes `_` for `-`, and suggests the near flag for a mistyped one."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn


class UsageError(Exception):
    """The command line cannot be understood."""


class CommandParser(argparse.ArgumentParser):
    """Raises UsageError instead of ending the program; flags must be written out."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse; flags and positional arguments may be mixed. Raises UsageError."""
        namespace, unknown = self.parse_known_intermixed_args(_with_dashes(arguments))
        for argument in unknown:
            if argument.startswith("-") and argument != "-":
                self._refuse(argument.partition("=")[0])
        if unknown:
            raise UsageError(f"unexpected arguments: {' '.join(unknown)}. See {self.prog} --help.")
        return namespace

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. See {self.prog} --help.")

    def _refuse(self, flag: str) -> NoReturn:
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"See {self.prog} --help."
        raise UsageError(f"unknown flag {flag}. {hint}")


def _with_dashes(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with `--max_tokens` written `--max-tokens`; values and what follows `--` stay."""
    words = list(arguments)
    end = words.index("--") if "--" in words else len(words)
    for i, word in enumerate(words[:end]):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            words[i] = flag.replace("_", "-") + equals + value
    return words
