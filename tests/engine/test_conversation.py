"""The commands of a chat, and Markdown while it arrives."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sempre.engine.cli.answers import Piece, PlainDisplay
from sempre.engine.cli.conversation import COMMANDS, Conversation, Message
from sempre.engine.cli.markdown_display import MarkdownDisplay, split_blocks
from sempre.ipc.errors import ServerError

SETTABLE = ("temperature", "max_tokens", "seed")


class Model:
    """Answers with what it was asked and its seed; `drift` makes equal requests differ."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], dict[str, Any]]] = []
        self.drift = ""
        self.failures = 0

    def ask(self, messages: Sequence[Message], sampling: Mapping[str, Any]) -> Iterator[Piece]:
        self.calls.append(([message["content"] for message in messages], dict(sampling)))
        if self.failures:
            self.failures -= 1
            raise ServerError("gone", url="http://x")
        seed = sampling.get("seed", 100 + len(self.calls))
        yield Piece(f"{messages[-1]['content']} ", seed)
        yield Piece(f"{seed}{self.drift}", None, "f")


def conversation(model: Model, **changes: Any) -> Conversation:
    given: dict[str, Any] = {"system": None, "sampling": {}, "settable": SETTABLE, "survives": True, **changes}
    return Conversation(model.ask, PlainDisplay, **given)


def test_again_has_the_same_seed_and_says_whether_the_answer_is_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    talk = conversation(model)
    for text in ("one", "two", "/again"):
        assert talk.take(text)
    written = capsys.readouterr()
    assert written.out == "one 101\ntwo 102\ntwo 102\n"
    assert written.err == "the same answer\n"
    assert model.calls[-1] == (["one", "one 101", "two"], {"seed": 102})
    model.drift = "!"
    talk.take("/again")
    assert capsys.readouterr().err == "another answer from character 8 on\n"
    assert talk.turns[-1].sampling == {}


def test_settings_system_and_undo(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    talk = conversation(model, system="s")
    for text in ("/seed 5", "/set temperature 0.5", "one", "/undo", "/system be brief", "/seed off", "two", "/reset"):
        assert talk.take(text)
    assert model.calls == [
        (["s", "one"], {"seed": 5, "temperature": 0.5}),
        (["be brief", "two"], {"temperature": 0.5}),
    ]
    assert talk.turns == []
    for text in ("/set temperature", "/system", "three"):
        assert talk.take(text)
    assert model.calls[-1] == (["three"], {})
    assert not talk.take("/exit")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("/set temperature -1", "/set: temperature must be"),
        ("/set temprature 1", "/set: there is no parameter 'temprature'. Did you mean 'temperature'?"),
        ("/seed abc", "/seed: seed must be"),
        ("/agian", "unknown command /agian. Did you mean /again?"),
        ("/again", "/again: nothing was asked yet"),
        ("/undo", "/undo: there is nothing to forget"),
        ("/save", "/save: the name of a file is missing"),
        ("/load /nowhere", "/load: [Errno 2]"),
        ("/load /dev/null", "/load: /dev/null is not a conversation that /save kept:"),
    ],
)
def test_mistakes_are_said_and_change_nothing(capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    model = Model()
    talk = conversation(model)
    assert talk.take(text)
    assert capsys.readouterr().err.startswith(message)
    talk.take("one")
    assert model.calls == [(["one"], {})]


def test_a_kept_conversation_goes_on_and_its_answer_is_asked_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "talk.json"
    first = conversation(Model(), system="s", sampling={"max_tokens": 9})
    for text in ("one", "two", f"/save {file}"):
        first.take(text)
    assert json.loads(file.read_text())["turns"][1] == {
        "question": "two",
        "answer": "two 102",
        "seed": 102,
        "fingerprint": "f",
        "sampling": {"max_tokens": 9},
    }
    model = Model()
    second = conversation(model)
    capsys.readouterr()
    for text in (f"/load {file}", "/again"):
        second.take(text)
    assert model.calls == [(["s", "one", "one 101", "two"], {"max_tokens": 9, "seed": 102})]
    assert capsys.readouterr().err == f"2 messages of {file}\nthe same answer\n"


def test_a_server_that_fails_does_not_end_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    model.failures = 1
    talk = conversation(model)
    for text in ("one", "/again", "two"):
        assert talk.take(text)
    assert "sempre: error: gone\nsempre: /again asks once more\n" in capsys.readouterr().err
    assert [turn.question for turn in talk.turns] == ["one", "two"]
    model.failures = 1
    with pytest.raises(ServerError, match="gone"):
        conversation(model, survives=False).take("one")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(Model())
    talk.take("/help")
    text = capsys.readouterr().err
    assert all(f"\n{name} " in f"\n{text}" for name in COMMANDS)
    assert all(hasattr(talk, f"_{name[1:]}") for name in COMMANDS if name != "/exit")


TEXT = """# Title

Some **bold** text, <b>tags</b> and [a link](http://x.test).

1. one

   more of one
2. two

```python
a = 1

b = 2
```

| a | b |
|---|---|
| 1 | 2 |
"""


def shown(pieces: Sequence[str], height: int = 50) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=60, height=height)
    with MarkdownDisplay(console) as display:
        for piece in pieces:
            display.write(piece)
    return file.getvalue()


def test_markdown_is_the_same_however_it_arrives() -> None:
    whole = shown([TEXT])
    assert shown(list(TEXT)) == whole == shown(list(TEXT), height=4)
    assert "**" not in whole
    assert "```" not in whole
    # what HTML and links hide is shown
    for text in ("<b>tags</b>", "http://x.test", "b = 2", "more of one"):
        assert text in whole


def test_blocks_are_cut_where_more_text_cannot_change_them() -> None:
    assert split_blocks("one\n\ntwo") == (["one\n\n"], "two")
    assert split_blocks("one\n\n") == ([], "one\n\n")
    assert split_blocks("- a\n\n  more") == ([], "- a\n\n  more")
    assert split_blocks("```\na\n\nb\n") == ([], "```\na\n\nb\n")
    assert split_blocks("````\n```\n\nb\n````\n\nc") == (["````\n```\n\nb\n````\n\n"], "c")
