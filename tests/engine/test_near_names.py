"""What a mistyped name was meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from sempre.engine import near_names
from sempre.engine.arguments import FrontendConfig, field_types
from sempre.engine.cli import serve
from sempre.engine.cli.main import main
from sempre.engine.cli.parser import CommandParser
from sempre.engine.near_names import near_name
from sempre.engine.server.config import ServerConfig
from sempre.ipc.config import EngineConfig

NAMES = sorted({*field_types(EngineConfig), *field_types(FrontendConfig), *field_types(ServerConfig)})


@pytest.mark.parametrize("name", NAMES)
def test_one_letter_less_is_found(name: str) -> None:
    for place in range(1, len(name)):
        mistyped = name[:place] + name[place + 1 :]
        # another setting may be as near
        assert mistyped in NAMES or near_name(mistyped, NAMES) is not None


def _opposites(name: str) -> set[str]:
    words = name.split("_")
    pairs = {"enable": "disable", "disable": "enable", "max": "min", "min": "max", "start": "stop", "first": "last"}
    turned = {"_".join([*words[:i], pairs[w], *words[i + 1 :]]) for i, w in enumerate(words) if w in pairs}
    return turned | {f"no_{name}", f"disable_{name}", f"without_{name}"}


def test_hints_have_one_source() -> None:
    """Anyone who looks for near names by himself may propose the opposite."""
    folder = Path(near_names.__file__).parent
    assert [path for path in folder.rglob("*.py") if "difflib" in path.read_text()] == [Path(near_names.__file__)]


@pytest.mark.parametrize("name", NAMES)
def test_the_opposite_is_never_proposed(name: str) -> None:
    for opposite in _opposites(name) - set(NAMES):
        assert near_name(opposite, NAMES) != name
        assert near_name(name, [opposite]) is None


def test_no_flag_is_proposed_for_its_opposite(capsys: pytest.CaptureFixture[str]) -> None:
    parser = CommandParser()
    serve.add_flags(parser)
    for flag in [flag for flag in parser._option_string_actions if flag.startswith("--enable-")]:
        turned = flag.replace("--enable-", "--disable-")
        if turned in parser._option_string_actions:
            continue
        assert main(["serve", "tiny", turned]) == 2
        assert f"Did you mean {flag}?" not in capsys.readouterr().err


def test_another_way_to_say_the_same_is_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "tiny", "--disable-prefix-caching"]) == 2
    assert "Did you mean --no-enable-prefix-caching?" in capsys.readouterr().err
