"""The command line with an engine on the embedded model."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from sempre.engine import LLM, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.version import __version__

COMMON = ["--model", "tiny", "--max-model-len", "256", "--num-threads", "1"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sempre.engine", *arguments]


def sempre(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    return subprocess.run(
        command(*arguments), input=stdin, env=environment, capture_output=True, encoding="utf-8", timeout=120
    )


def records(*arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    result = sempre("generate", *COMMON, "--json", *arguments, stdin=stdin)
    assert (result.returncode, result.stderr) == (0, "")
    return [json.loads(line) for line in result.stdout.splitlines()]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints when all of it runs in this process."""
    assert main([*arguments, "--no-multiprocessing"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_alone_and_with_others_print_the_same_json(capsys: pytest.CaptureFixture[str]) -> None:
    generate = ["generate", *COMMON, "--json", "--max-tokens", "12", "--logprobs", "3", "--ignore-eos"]
    alone = printed(capsys, *generate, "It is a truth").splitlines()
    others = [f"Chapter {i}. It was the best of times, it was the worst of times" for i in range(31)]
    company = printed(capsys, *generate, "--max-num-batched-tokens", "64", "It is a truth", *others).splitlines()
    assert (len(alone), len(company)) == (1, 32)
    assert company[:1] == alone


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "It is a truth", "seed": 5, "n": 2, "logprobs": 1},
        {"prompt_token_ids": [5, 6, 7], "prompt_logprobs": 0, "temperature": 0, "max_tokens": 2},
        {"messages": [{"role": "user", "content": "Ça va ?"}], "max_tokens": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second, third, fourth = records("--input", str(path), "--max-tokens", "4", "--ignore-eos")
    assert [(row["index"], row["completion"], row["seed"]) for row in (first, second)] == [(0, 0, 5), (0, 1, 6)]
    assert first["fingerprint"] == fourth["fingerprint"] != ""
    assert [entries[0]["token_id"] for entries in first["logprobs"]] == first["token_ids"]
    assert set(first["logprobs"][0][0]) == {"token_id", "logprob", "rank", "decoded_token"}
    assert (third["prompt"], third["prompt_token_ids"], len(third["token_ids"])) == (None, [5, 6, 7], 2)
    assert [row is None for row in third["prompt_logprobs"]] == [True, False, False]
    assert fourth["prompt"] == "<|im_start|>user\nÇa va ?<|im_end|>\n<|im_start|>assistant\n"
    assert (first["finish_reason"], first["stop_reason"], first["logprobs"] is None) == ("length", None, False)
    assert set(fourth) == {
        "index",
        "completion",
        "prompt",
        "prompt_token_ids",
        "text",
        "token_ids",
        "finish_reason",
        "stop_reason",
        "seed",
        "fingerprint",
        "logprobs",
        "cumulative_logprob",
    }


def test_text_from_standard_input_is_the_json_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = ["--max-tokens", "4", "--sampling-seed", "5"]
    prompts = ["It is a truth", "The whale"]
    expected = [record["text"] for record in records(*sampling, *prompts)]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(prompts).encode())))
    blocks = [f"--- prompt {i}, completion 0 ---\n{text}\n" for i, text in enumerate(expected)]
    assert printed(capsys, "generate", *COMMON, *sampling) == "".join(blocks)


def test_chat() -> None:
    lines = ["Hello", "/nothing", "And you?", "/reset", "Hello", "/exit", "unread"]
    sampling = ["--temperature", "0", "--max-tokens", "5", "--ignore-eos"]
    result = sempre("chat", *COMMON, *sampling, "--system", "Be brief.", stdin="\n".join(lines))
    assert result.returncode == 0
    assert result.stderr == "unknown command /nothing. /help shows all.\n"
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with LLM("tiny", max_model_len=256, num_threads=1) as llm:
        first = llm.chat(conversation, params, use_tqdm=False)[0].outputs[0].text
        conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "And you?"}]
        second = llm.chat(conversation, params, use_tqdm=False)[0].outputs[0].text
    assert result.stdout == f"{first}\n{second}\n{first}\n"


def test_fingerprint(capsys: pytest.CaptureFixture[str]) -> None:
    result = sempre("fingerprint", "tiny", "--json", "--num-threads", "1")
    assert (result.returncode, result.stderr) == (0, "")
    found = json.loads(result.stdout)
    assert len(found["fingerprint"]) == 16
    assert set(found["parts"]) >= {"weights", "dtype", "numerics", "architecture", "torch"}
    assert found["environment"]["threads"] == "1"
    assert found["environment"]["engine"] == __version__
    text = printed(capsys, "fingerprint", "tiny", "--num-threads", "1").splitlines()
    assert text[0] == found["fingerprint"]
    facts = [line.split()[0] for line in text[1:] if line.startswith("  ")]
    assert facts == [*found["parts"], *found["environment"]]


def test_interrupts_of_a_chat() -> None:
    process = subprocess.Popen(
        command("chat", "--model", "tiny", "--num-threads", "1", "--ignore-eos", "--temperature", "0"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # As from a terminal, an interrupt goes to the whole group: coordinator and workers get it, too.
        start_new_session=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("Hello\n")
        process.stdin.flush()
        answer = process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        while not answer.endswith(" [stopped]\n"):
            character = process.stdout.read(1)
            assert character, f"the answer was not stopped: {process.stderr.read()}"
            answer += character
        # The engine lives on, and answers again.
        process.stdin.write("/reset\nHello\n")
        process.stdin.flush()
        again = process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        while not again.endswith(" [stopped]\n"):
            character = process.stdout.read(1)
            assert character, f"the second answer was not stopped: {process.stderr.read()}"
            again += character
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert answer[0] == again[0]
    assert (process.returncode, errors) == (130, "sempre: interrupted\n")


def test_one_prompt_at_a_terminal_streams_and_ends_with_what_reproduces_it() -> None:
    flags = ["--max-tokens", "12", "--sampling-seed", "5", "--ignore-eos"]
    [record] = records(*flags, "The ship")
    process = pexpect.spawn(sys.executable, command("generate", *COMMON, *flags, "The ship")[1:], timeout=120)
    process.expect(pexpect.EOF)
    process.close()
    assert process.exitstatus == 0
    shown = process.before.decode().replace("\r\n", "\n")
    facts = rf"\[seed 5, fingerprint {record['fingerprint']}, 12 tokens, [\d,.]+ tokens/s\]\n"
    assert re.fullmatch(r"(?s).*" + re.escape(record["text"] + "\n") + facts, shown)
