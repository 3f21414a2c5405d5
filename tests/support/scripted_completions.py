"""A server of /v1/completions whose tokens are digests of the request, with faults that break the guarantee."""

from __future__ import annotations

import hashlib
import threading
import time
from contextlib import ExitStack
from typing import Any, Self

from scripted_http import Answer, Scripted, as_json, events, refusal, scripted_server

_NUM_TOKENS = 6
# long enough for requests that are sent at once to overlap
_WORK_S = 0.02


class CompletionsServer:
    """`fault`: load (what runs at once matters), history (what came before matters), stream, no seed, no n."""

    def __init__(self) -> None:
        self.fault = ""
        self.logprobs_form = "completions"
        """completions, chat, or none"""
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._running = self._served = 0

    def __enter__(self) -> Self:
        self._record: Scripted = self._stack.enter_context(scripted_server(self._answer))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        return self._record.url

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return self._record.bodies

    def _answer(self, path: str, body: dict[str, Any]) -> Answer:
        assert path == "/v1/completions"
        if self.fault == "no n" and body.get("n", 1) > 1:
            return refusal("n must be 1", 400)
        with self._lock:
            self._running += 1
            self._served += 1
            running, served = self._running, self._served
        time.sleep(_WORK_S)
        with self._lock:
            running = max(running, self._running)
            self._running -= 1
        hidden = {"load": running, "history": served}.get(self.fault, 0)
        if self.fault == "stream" and body.get("stream"):
            hidden = 1
        choices = [self._choice(body, index, hidden) for index in range(body.get("n", 1))]
        whole = {"system_fingerprint": "fp", "choices": choices}
        if not body.get("stream"):
            return as_json(whole)
        return Answer(200, [events(whole)], {"Content-Type": "text/event-stream"})

    def _choice(self, body: dict[str, Any], index: int, hidden: int) -> dict[str, Any]:
        seed = 0 if not body["temperature"] or self.fault == "no seed" else body["seed"] + index
        start = f"{body['prompt']} {body['temperature']} {seed} {hidden}"
        digests = [hashlib.sha256(f"{start} {i}".encode()).digest() for i in range(_NUM_TOKENS)]
        tokens = [f" {digest[0]}" for digest in digests]
        values = [-digest[1] / 256 for digest in digests]
        choice: dict[str, Any] = {"index": index, "text": "".join(tokens), "finish_reason": "length"}
        if "logprobs" in body and self.logprobs_form == "completions":
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        elif "logprobs" in body and self.logprobs_form == "chat":
            entries = zip(tokens, values, strict=True)
            choice["logprobs"] = {"content": [{"token": token, "logprob": value} for token, value in entries]}
        return choice
