"""An OpenAI batch file, answered twice: every run gives the same answers, also to requests without a seed.

python examples/batch_file.py [MODEL]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROMPTS = ["The ship", "It is a truth", "The ship"]


def answers(model: str, requests: Path, answered: Path) -> list[dict[str, Any]]:
    """The bodies of the answers, in the order of the lines."""
    command = [sys.executable, "-m", "sempre.engine", "run-batch", "--model", model]
    subprocess.run([*command, "-i", str(requests), "-o", str(answered)], check=True)
    lines = answered.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["response"]["body"] for line in lines]


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        requests = Path(folder) / "in.jsonl"
        bodies = [{"model": model, "prompt": prompt, "max_tokens": 16, "temperature": 1.0} for prompt in PROMPTS]
        lines = [
            {"custom_id": f"line-{i}", "method": "POST", "url": "/v1/completions", "body": body}
            for i, body in enumerate(bodies)
        ]
        requests.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
        runs = [answers(model, requests, Path(folder) / name) for name in ("one.jsonl", "two.jsonl")]
    said = [[(body["choices"][0]["text"], body["choices"][0]["seed"]) for body in run] for run in runs]
    for text, seed in said[0]:
        print(f"{text!r}, seed {seed}")
    print("both runs:", "equal" if said[0] == said[1] else "different")


if __name__ == "__main__":
    main()
