"""`--help=TOPIC`: one group of flags, or those with a word in their name; the topics are vLLM's."""

from __future__ import annotations

import argparse
import pydoc

from sempre.engine.cli.parser import CommandParser, UsageError
from sempre.engine.near_names import near_name


def topic_help(parser: CommandParser, topic: str) -> str:
    """Return the help about `topic`: all, listgroup, a group's name or a word; `page` is shown in a pager here.

    Raises UsageError if nothing has to do with it.
    """
    if topic == "all":
        return parser.format_help()
    if topic == "page":
        pydoc.pager(parser.format_help())
        return ""
    groups = {group.title or "": _listed(group._group_actions) for group in parser._action_groups}
    groups = {title: actions for title, actions in groups.items() if actions}
    if topic == "listgroup":
        return "groups:\n" + "".join(f"  {title} ({len(actions)})\n" for title, actions in groups.items())
    for title, actions in groups.items():
        if topic.casefold() in (title.casefold(), title.casefold().partition(",")[0]):
            return _section(parser, title, actions)
    return _matches(parser, topic, list(groups))


def _matches(parser: CommandParser, topic: str, titles: list[str]) -> str:
    word = topic.lower().replace("_", "-").strip("-")
    named = [action for action in parser._actions if any(word in name for name in action.option_strings)]
    shown = _listed(named)
    hidden = [action.option_strings[0] for action in named if action.help == argparse.SUPPRESS]
    if not named:
        shown = [action for action in _listed(parser._actions) if word in (action.help or "").lower().replace("_", "-")]
    if not shown and not hidden:
        flags = [name for action in parser._actions for name in action.option_strings]
        near = near_name(f"--{word}", flags)
        hint = f" Did you mean {near}?" if near else ""
        raise UsageError(f"--help={topic}: no flag has to do with it.{hint} Groups: {'; '.join(titles)}.")
    text = _section(parser, f"flags with {word!r}", shown) if shown else ""
    if hidden:
        text += f"\naccepted as flags of vLLM, with values that ask for what is done anyway: {', '.join(hidden)}\n"
    return text


def _listed(actions: list[argparse.Action]) -> list[argparse.Action]:
    return [action for action in actions if action.help != argparse.SUPPRESS]


def _section(parser: CommandParser, title: str, actions: list[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title)
    formatter.add_arguments(actions)
    formatter.end_section()
    return formatter.format_help()
