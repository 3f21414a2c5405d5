"""The curl commands of the README, and of the page on serving, do what they say."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "examples" / "serving.md")


def test_curl_examples(server: ServerProcess) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    block = "".join(block for block in blocks if block.startswith("curl"))
    commands = [line for line in block.replace("\\\n", "").splitlines() if line]
    answers = []
    for command in commands:
        here = command.replace("http://localhost:8000", server.url).replace("curl ", "curl --fail-with-body ", 1)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        answers.append(done.stdout)
    completion, chat, tokens, health, response, message = answers
    assert '"seed":7' in completion
    assert chat.endswith("data: [DONE]\n\n")
    assert '"tokens":[' in tokens
    assert '"healthy"' in health
    assert '"object":"response"' in response
    assert '"type":"message"' in message
