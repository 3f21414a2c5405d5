"""The command line without an engine: help, mistakes, input, settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sempre.engine.cli.arguments import (
    add_engine_flags,
    add_sampling_flags,
    engine_keywords,
    sampling_keywords,
)
from sempre.engine.cli.main import COMMANDS, exit_code, main
from sempre.engine.cli.parser import CommandParser, UsageError
from sempre.engine.cli.prompt_source import PromptRow, prompts_from_arguments, prompts_from_file
from sempre.engine.cli.serve import ignored_variables
from sempre.engine.version import __version__
from sempre.ipc.errors import (
    ConfigError,
    CoordinatorDied,
    InvarianceError,
    ModelError,
    RequestError,
    SempreError,
    StartupError,
    WorkerDied,
)


def sempre(
    *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sempre.engine", *arguments]
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(command, input="", env=variables, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], [], ["generate", "--help"], ["chat", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "sempre.engine", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "argparse" in imported
    assert imported.isdisjoint({"torch", "numpy", "numba", "tokenizers", "transformers", "zmq"})
    assert result.stdout.startswith(f"sempre {__version__}\n" if arguments == ["--version"] else "usage: sempre")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["serve", "--help"], ["collect-env"]])
def test_an_output_that_nobody_reads_ends_quietly(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sempre.engine", *arguments]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (result.returncode, result.stderr) == (141, b"")


def test_help_names_every_command() -> None:
    result = sempre("--help")
    assert all(f"  {name}" in result.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "unknown command 'generat'. Did you mean 'generate'?"),
        (["xyzzy"], f"unknown command 'xyzzy'. Commands: {', '.join(COMMANDS)}."),
        (["--verison"], "unknown flag --verison. Did you mean --version?"),
        (["generate", "--modle", "tiny", "hi"], "unknown flag --modle. Did you mean --model?"),
        (
            ["generate", "--model", "tiny", "--max_tokns=3", "hi"],
            "unknown flag --max-tokns. Did you mean --max-tokens?",
        ),
        (["generate", "--xyzzy", "hi"], "unknown flag --xyzzy. See sempre generate --help."),
        (["generate", "hi"], "--model is missing; the model `tiny` is always available: --model tiny"),
        (["generate", "--model"], "argument --model: expected one argument. See sempre generate --help."),
        (
            ["generate", "--model", "tiny", "--max-tokens", "many"],
            "argument --max-tokens: expected an integer such as 2048, 2k (2000), 2K (2048) or 4GiB, "
            "got 'many'. See sempre generate --help.",
        ),
        (
            ["generate", "--model", "tiny", "--stop-token-ids", "1;2"],
            "argument --stop-token-ids: expected integers separated by commas, got '1;2'. See sempre generate --help.",
        ),
        (
            ["generate", "--model", "tiny", "--logit-bias", "5"],
            "argument --logit-bias: expected a JSON object such as {\"5\": 1.5}, got '5'. See sempre generate --help.",
        ),
        (["fingerprint", "tiny", "extra"], "unexpected arguments: extra. See sempre fingerprint --help."),
    ],
)
def test_usage_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert (written.out, written.err) == ("", f"sempre: error: {message}\n")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["generate", "--model", "tiny"],
            2,
            "no prompt: give one as an argument, on standard input, or with --input FILE",
        ),
        (["generate", "--model", "tiny", "--top-p", "5", "hi"], 2, "top_p must be in [0, 1], got 5.0."),
        (["generate", "--model", "tiny", "--max-num-seqs", "0", "hi"], 2, "max_num_seqs must be at least 1, got 0."),
        (
            ["generate", "--model", "tiny", "--input", "rows.jsonl", "hi"],
            2,
            "give prompts as arguments or with --input, not both",
        ),
        (
            ["generate", "--model", "tiny", "--input", "/nowhere.jsonl"],
            1,
            "[Errno 2] No such file or directory: '/nowhere.jsonl'",
        ),
        (
            ["pull", "smollm"],
            2,
            "model 'smollm' is not a local folder, a known name or a hub id (org/name). Did you mean smollm2-135m?",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, message: str) -> None:
    result = sempre(*arguments)
    assert result.returncode == code
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"sempre: error: {message}")


def test_an_unusable_model_has_its_own_exit_code(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = sempre("generate", "--model", str(tmp_path), "hi")
    assert result.returncode == 3
    assert result.stderr.startswith(f"sempre: error: {tmp_path / 'tokenizer.json'} is missing.")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(("flag", "environment"), [(["--debug"], {}), ([], {"SEMPRE_DEBUG": "1"})])
def test_debug_shows_the_traceback(flag: list[str], environment: dict[str, str]) -> None:
    result = sempre("pull", "nothing", *flag, environment=environment)
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("sempre: error: model 'nothing' is not a local folder,")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("x"), 2),
        (ConfigError("x"), 2),
        (RequestError("x"), 2),
        (ModelError("x"), 3),
        (StartupError("x"), 4),
        (InvarianceError("x", operation="linear"), 4),
        (WorkerDied("x", rank=0), 4),
        (CoordinatorDied("x"), 4),
        (SempreError("x"), 1),
        (OSError("x"), 1),
    ],
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_collect_env() -> None:
    result = sempre("collect-env", "--json", environment={"HF_TOKEN": "secret", "OMP_NUM_THREADS": "1"})
    facts = json.loads(result.stdout)
    assert facts["sempre"] == __version__
    assert facts["library torch"] != "not installed"
    assert (facts["variable HF_TOKEN"], facts["variable OMP_NUM_THREADS"]) == ("(set)", "1")
    assert {"python", "system", "cpu", "cpu extensions", "usable cores", "memory", "cache folder"} <= set(facts)
    assert "secret" not in result.stdout
    assert sempre("collect-env").stdout.startswith("sempre ")


def parsed(arguments: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    parser = CommandParser(prog="sempre generate")
    parser.add_argument("prompts", nargs="*")
    add_engine_flags(parser)
    add_sampling_flags(parser)
    namespace = parser.parse(arguments)
    return engine_keywords(namespace), sampling_keywords(namespace)


@pytest.mark.parametrize(
    ("arguments", "engine", "sampling"),
    [
        ([], {}, {}),
        (["--seed", "7", "--sampling-seed", "9"], {"seed": 7}, {"seed": 9}),
        (["--max_num_seqs=4", "--max-model-len", "2k"], {"max_num_seqs": 4, "max_model_len": 2000}, {}),
        (["--kv-cache-memory-bytes", "1G"], {"kv_cache_memory_bytes": 2**30}, {}),
        (["--no-enable-prefix-caching", "--ignore-eos"], {"enable_prefix_caching": False}, {"ignore_eos": True}),
        (["--no_multiprocessing"], {"multiprocessing": False}, {}),
        (["--dtype", "bfloat16", "--heartbeat-timeout-s", "5"], {"dtype": "bfloat16", "heartbeat_timeout_s": 5.0}, {}),
        (["--chat-template", "x.jinja"], {"chat_template": "x.jinja"}, {}),
        (
            ["-tp", "1", "-pp", "2", "--kv-cache-dtype", "auto"],
            {"tensor_parallel_size": 1, "pipeline_parallel_size": 2, "kv_cache_dtype": "auto"},
            {},
        ),
        (["-dp", "2", "--no-enable-chunked-prefill"], {"data_parallel_size": 2, "enable_chunked_prefill": False}, {}),
        (["-cc", '{"mode": 3}'], {"compilation_config": {"mode": 3}}, {}),
        (["--stop", "a", "--stop", "b,c"], {}, {"stop": ["a", "b,c"]}),
        (["--stop-token-ids", "1,2", "--logprobs", "-1"], {}, {"stop_token_ids": [1, 2], "logprobs": -1}),
        (["--logit-bias", '{"5": -1.5}', "--bad-words", "x"], {}, {"logit_bias": {"5": -1.5}, "bad_words": ["x"]}),
        (["p", "--temperature", "0", "q", "--", "--max_tokens"], {}, {"temperature": 0.0}),
    ],
)
def test_flags(arguments: list[str], engine: dict[str, Any], sampling: dict[str, Any]) -> None:
    assert parsed(arguments) == (engine, sampling)


def test_prompts_and_flags_may_be_mixed() -> None:
    parser = CommandParser(prog="sempre generate")
    parser.add_argument("prompts", nargs="*")
    add_engine_flags(parser)
    assert parser.parse(["a", "--seed", "1", "b"]).prompts == ["a", "b"]
    assert parser.parse(["a", "--seed", "1", "--", "--max_tokens", "-"]).prompts == ["a", "--max_tokens", "-"]
    with pytest.raises(UsageError, match="unexpected arguments: extra"):
        CommandParser(prog="sempre collect-env").parse(["--", "extra"])


def test_flags_that_help_leaves_out_are_not_suggested() -> None:
    with pytest.raises(UsageError, match=r"unknown flag --kv-cache-metricz. Did you mean --kv-cache-dtype\?"):
        parsed(["--kv-cache-metricz", "auto"])


def test_flags_must_be_written_out() -> None:
    with pytest.raises(UsageError, match=r"unknown flag --max-num-batched. Did you mean --max-num-batched-tokens\?"):
        parsed(["--max-num-batched", "64"])


def test_prompts_from_arguments_and_lines() -> None:
    assert prompts_from_arguments(["a", "-", "b"], ["one\n", "\n", "two"]) == [
        PromptRow(prompt=text) for text in ("a", "one", "two", "b")
    ]


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "é", "seed": 3, "cache_salt": "s"}\n\n'
        '{"prompt_token_ids": [1, 2], "priority": 2}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    first, second, third = prompts_from_file(str(path))
    assert first == PromptRow(prompt="é", cache_salt="s", sampling={"seed": 3}, where=f"{path}:1")
    assert (second.prompt_token_ids, second.priority, second.where) == ([1, 2], 2, f"{path}:3")
    assert third.messages == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON: "),
        ("5", "expected a JSON object, got 5."),
        ("{}", "expected exactly one of prompt, prompt_token_ids, messages, found none."),
        (
            '{"prompt": "a", "messages": []}',
            "expected exactly one of prompt, prompt_token_ids, messages, found prompt, messages.",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{line}\n')
    with pytest.raises(ConfigError) as caught:
        prompts_from_file(str(path))
    assert str(caught.value).startswith(f"{path}:2: {message}")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "a", "top_p": 2}', "top_p must be in [0, 1], got 2.0."),
        (
            '{"prompt": "a", "temprature": 1}',
            "SamplingParams has no parameter 'temprature'. Did you mean 'temperature'?",
        ),
        ('{"prompt": "a", "priority": "high"}', "priority must be an int, got 'high'."),
    ],
)
def test_bad_sampling_fields_of_a_row(tmp_path: Path, row: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row)
    result = sempre("generate", "--model", "tiny", "--input", str(path))
    assert (result.returncode, result.stderr) == (2, f"sempre: error: {path}:1: {message}\n")


def test_rows_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n{"prompt": "\xe9"}\n')
    with pytest.raises(ConfigError, match=f"{path}:2: not valid JSON: 'utf-8' codec can't decode byte 0xe9"):
        prompts_from_file(str(path))


def test_line_separators_inside_a_row_do_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert [row.prompt for row in prompts_from_file(str(path))] == ["a\u2028b"]


def test_prompts_are_utf8_whatever_the_locale() -> None:
    code = "from sempre.engine.cli.prompt_source import *; import sys; "
    code += "print(ascii(prompts_from_arguments(sys.argv[1:], [])[0].prompt))"
    environment = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, "-c", code, "Hé 你".encode()],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "'H\\xe9 \\u4f60'\n"


def test_pull_of_a_model_in_the_package_prints_its_folder() -> None:
    result = sempre("pull", "tiny")
    assert (result.returncode, result.stderr) == (0, "")
    assert (Path(result.stdout.strip()) / "config.json").is_file()


def test_variables_that_nothing_reads_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        "SEMPRE_CACH": "/x",
        "SEMPRE_MAX_MODEL_LEN": "5",
        "SEMPRE_PORT": "3",
        "SEMPRE_CACHE": "/x",
        "SEMPRE_SERVICE_HOST": "10.0.0.1",
        "OTHER": "1",
    }
    assert ignored_variables(environment) == [
        "the variable SEMPRE_CACH is not read. Did you mean SEMPRE_CACHE?",
        "the variable SEMPRE_MAX_MODEL_LEN is not read. Settings of the engine are not read from the environment: "
        "use --max-model-len.",
    ]
    result = sempre("pull", "tiny", environment={"SEMPRE_CACH": "/x"})
    assert result.returncode == 0
    assert "sempre: WARNING: the variable SEMPRE_CACH is not read. Did you mean SEMPRE_CACHE?" in result.stderr
