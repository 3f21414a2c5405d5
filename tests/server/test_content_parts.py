"""A message's content may be text alone: every other kind of part that OpenAI and vLLM know is a 400 that names it."""

from __future__ import annotations

from typing import Any

import pytest
from server_process import ServerProcess

TEXT = {"type": "text", "text": "What is this?"}
PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
    {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
    {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    {"type": "file", "file": {"file_id": "file-1"}},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": "AAAA"}},
    {"type": "input_image", "image_url": "data:image/png;base64,AAAA"},
    {"type": "input_file", "file_id": "file-1"},
    {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
    {"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,AAAA"}},
    {"type": "image_embeds", "image_embeds": "AAAA"},
    {"type": "image_pil", "image_pil": None},
]


@pytest.mark.parametrize("part", PARTS, ids=lambda part: "-".join(str(value)[:20] for value in part))
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_parts_that_are_not_text(server: ServerProcess, role: str, part: dict[str, Any]) -> None:
    message = {"role": role, "content": [TEXT, part], "tool_call_id": "a"}
    response = server.http.post("/v1/chat/completions", json={"messages": [message], "max_completion_tokens": 1})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages[0].content[1]"), error
    assert f"got type {part['type']!r}; only text can be given" in error["message"]


@pytest.mark.parametrize(
    "part",
    [
        TEXT,
        {"type": "input_text", "text": "a"},
        {"type": "output_text", "text": "a"},
        {"type": "refusal", "refusal": "a"},
    ],
    ids=lambda part: part["type"],
)
def test_parts_of_text(server: ServerProcess, part: dict[str, str]) -> None:
    body = {"messages": [{"role": "user", "content": [part]}], "max_completion_tokens": 1}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 200


def test_messages_to_be_tokenized(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": [PARTS[0]]}]}
    response = server.http.post("/tokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages[0].content[0]")
