"""What the README and the pages in examples/ say about the interface is true."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from sempre.engine.cli.main import COMMANDS
from sempre.engine.cli.parser import CommandParser
from sempre.engine.server.neutral import NEUTRAL

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "examples").glob("*.md"))]
SERVING = " ".join((ROOT / "examples" / "serving.md").read_text(encoding="utf-8").split())
WITHOUT_EFFECT = sorted({name for fields in NEUTRAL.values() for name, field in fields.items() if field.values is None})


def commands() -> list[str]:
    """Every `sempre` command in a block of shell commands, up to what the shell does with it."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for i, word in enumerate(words):
                    if word == "sempre" and (i == 0 or words[i - 1] in ("&&", "|")):
                        rest = words[i:]
                        ends = [k for k, other in enumerate(rest) if other in ("|", ">", "&", "&&")]
                        found.append(shlex.join(rest[: ends[0] if ends else None]))
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_has_known_flags(command: str) -> None:
    words = shlex.split(command)[1:]
    if words[0].startswith("--"):
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    parser = CommandParser(prog=f"sempre {name}")
    import_module(f"sempre.engine.cli.{name.replace('-', '_').replace(' ', '.')}").add_flags(parser)
    parser.parse(words[len(name.split()) :])


def test_commands_are_found() -> None:
    assert {command.split()[1] for command in commands()} >= {
        "generate",
        "serve",
        "chat",
        "run-batch",
        "bench",
        "replay",
    }


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 250
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), (page.name, target)
    linked = {target.removeprefix("examples/") for target in re.findall(r"\]\((examples/[^)]+\.md)\)", text)}
    assert linked == {page.name for page in PAGES[1:]}, "the README leads to every page"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_every_field_without_effect_is_listed(name: str) -> None:
    start = SERVING.index("Accepted and without effect")
    assert f"`{name}`" in SERVING[start : start + 900]
