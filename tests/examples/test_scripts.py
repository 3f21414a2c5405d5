"""Every script of examples/ runs as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_process import ServerProcess

FOLDER = Path(__file__).resolve().parents[2] / "examples"
OF_A_SERVER = {"agent_loop.py", "replay_answer.py"}
# run by tests/server/test_client_libraries.py
OF_OTHER_ENVIRONMENTS = {"client_libraries.py"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    flags = ("--max-num-seqs", "8", "--num-threads", "1")
    with ServerProcess(tmp_path_factory.mktemp("server") / "log", *flags) as server:
        yield server.url


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "SEMPRE_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    return done.stdout


def test_facts_have_the_form_of_the_schema() -> None:
    *facts, verdict = run("structured_extraction.py").splitlines()
    assert len(facts) == 2
    assert all('"kind": ' in line for line in facts)
    assert verdict == "alone and together: equal"


def test_a_batch_file_has_the_same_answers_in_each_run() -> None:
    first, _, third, verdict = run("batch_file.py").splitlines()
    assert first != third, "the same request again is another sample"
    assert verdict == "both runs: equal"


def test_an_answer_is_made_again_from_its_receipt(url: str) -> None:
    assert run("replay_answer.py", url).splitlines()[-1] == "1 output, 16 tokens: equal, bit for bit"


def test_a_loop_of_tool_calls_takes_the_same_steps(url: str) -> None:
    lines = run("agent_loop.py", url).splitlines()
    assert lines[1].startswith('assistant: departures({"harbour": ')
    assert lines[2].startswith("tool: ")
    assert lines[-1] == "both loops: equal"


def test_every_script_is_run_and_described() -> None:
    scripts = {path.name for path in FOLDER.glob("*.py")}
    assert scripts == OF_A_SERVER | OF_OTHER_ENVIRONMENTS | {"structured_extraction.py", "batch_file.py"}
    described = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in described for name in scripts)
