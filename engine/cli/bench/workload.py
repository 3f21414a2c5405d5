"""Requests of random token ids, and the time they take."""

from __future__ import annotations

import random
import time

from sempre.engine.client import EngineClient
from sempre.ipc.error_info import restore
from sempre.ipc.errors import EngineDeadError, RequestError
from sempre.ipc.messages import AddRequests, OutputsReady, RequestSpec, SamplingSpec

_PATIENCE_S = 600.0


def random_requests(
    count: int, *, vocab_size: int, input_len: int, output_len: int, n: int, seed: int, first: int = 0
) -> list[RequestSpec]:
    """`count` prompts, each `n` times with another seed; ordinals from `first` on. The end of sequence is ignored."""
    generator = random.Random(f"{seed} {first}")
    specs: list[RequestSpec] = []
    for _ in range(count):
        prompt = [generator.randrange(vocab_size) for _ in range(input_len)]
        for _ in range(n):
            ordinal = first + len(specs)
            params = SamplingSpec(max_tokens=output_len)
            specs.append(
                RequestSpec(
                    request_id=str(ordinal), prompt_token_ids=prompt, params=params, seed=ordinal, ordinal=ordinal
                )
            )
    return specs


def seconds_for(client: EngineClient, requests: list[RequestSpec]) -> float:
    """Wall clock from sending all requests until the last has ended. Raises the error of one that fails."""
    began = time.perf_counter()
    client.send(AddRequests(requests=requests))
    unfinished = len(requests)
    while unfinished:
        event = client.receive(_PATIENCE_S)
        if event is None:
            raise EngineDeadError(f"{unfinished} requests have given nothing for {_PATIENCE_S:g} s")
        if isinstance(event, OutputsReady):
            for delta in event.outputs:
                if delta.error is not None:
                    raise restore(delta.error) or RequestError(delta.error.message, request_id=delta.request_id)
                unfinished -= delta.finish_reason is not None
    return time.perf_counter() - began


def percentiles(values: list[float]) -> dict[str, float]:
    """Of a sample, with linear interpolation between its points."""
    ordered = sorted(values)
    result = {}
    for percent in (10, 25, 50, 75, 90, 99):
        at = (len(ordered) - 1) * percent / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        result[str(percent)] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return result
