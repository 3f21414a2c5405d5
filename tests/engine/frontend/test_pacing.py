"""The engine gets a call of many sequences in parts; each is sent once, in order, and none is left out."""

from __future__ import annotations

import random

import pytest

from sempre.engine.frontend.pacing import Pace, Pacer
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.parsing.reasoning import PromptReasoning
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.text.absent_tokenizer import AbsentTokenizer
from sempre.ipc.messages import AddRequests, RequestOutputDelta, RequestSpec, SamplingSpec


def call(lengths: list[int], n: int = 1, name: str = "r") -> list[PreparedRequest]:
    """Requests with prompts of these lengths, of `n` sequences each."""
    made = []
    for place, length in enumerate(lengths):
        token_ids = [1] * length
        specs = [
            RequestSpec(
                request_id=f"{name}{place}_{i}",
                prompt_token_ids=token_ids,
                params=SamplingSpec(max_tokens=4),
                seed=i,
                ordinal=place * n + i,
            )
            for i in range(n)
        ]
        params = SamplingParams(n=n)
        reasoning = PromptReasoning(AbsentTokenizer(), token_ids)
        made.append(PreparedRequest(f"{name}{place}", None, token_ids, params, specs, list(range(n)), 0.0, reasoning))
    return made


class Engine:
    """What has been sent."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def send(self, command: AddRequests) -> None:
        self.names += [spec.request_id for spec in command.requests]


def begun(name: str) -> RequestOutputDelta:
    return RequestOutputDelta(request_id=name, token_ids=[1])


def ended(name: str) -> RequestOutputDelta:
    return RequestOutputDelta(request_id=name, finish_reason="stop")


def test_no_more_prompts_than_a_few_steps_hold() -> None:
    engine, pacer = Engine(), Pacer()
    pacer.start(call([100, 100, 100, 500, 10]), Pace(99, 200), engine.send)
    assert engine.names == ["r0_0", "r1_0"]
    pacer.note([RequestOutputDelta(request_id="r0_0")])  # a report of its prompt
    assert len(engine.names) == 2
    pacer.note([begun("r0_0")])
    assert engine.names[2:] == ["r2_0"]
    pacer.note([begun("r1_0"), begun("r0_0")])
    assert len(engine.names) == 3
    pacer.note([ended("r2_0")])
    assert engine.names[3:] == ["r3_0"]  # alone, and the shorter one does not overtake it
    pacer.note([begun("r3_0")])
    assert engine.names[4:] == ["r4_0"]


def test_no_more_sequences_than_their_share() -> None:
    engine, pacer = Engine(), Pacer()
    pacer.start(call([1], n=5), Pace(3, 10**6), engine.send)
    assert engine.names == ["r0_0", "r0_1", "r0_2"]
    pacer.note([begun("r0_0")])
    assert len(engine.names) == 3
    pacer.note([ended("r0_1")])
    assert engine.names[3:] == ["r0_3"]


def test_siblings_do_not_count_for_a_prompt_that_is_computed_once() -> None:
    engine, pacer = Engine(), Pacer()
    pacer.start(call([1000], n=10), Pace(99, 1200), engine.send)
    assert len(engine.names) == 10


def test_what_nobody_wants_is_never_sent() -> None:
    engine, pacer = Engine(), Pacer()
    pacer.start(call([1], n=6), Pace(2, 10**6), engine.send)
    pacer.drop(["r0_0", "r0_2", "r0_3"])
    assert engine.names == ["r0_0", "r0_1", "r0_4"]
    pacer.drop([f"r0_{i}" for i in range(6)])
    pacer.note([ended("r0_1")])
    assert len(engine.names) == 3


@pytest.mark.parametrize("seed", range(30))
def test_each_sequence_is_sent_once_and_in_order(seed: int) -> None:
    drawn = random.Random(seed)
    pacer = Pacer()
    pace = Pace(drawn.randint(1, 5), drawn.choice([1, 50, 10**6]))
    engines = [Engine(), Engine()]
    wanted = [
        call([drawn.randint(1, 80) for _ in range(drawn.randint(1, 9))], drawn.randint(1, 3), name) for name in "ab"
    ]
    running: list[str] = []
    seen = [0, 0]
    for engine, requests in zip(engines, wanted, strict=True):
        pacer.start(requests, pace, engine.send)
    for _ in range(1000):
        for place, engine in enumerate(engines):
            running += engine.names[seen[place] :]
            seen[place] = len(engine.names)
        if not running:
            break
        assert len([name for name in running if name.startswith("a")]) <= pace.max_sequences
        name = drawn.choice(running)
        if drawn.random() < 0.5:
            pacer.note([begun(name)])
        else:
            running.remove(name)
            pacer.note([ended(name)])
    for engine, requests in zip(engines, wanted, strict=True):
        assert engine.names == [spec.request_id for request in requests for spec in request.sequences]
