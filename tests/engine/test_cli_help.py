"""What help says: usage in one line, one group, flags by a word; and what shells complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sempre.engine.cli.main import COMMANDS, main


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    if arguments[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            main(arguments)
    else:
        assert main(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.product
@pytest.mark.parametrize("command", COMMANDS)
def test_usage_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage, empty, *_ = printed(capsys, *command.split(), "--help").splitlines()
    assert usage.startswith(f"usage: sempre {command} ")
    assert "[flags]" in usage
    assert empty == ""


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("generate", "usage: sempre generate --model MODEL [flags] [PROMPT …]"),
        ("bench", "usage: sempre bench --model MODEL [flags] {latency,throughput,startup}"),
        ("serve", "usage: sempre serve [flags] [MODEL]"),
        ("run-batch", "usage: sempre run-batch --input-file FILE --output-file FILE [flags]"),
        ("pull", "usage: sempre pull [flags] NAME"),
    ],
)
def test_flags_that_must_be_given_are_in_the_usage(
    command: str, usage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = printed(capsys, command, "--help")
    assert text.splitlines()[0] == usage
    assert text.count("(required)") == usage.count(" --")


def test_a_missing_flag_is_named_after_a_mistyped_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-batch", "--input-file", "x"]) == 2
    assert capsys.readouterr().err == "sempre: error: --output-file is missing\n"
    assert main(["run-batch", "--input-fil", "x"]) == 2
    assert "unknown flag --input-fil" in capsys.readouterr().err


def flags(text: str) -> list[str]:
    """The flags that help lists, by their last names."""
    lines = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  -")]
    return [line.rpartition(", ")[2].split()[0] for line in lines]


def test_a_group_and_the_list_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    groups = printed(capsys, "generate", "--help=listgroup")
    assert "  engine (" in groups
    assert "  sampling (" in groups
    sampling = flags(printed(capsys, "generate", "--help=Sampling"))
    assert {"--temperature", "--top-k", "--sampling-seed"} <= set(sampling)
    assert "--model" not in sampling
    assert "--spec-tokens" in flags(printed(capsys, "generate", "--help=speculation"))


@pytest.mark.parametrize("word", ["max", "--max", "max_num_seqs", "KV"])
def test_flags_with_a_word_in_their_name(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = flags(printed(capsys, "serve", f"--help={word}"))
    part = word.strip("-").lower().replace("_", "-")
    assert found
    assert all(part in flag for flag in found)
    assert ("--max-num-seqs" in found) == ("max" in word)


def test_a_word_of_a_description_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-model-len" in flags(printed(capsys, "serve", "--help=longest"))


def test_flags_that_are_only_accepted_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "serve", "--help=swap")
    assert "accepted as flags of vLLM" in text
    assert "--swap-space" in text


def test_a_word_that_nothing_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--help=temprature"]) == 2
    error = capsys.readouterr().err
    assert "--help=temprature: no flag has to do with it. Did you mean --temperature? Groups: " in error
    assert printed(capsys, "generate", "--help=all") == printed(capsys, "generate", "--help")


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    program = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_sempre; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", program, "bash", script, *words], capture_output=True, text=True, timeout=20)
    assert done.stderr == ""
    return done.stdout.split()


def test_a_shell_completes_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    script = tmp_path / "sempre.bash"
    script.write_text(printed(capsys, "completion", "bash"))
    assert set(completed(script, "sempre", "")) == {name.split()[0] for name in COMMANDS}
    assert completed(script, "sempre", "serve", "--max-num-s") == ["--max-num-seqs"]
    assert {"--temperature", "--model", "--no-multiprocessing"} <= set(completed(script, "sempre", "generate", "--"))
    assert {"latency", "serve", "compare"} <= set(completed(script, "sempre", "bench", ""))
    assert completed(script, "sempre", "debug", "r") == ["ranks"]
    assert "--request-rate" in completed(script, "sempre", "bench", "serve", "--r")
    assert completed(script, "sempre", "generate", "--dtype", "bf") == ["bfloat16"]


@pytest.mark.product
@pytest.mark.parametrize("shell", ["zsh", "fish", "tcsh"])
def test_other_shells_have_their_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab", reason="shtab is not installed")
    assert "max-num-seqs" in printed(capsys, "completion", shell)


def test_without_its_library_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert "pip install shtab" in capsys.readouterr().err
