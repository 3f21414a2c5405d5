"""`LLM` and `AsyncLLM`: the calls that put an engine to sleep, and wake it up."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from sempre.engine.frontend.session import SleepCommand, tags_asleep
from sempre.engine.parameter_checks import shown
from sempre.engine.weight_calls import AsyncWeightsLLM, WeightsLLM
from sempre.ipc.errors import RequestError
from sempre.ipc.messages import GetSleepState, SleepEngine, SleepMode, SleepReply, SleepTag, WakeEngine

TAGS: tuple[SleepTag, ...] = ("scheduling", "kv_cache", "weights")
MODES: tuple[SleepMode, ...] = ("abort", "wait", "keep")

_Make = Callable[[int], SleepCommand]


class SleepLLM(WeightsLLM):
    """Base class of `LLM`."""

    @abstractmethod
    def _change_sleep(self, make_command: _Make) -> list[SleepTag]:
        """Send the command of this number; return what the engine does without now. Raises its error."""

    def sleep(self, level: int = 1, mode: SleepMode = "abort") -> None:
        """Give back memory until `wake_up`; what is generated then has the same bits.

        Level 0 computes nothing and keeps all memory, level 1 gives back the KV cache, level 2 also the weights, which
        are read again from their files; both need workers on a CPU. A draft worker ends at both. `mode` is for requests
        of `enqueue` that are unfinished: `abort` ends them with finish_reason "abort", `wait` finishes them first,
        `keep` continues them after `wake_up`. Raises RequestError, ConfigError on a GPU.
        """
        self._change_sleep(_sleep(level, mode))

    def wake_up(self, tags: Sequence[SleepTag] | None = None) -> None:
        """Take back all memory and compute again, or only some of "weights", "kv_cache" and "scheduling".

        The KV cache needs the weights; with the last of both, scheduling goes on. Raises RequestError, ModelError if
        the files of the weights have changed meanwhile, and the errors of a start: then the engine sleeps on.
        """
        self._change_sleep(_wake_up(tags))

    def is_sleeping(self) -> bool:
        """Return whether the engine sleeps, at any level."""
        return bool(self._change_sleep(_state))


class AsyncSleepLLM(AsyncWeightsLLM):
    """Base class of `AsyncLLM`."""

    @abstractmethod
    async def abort(self, request_id: str) -> None:
        """End a request."""

    async def sleep(self, level: int = 1, mode: SleepMode = "abort") -> None:
        """Give back memory until `wake_up`, like `LLM.sleep`. Requests that come meanwhile wait."""
        await self._change_sleep(_sleep(level, mode), mode)

    async def wake_up(self, tags: Sequence[SleepTag] | None = None) -> None:
        """Take back memory, like `LLM.wake_up`."""
        await self._change_sleep(_wake_up(tags))

    async def is_sleeping(self) -> bool:
        """Return whether the engine sleeps, at any level."""
        return bool(await self._change_sleep(_state))

    async def pause_generation(
        self,
        *,
        mode: SleepMode = "abort",
        wait_for_inflight_requests: bool = False,
        clear_cache: bool = True,
    ) -> None:
        """Compute nothing until `resume_generation`; all memory stays. Requests that come meanwhile wait.

        `wait_for_inflight_requests` is vLLM's former way to say mode="wait". `clear_cache` empties the prefix cache,
        unless requests are kept. Raises RequestError.
        """
        if wait_for_inflight_requests:
            mode = "wait"
        await self._change_sleep(_sleep(0, mode, clear_cache=clear_cache), mode)

    async def resume_generation(self) -> None:
        """Compute again. Raises RequestError while memory is given back: `wake_up` takes it first."""
        await self._change_sleep(_wake_up(["scheduling"]))

    async def is_paused(self) -> bool:
        """Return whether nothing is computed, asleep or paused."""
        return "scheduling" in await self._change_sleep(_state)

    async def _change_sleep(self, make_command: _Make, mode: SleepMode | None = None) -> list[SleepTag]:
        await self._begun()
        if mode == "abort":
            for name in list(self._streams):
                await self.abort(name)
        elif mode is not None:
            # what came before belongs to what finishes or is kept, also where it waits here
            self._pacer.send_all()
        call_id = next(self._call_ids)
        return tags_asleep(await self._ask(make_command(call_id), call_id, SleepReply))


def _sleep(level: int, mode: SleepMode, *, clear_cache: bool = False) -> _Make:
    if type(level) is not int or not 0 <= level < len(TAGS):
        raise _refused("level", f"must be 0 (scheduling), 1 (and KV cache) or 2 (and weights), got {shown(level)}.")
    if mode not in MODES:
        raise _refused("mode", f"must be one of {', '.join(map(repr, MODES))}, got {shown(mode)}.")
    return partial(_sleep_command, tags=list(TAGS[: level + 1]), mode=mode, clear_cache=clear_cache)


def _sleep_command(call_id: int, *, tags: list[SleepTag], mode: SleepMode, clear_cache: bool) -> SleepEngine:
    return SleepEngine(call_id=call_id, tags=tags, mode=mode, clear_cache=clear_cache and mode != "keep")


def _wake_up(tags: Sequence[SleepTag] | None) -> _Make:
    if isinstance(tags, str) or (tags is not None and not tags):
        raise _refused("tags", f"must be a list of {', '.join(map(repr, TAGS))}, or None for all, got {shown(tags)}.")
    for tag in tags or ():
        if tag not in TAGS:
            raise _refused("tags", f"must be of {', '.join(map(repr, TAGS))}, got {shown(tag)}.")
    return lambda call_id: WakeEngine(call_id=call_id, tags=list(TAGS if tags is None else tags))


def _state(call_id: int) -> GetSleepState:
    return GetSleepState(call_id=call_id)


def _refused(parameter: str, text: str) -> RequestError:
    return RequestError(f"{parameter} {text}", parameter=parameter)
