"""lm-eval's `local-completions` on a task in a local file; needs lm-eval[api], which is too large for every run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from server_process import ServerProcess

from sempre.engine import LLM
from sempre.engine.models import resolve_model

VARIABLE = "SEMPRE_LM_EVAL_PYTHON"
TASK = """\
task: local_endings
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DOCUMENTS = [
    {"query": "It is a truth", "choices": [" universally acknowledged", " banana zebra"], "gold": 0},
    {"query": "Once upon", "choices": [" a time", " xylophone"], "gold": 0},
    {"query": "The ship", "choices": [" qqq zzz", " was"], "gold": 1},
]


def test_local_completions(server: ServerProcess, tmp_path: Path) -> None:
    """Its accuracy is that of the log-probabilities which the Python interface gives."""
    python = os.environ.get(VARIABLE)
    if python is None:
        pytest.skip(f"{VARIABLE} does not name the python of an environment with lm-eval[api] and transformers")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    arguments = f"model=tiny,base_url={server.url}/v1/completions,num_concurrent=2"
    arguments += f",tokenizer_backend=huggingface,tokenizer={resolve_model('tiny').path}"
    command = [python, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "local_endings", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=220, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    [result] = (tmp_path / "out").rglob("results*.json")
    found = json.loads(result.read_text())["results"]["local_endings"]["acc,none"]
    assert found == _accuracy()


def _accuracy() -> float:
    right = 0
    with LLM("tiny", max_model_len=256, num_threads=1) as llm:
        tokenizer = llm.get_tokenizer()
        for document in DOCUMENTS:
            query, choices = str(document["query"]), list(document["choices"])  # type: ignore[call-overload]
            totals = []
            for choice in choices:
                [score] = llm.score(query + choice)
                totals.append(sum(x or 0.0 for x in score.logprobs[len(tokenizer.encode(query)) :]))
            right += totals.index(max(totals)) == document["gold"]
    return right / len(DOCUMENTS)
