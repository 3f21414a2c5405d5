"""The benchmark of reinforcement learning, a few steps of it: engine and trainer report the same at every step."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "rl_on_policy.py"
ARGUMENTS = ["--steps", "2", "--samples", "2", "--max-tokens", "8", "--in-process", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK), run_name="rl_on_policy")


def test_no_step_has_a_difference(benchmark: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    benchmark["main"](ARGUMENTS)
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["largest_difference"], report["largest_ratio_error"]) == (0.0, 0.0)
    assert report["num_logprobs"] > 50
    assert report["num_cached_tokens"] > 0


def test_a_trainer_that_is_a_step_behind_is_noticed(
    benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine keeps its first weights: from the second step on there is a difference."""
    monkeypatch.setattr(benchmark["LLM"], "update_weights", lambda *values: None)
    assert benchmark["main"](ARGUMENTS) == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["largest_difference"] > 0
    assert report["largest_ratio_error"] > 0


def test_reward_is_of_letters_alone(benchmark: dict[str, Any]) -> None:
    assert [benchmark["reward"](text) for text in ("", "Ee!", "be 12", "xyz")] == [0.0, 1.0, 0.5, 0.0]
    assert torch.is_grad_enabled()
