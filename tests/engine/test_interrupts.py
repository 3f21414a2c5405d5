"""Handlers of signals raise wherever the main thread is, and no frame, token or step is lost by that."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest
from surfaces import facts

from sempre.engine import LLM, RequestOutput, SamplingParams
from sempre.engine.client import interrupts

PARAMS = SamplingParams(temperature=1.0, seed=5, max_tokens=60, logprobs=1, ignore_eos=True)


@contextmanager
def handled_by(handler: Callable[..., None], *numbers: signal.Signals) -> Iterator[None]:
    before = [signal.signal(number, handler) for number in numbers]
    try:
        yield
    finally:
        for number, earlier in zip(numbers, before, strict=True):
            signal.signal(number, earlier)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_held_signals_are_handled_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def interrupted() -> None:
        with interrupts.held():
            interrupt()
            with interrupts.held():
                reached.append(1)
            reached.append(2)
        reached.append(3)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == [1, 2]
    assert signal.getsignal(signal.SIGINT) is before


def test_allowed_lets_them_in() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached = []

    def interrupted() -> None:
        with interrupts.held():
            reached.append(1)
            with interrupts.allowed():
                interrupt()
                reached.append(2)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_signals_stay_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.held():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


class OwnError(Exception):
    """What a handler of the user's raises."""


def raise_own(*_: object) -> None:
    raise OwnError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGALRM], ids=lambda number: number.name)
def test_a_stream_beside_an_interrupted_one_loses_nothing(number: signal.Signals, monkeypatch: Any) -> None:
    """The signal comes when a frame has just been received: once before each of many frames."""
    before = signal.signal(number, raise_own)
    try:
        with LLM("tiny", num_threads=1, max_model_len=256) as llm:
            [expected] = llm.generate(["It is a truth"], PARAMS, use_tqdm=False)
            channel = llm._session._client._link.channel  # type: ignore[attr-defined]
            receive, countdown = channel.receive, [0]

            def interrupted(timeout_s: float | None = None) -> Any:
                arrival = receive(timeout_s)
                countdown[0] -= arrival is not None
                if countdown[0] == 0 and arrival is not None:
                    os.kill(os.getpid(), number)
                    time.sleep(0)
                return arrival

            monkeypatch.setattr(channel, "receive", interrupted)
            for frames in (1, 2, 3, 5, 8, 13):
                stream = llm.stream("It is a truth", PARAMS)
                outputs: list[RequestOutput] = [next(stream)]
                countdown[0] = frames
                with pytest.raises(OwnError):
                    llm.generate(["Another one"] * 3, PARAMS, use_tqdm=False)
                outputs += stream
                assert facts(outputs[-1].outputs[0]) == facts(expected.outputs[0])
    finally:
        signal.signal(number, before)


@contextmanager
def alarm_after(seconds: float) -> Iterator[None]:
    """The interpreter drops what a handler raises in a weak reference's callback; the alarm then comes again."""
    before = sys.unraisablehook

    def look(dropped: Any) -> None:
        if isinstance(dropped.exc_value, OwnError):
            signal.setitimer(signal.ITIMER_REAL, seconds)
        else:
            before(dropped)

    sys.unraisablehook = look
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        sys.unraisablehook = before


def test_in_process_a_step_is_finished_before_it_is_interrupted() -> None:
    with LLM("tiny", num_threads=1, max_model_len=256, multiprocessing=False) as llm:
        [expected] = llm.generate(["It is a truth"], PARAMS, use_tqdm=False)
        before = signal.signal(signal.SIGALRM, raise_own)
        try:
            for seconds in (0.001, 0.004, 0.011, 0.025):
                stream = llm.stream("It is a truth", PARAMS)
                outputs = [next(stream)]
                with pytest.raises(OwnError), alarm_after(seconds):
                    llm.generate(["Another one"] * 50, PARAMS, use_tqdm=False)
                outputs += stream
                assert facts(outputs[-1].outputs[0]) == facts(expected.outputs[0])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def test_a_handler_that_raises_keeps_no_other_signal_waiting() -> None:
    numbers = (signal.SIGINT, signal.SIGALRM)
    came: list[int] = []

    def note_and_raise(number: int, *_: object) -> None:
        came.append(number)
        raise OwnError

    def interrupted() -> None:
        with interrupts.held():
            for number in numbers:
                os.kill(os.getpid(), number)

    with handled_by(note_and_raise, *numbers):
        with pytest.raises(OwnError):
            interrupted()
        assert sorted(came) == sorted(numbers)
        assert all(signal.getsignal(number) is note_and_raise for number in numbers)


def interrupted_at(raise_at: dict[int, signal.Signals], received: list[str]) -> int:
    """Receive a frame as `Session` does, with signals at these instructions of `interrupts`; return how many ran."""
    executed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal executed
        frame.f_trace_opcodes = frame.f_code.co_filename == interrupts.__file__
        if event == "opcode":
            executed += 1
            if executed - 1 in raise_at:
                signal.raise_signal(raise_at[executed - 1])
        return trace

    sys.settrace(trace)
    try:
        with interrupts.held():
            with interrupts.allowed():
                received.append("waited")
            received += ["frame", "taken"]
    finally:
        sys.settrace(None)
    return executed


def instants() -> list[dict[int, signal.Signals]]:
    number = interrupted_at({}, [])
    drawn = random.Random(0)
    single = [{index: signal.SIGALRM} for index in range(number)]
    pairs = [drawn.sample(range(number), 2) for _ in range(300)]
    return single + [{one: signal.SIGALRM, other: signal.SIGINT} for one, other in pairs]


def test_a_signal_at_any_instruction_leaves_nothing_behind() -> None:
    came: list[int] = []

    def note_and_raise(number: int, *_: object) -> None:
        came.append(number)
        raise OwnError

    with handled_by(note_and_raise, signal.SIGALRM, signal.SIGINT):
        for raise_at in instants():
            came.clear()
            received: list[str] = []
            with pytest.raises(OwnError):
                interrupted_at(raise_at, received)
            assert received in ([], ["waited"], ["waited", "frame", "taken"])
            if len(raise_at) == 1:
                assert came == [signal.SIGALRM]
            with suppress(OwnError), interrupts.held():
                pass
            assert 1 <= len(came) == len(set(came)) <= len(raise_at)
            assert signal.getsignal(signal.SIGALRM) is signal.getsignal(signal.SIGINT) is note_and_raise
            with pytest.raises(OwnError), interrupts.held():
                received.append(signal.raise_signal(signal.SIGALRM) or "held")
            assert received[-1] == "held"
