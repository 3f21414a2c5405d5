"""Many requests with random cancels against a server: nothing is lost, nothing stays, answers do not change."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from typing import Any

import httpx2
from server_process import ServerProcess

_PROMPTS = ["It is a truth", "The ship", "Once upon a time", "She was", "Of all the"]


@dataclass
class Tally:
    """How requests ended, and the answers of the probes."""

    finished: int = 0
    cancelled: int = 0
    lost: list[str] = field(default_factory=list)
    probes: list[Any] = field(default_factory=list)


PROBE: dict[str, Any] = {
    "prompt": "It was a dark",
    "max_tokens": 12,
    "seed": 11,
    "logprobs": 2,
    "return_token_ids": True,
}


def soak(server: ServerProcess, *, num_requests: int, concurrency: int, num_probes: int, seed: int) -> Tally:
    """Send `num_requests`, a quarter of them cancelled midway, with probes spread evenly among them."""
    tally = Tally()
    drawn = random.Random(seed)
    jobs = [_job(drawn) for _ in range(num_requests)]
    every = num_requests // num_probes
    asyncio.run(_run(server, list(enumerate(jobs)), every, concurrency, tally))
    return tally


def _job(drawn: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": drawn.choice(_PROMPTS), "max_tokens": drawn.randint(1, 24)}
    fields["n"] = drawn.choice([1, 1, 1, 2])
    fields["stream"] = drawn.random() < 0.5
    fields["stop"] = ["the"] if drawn.random() < 0.2 else None
    fields["cancel_after_s"] = drawn.random() * 0.3 if drawn.random() < 0.25 else None
    return fields


async def _run(
    server: ServerProcess, jobs: list[tuple[int, dict[str, Any]]], every: int, concurrency: int, tally: Tally
) -> None:
    limits = httpx2.Limits(max_connections=concurrency + 8, max_keepalive_connections=concurrency)
    async with httpx2.AsyncClient(base_url=server.url, timeout=120.0, limits=limits) as http:
        waiting = iter(jobs)

        async def work() -> None:
            for number, fields in waiting:
                if number % every == 0:
                    answer = await http.post("/v1/completions", json=PROBE)
                    tally.probes.append(answer.json()["choices"])
                await _one(http, dict(fields), tally)

        await asyncio.gather(*(work() for _ in range(concurrency)))


async def _one(http: httpx2.AsyncClient, fields: dict[str, Any], tally: Tally) -> None:
    cancel_after_s = fields.pop("cancel_after_s")
    request = asyncio.ensure_future(http.post("/v1/completions", json=fields))
    done, _ = await asyncio.wait([request], timeout=cancel_after_s)
    if not done:
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        tally.cancelled += 1
        return
    answer = request.result()
    if answer.status_code != 200 or not _is_whole(answer.text, fields):
        tally.lost.append(f"{fields}: {answer.status_code} {answer.text[-200:]}")
    else:
        tally.finished += 1


def _is_whole(text: str, fields: dict[str, Any]) -> bool:
    """Whether every choice of the answer has ended well."""
    if not fields["stream"]:
        reasons = [choice["finish_reason"] for choice in json.loads(text)["choices"]]
    else:
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
        if lines[-1] != "[DONE]":
            return False
        choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"] is not None]
    return len(reasons) == fields["n"] and set(reasons) <= {"stop", "length"}
