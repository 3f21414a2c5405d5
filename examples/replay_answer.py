"""An answer of a running server, made again on an engine of one's own from the receipt that came with it.

sempre serve tiny --port 8000
python examples/replay_answer.py http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx


def main() -> int:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    body = {"prompt": "The ship", "max_tokens": 16, "temperature": 1.0, "logprobs": 1}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers={"X-Sempre-Receipt": "1"}, timeout=60.0)
    answer.raise_for_status()
    document = answer.json()
    print(repr(document["choices"][0]["text"]))
    with tempfile.TemporaryDirectory() as folder:
        receipts = Path(folder) / "receipts.jsonl"
        lines = [json.dumps(choice["receipt"]) for choice in document["choices"]]
        receipts.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return subprocess.run([sys.executable, "-m", "sempre.engine", "replay", str(receipts)]).returncode


if __name__ == "__main__":
    sys.exit(main())
