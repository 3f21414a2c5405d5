"""The commands of the README's section on receipts do what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from server_process import ServerProcess

from sempre.engine import load_outputs, save_outputs

README = Path(__file__).resolve().parents[2] / "README.md"


def commands() -> list[str]:
    """The commands without their comments."""
    section = README.read_text(encoding="utf-8").partition("## Keep, compare, replay\n")[2].partition("\n## ")[0]
    assert section.count("\n") <= 22
    [block] = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.join(shlex.split(line, comments=True)) for line in block.splitlines()]


def test_the_commands(tmp_path: Path) -> None:
    serve, replay, audit, compare, verify, bisect = commands()
    assert (serve, verify) == ("sempre serve tiny --record receipts", "sempre verify tiny")
    # it does not end by itself: test_receipts has it
    assert audit == "sempre replay receipts --url http://127.0.0.1:8000 --sample 1% --follow"
    environment = {**os.environ, "SEMPRE_NUM_THREADS": "1"}
    with ServerProcess(tmp_path / "log", "--record", str(tmp_path / "receipts"), "--num-threads", "1") as server:
        for seed in range(3):
            answer = server.complete(prompt="The ship", max_tokens=5, seed=seed, logprobs=1, return_token_ids=True)
            assert answer.status_code == 200
    script = (
        "from sempre import LLM, SamplingParams, save_outputs\n"
        "with LLM('tiny', num_threads=1) as llm:\n"
        "    params = [SamplingParams(max_tokens=5, seed=seed, logprobs=1) for seed in range(3)]\n"
        "    save_outputs(llm.generate(['The ship'] * 3, params, use_tqdm=False), 'monday.jsonl')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)

    def run(command: str) -> tuple[int, str]:
        words = [sys.executable, "-m", "sempre.engine", *shlex.split(command)[1:]]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        return done.returncode, done.stdout

    assert run(replay) == (0, "3 outputs, 15 tokens: equal, bit for bit\n")
    assert run(compare) == (0, "3 outputs, 15 tokens, 15 log-probabilities: equal, bit for bit\n")
    code, text = run(bisect)
    assert (code, "first operation that differs: model.layers.0." in text) == (5, True)
    # a changed file is noticed
    outputs = load_outputs(tmp_path / "monday.jsonl")
    outputs[1].outputs[0].token_ids[2] ^= 1
    save_outputs(outputs, tmp_path / "monday.jsonl")
    assert run(compare)[0] == 5


def test_the_section_names_every_command_of_its_kind() -> None:
    named = {command.split()[1] for command in commands()}
    assert named == {"serve", "replay", "compare", "verify", "bisect"}
