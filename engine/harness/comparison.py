"""Whether two settings of the engine give the same tokens and log-probabilities, bit for bit."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sempre.engine.arguments import engine_config
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness.cluster import Cluster
from sempre.engine.harness.generation import Generation, PositionLogprobs, generate
from sempre.ipc.messages import RequestSpec


@dataclass(frozen=True)
class Comparison:
    """`first_difference` names the request, the position and the two values; None if all are equal."""

    equal: bool
    first_difference: str | None = None


def compare_settings(
    a: Mapping[str, Any], b: Mapping[str, Any], requests: Sequence[RequestSpec], *, timeout_s: float = 120.0
) -> Comparison:
    """Run the requests once under each setting. `a` and `b` are keywords of Cluster, `model` among them.

    With `multiprocessing=False` the engine runs in this process and seeds its global generators.
    """
    return compare_generations(_run(a, requests, timeout_s), _run(b, requests, timeout_s))


def compare_generations(a: Sequence[Generation], b: Sequence[Generation]) -> Comparison:
    """Compare two runs of the same requests: tokens, log-probabilities of output and prompt, finish reasons."""
    if len(a) != len(b):
        return Comparison(False, f"{len(a)} results against {len(b)}")
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        difference = _difference(one, other)
        if difference is not None:
            return Comparison(False, f"request {index} ({one.request_id!r}), {difference}")
    return Comparison(True)


def _run(settings: Mapping[str, Any], requests: Sequence[RequestSpec], timeout_s: float) -> list[Generation]:
    if settings.get("multiprocessing", True):
        with Cluster(**settings) as cluster:
            return cluster.generate(requests, timeout_s=timeout_s)
    client = InprocClient.launch(engine_config(**settings))
    try:
        return generate(client, requests, timeout_s=timeout_s)
    finally:
        client.close()


def _difference(a: Generation, b: Generation) -> str | None:
    for position, (token, other) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if token != other:
            return f"output position {position}: token {token} against {other}"
        difference = _logprob_difference(a.logprobs, b.logprobs, position)
        if difference is not None:
            return f"output position {position}: {difference}"
    if len(a.token_ids) != len(b.token_ids):
        return f"output of {len(a.token_ids)} tokens against {len(b.token_ids)}"
    if len(a.logprobs) != len(b.logprobs) or len(a.prompt_logprobs) != len(b.prompt_logprobs):
        counts = [(len(run.logprobs), len(run.prompt_logprobs)) for run in (a, b)]
        return f"positions with log-probabilities (output, prompt): {counts[0]} against {counts[1]}"
    for position in range(len(a.prompt_logprobs)):
        difference = _logprob_difference(a.prompt_logprobs, b.prompt_logprobs, position)
        if difference is not None:
            return f"prompt position {position}: {difference}"
    ends = [(run.finish_reason, run.stop_reason) for run in (a, b)]
    return None if ends[0] == ends[1] else f"end {ends[0]} against {ends[1]}"


def _logprob_difference(a: Sequence[PositionLogprobs], b: Sequence[PositionLogprobs], position: int) -> str | None:
    if position >= min(len(a), len(b)) or a[position] == b[position]:
        return None
    one, other = a[position], b[position]
    if one.token_ids != other.token_ids or one.rank != other.rank:
        return f"log-probabilities of tokens {one.token_ids}, rank {one.rank}, against {other.token_ids}, {other.rank}"
    column = next(i for i, bits in enumerate(one.bits) if bits != other.bits[i])
    return f"logprob of token {one.token_ids[column]}: {_text(one.bits[column])} against {_text(other.bits[column])}"


def _text(bits: int) -> str:
    (value,) = struct.unpack("<f", struct.pack("<I", bits))
    return f"{value!r} (0x{bits:08x})"
