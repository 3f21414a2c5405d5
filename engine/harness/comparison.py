"""Whether two settings of the engine give the same tokens and log-probabilities, bit for bit, and if not, where their
computations part."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, NamedTuple

from sempre.engine.arguments import engine_config
from sempre.engine.client import EngineClient
from sempre.engine.client.inproc import InprocClient
from sempre.engine.harness.cluster import Cluster
from sempre.engine.harness.generation import Generation, PositionLogprobs, generate
from sempre.engine.harness.questions import Questions
from sempre.engine.proof.traces import OperationDifference, Tracer, compare_operations
from sempre.ipc.config import EngineConfig
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import RequestSpec


@dataclass(frozen=True)
class Comparison:
    """What two runs of the same requests differ in; as a string, in words."""

    equal: bool
    first_difference: str | None = None
    """the request, the position and the two values; None if all are equal"""
    operation: OperationDifference | None = None
    """the first result of a module that differs, for the tokens up to there; None also where no module differs"""
    num_operations: int = 0
    """results of modules that were compared for it"""
    not_traced: str = ""
    """why the modules could not be compared"""

    def __str__(self) -> str:
        if self.first_difference is None:
            return "equal"
        words = self.first_difference
        if self.operation is not None:
            words += f"\nfirst operation that differs: {self.operation.sentence()}"
        elif self.not_traced:
            words += f"\nmodules were not compared: {self.not_traced}"
        elif self.num_operations:
            words += f"\n{self.num_operations} results of modules are equal: the difference is in what runs after them"
        return words


class _Place(NamedTuple):
    """The first difference of two runs."""

    request: int
    num_tokens: int
    """of the output, which both runs have in common before it"""
    text: str


class _Engine(NamedTuple):
    client: EngineClient
    config: EngineConfig


def compare_settings(
    a: Mapping[str, Any], b: Mapping[str, Any], requests: Sequence[RequestSpec], *, timeout_s: float = 120.0
) -> Comparison:
    """Run the requests once under each setting. `a` and `b` are keywords of Cluster, `model` among them.

    Both engines live at the same time. With `multiprocessing=False` an engine runs in this process and seeds its global
    generators. After a difference both compute the tokens up to there once more, and the results of all modules are
    compared, in the order of computing.
    """
    with _running(a) as one, _running(b) as other:
        runs = [generate(engine.client, requests, timeout_s=timeout_s) for engine in (one, other)]
        place = _first_place(*runs)
        found = compare_generations(*runs)
        if place is None:
            return found
        if requests[place.request].adapter is not None:
            return replace(found, not_traced="the request has an adapter")
        output = runs[0][place.request].token_ids[: place.num_tokens]
        token_ids = [*requests[place.request].prompt_token_ids, *output]
        try:
            compared = compare_operations(_tracer(one), _tracer(other), token_ids)
        except ConfigError as error:
            return replace(found, not_traced=str(error))
    return replace(found, operation=compared.difference, num_operations=compared.num_operations)


def compare_generations(a: Sequence[Generation], b: Sequence[Generation]) -> Comparison:
    """Compare two runs of the same requests: tokens, log-probabilities of output and prompt, finish reasons."""
    if len(a) != len(b):
        return Comparison(False, f"{len(a)} results against {len(b)}")
    place = _first_place(a, b)
    if place is None:
        return Comparison(True)
    return Comparison(False, f"request {place.request} ({a[place.request].request_id!r}), {place.text}")


@contextmanager
def _running(settings: Mapping[str, Any]) -> Iterator[_Engine]:
    if settings.get("multiprocessing", True):
        with Cluster(**settings) as cluster:
            yield _Engine(cluster.client, cluster.config)
        return
    config = engine_config(**settings)
    client = InprocClient.launch(config)
    try:
        yield _Engine(client, config)
    finally:
        client.close()


def _tracer(engine: _Engine) -> Tracer:
    questions, config = Questions(engine.client), engine.config
    return Tracer(
        lambda method, arguments: questions.call(method, *arguments),
        config.tensor_parallel_size,
        config.pipeline_parallel_size,
    )


def _first_place(a: Sequence[Generation], b: Sequence[Generation]) -> _Place | None:
    for request, (one, other) in enumerate(zip(a, b, strict=True)):
        if (found := _difference(one, other)) is not None:
            return _Place(request, *found)
    return None


def _difference(a: Generation, b: Generation) -> tuple[int, str] | None:
    """The number of output tokens before the first difference, and what it is."""
    for position, (token, other) in enumerate(zip(a.token_ids, b.token_ids, strict=False)):
        if token != other:
            return position, f"output position {position}: token {token} against {other}"
        difference = _logprob_difference(a.logprobs, b.logprobs, position)
        if difference is not None:
            return position, f"output position {position}: {difference}"
    count = min(len(a.token_ids), len(b.token_ids))
    if len(a.token_ids) != len(b.token_ids):
        return count, f"output of {len(a.token_ids)} tokens against {len(b.token_ids)}"
    if len(a.logprobs) != len(b.logprobs) or len(a.prompt_logprobs) != len(b.prompt_logprobs):
        counts = [(len(run.logprobs), len(run.prompt_logprobs)) for run in (a, b)]
        return count, f"positions with log-probabilities (output, prompt): {counts[0]} against {counts[1]}"
    for position in range(len(a.prompt_logprobs)):
        difference = _logprob_difference(a.prompt_logprobs, b.prompt_logprobs, position)
        if difference is not None:
            return 0, f"prompt position {position}: {difference}"
    if a.candidate_bits != b.candidate_bits:
        pairs = enumerate(zip_longest(a.candidate_bits, b.candidate_bits))
        place, (one, two) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
        values = ["none" if bits is None else _text(bits) for bits in (one, two)]
        return 0, f"log-probability {place} of the prompt's candidates: {values[0]} against {values[1]}"
    ends = [(run.finish_reason, run.stop_reason) for run in (a, b)]
    return None if ends[0] == ends[1] else (count, f"end {ends[0]} against {ends[1]}")


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
