"""A worker without a model: its next token is a pure function of the seed and of the tokens before it.

It seeds, digests, and keeps sequences as the real one does, so that everything around a worker can be tested in a
second. Started with `python -m scripted_worker`; used in-process as `ScriptedWorker()`.
`python -m light_worker` is the same without torch and numpy, and up at once.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from sempre.ipc.error_info import describe
from sempre.ipc.errors import ConfigError
from sempre.ipc.messages import (
    CallMethod,
    CallMethodReply,
    DraftRequest,
    ExecuteStep,
    LoadModel,
    LogprobRows,
    ModelLoaded,
    NewRequest,
    RngDigests,
    SampledTokens,
    SamplingSpec,
    ScheduledRequest,
    StartServing,
    StepCosts,
    StepResult,
    WorkerConfig,
    WorkerReady,
)

VOCAB_SIZE = 1000
_DEFAULT_MODEL_LEN = 4096
_DEFAULT_BATCHED_TOKENS = 2048
_DEFAULT_NUM_SEQS = 128
_DEFAULT_BLOCKS = 1024


@dataclass
class _Sequence:
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int
    params: SamplingSpec


class ScriptedWorker:
    """Implements the worker's interface. Ignores `load_format`."""

    def __init__(self) -> None:
        self._sequences: dict[str, _Sequence] = {}
        self._config: WorkerConfig | None = None
        self._step_seconds = float(os.environ.get("SEMPRE_TEST_STEP_SECONDS", "0"))
        self._results: deque[StepResult] = deque()

    def load_model(self, command: LoadModel) -> ModelLoaded:
        self._config = command.config
        return ModelLoaded(
            rank=command.config.rank,
            digests_before_load=self.seed(),
            vocab_size=VOCAB_SIZE,
            max_model_len=command.config.max_model_len or _DEFAULT_MODEL_LEN,
            kv_block_bytes=1,
            available_kv_blocks=command.config.kv_cache_memory_bytes or _DEFAULT_BLOCKS,
            costs=StepCosts(step=1e-3, row=0.0, result=0.0),
            fingerprint={"model": "scripted"},
            max_num_batched_tokens=command.config.max_num_batched_tokens or _DEFAULT_BATCHED_TOKENS,
            max_num_seqs=command.config.max_num_seqs or _DEFAULT_NUM_SEQS,
            phase_seconds={"compile_kernels": 0.25},
        )

    def start_serving(self, command: StartServing) -> WorkerReady:
        return WorkerReady(rank=self._settings.rank, digests_after_warm_up=self.seed())

    def seed(self) -> RngDigests:
        """Seed this process and digest its generators."""
        # brings in torch, whose generator is one of the three
        from sempre.workers.seeding import seed_everything

        seed_everything(self._settings.seed)
        return self.digests()

    def digests(self) -> RngDigests:
        from sempre.workers.seeding import rng_digests

        return rng_digests()

    @property
    def steps_in_flight(self) -> int:
        return len(self._results)

    def submit(self, command: ExecuteStep) -> None:
        self._results.append(self.execute(command))

    def step_done(self) -> bool:
        return True

    def collect(self) -> StepResult:
        return self._results.popleft()

    def execute(self, command: ExecuteStep) -> StepResult:
        time.sleep(self._step_seconds)
        for request_id in command.finished_request_ids:
            del self._sequences[request_id]
        for request in command.new_requests:
            self._sequences[request.request_id] = _sequence(request)
        sampled = [self._run(scheduled) for scheduled in command.scheduled]
        drafts = [self._draft(item) for item in command.drafts]
        return StepResult(rank=self._settings.rank, step_id=command.step_id, sampled=sampled, drafts=drafts)

    def call(self, command: CallMethod) -> CallMethodReply:
        methods = {
            "hold": self.hold,
            "ping": lambda: "pong",
            "repeat": self.repeat,
            "rng_digests": self.rng_digests,
            "slow": self.slow,
        }
        rank = self._settings.rank
        try:
            method = methods.get(command.method)
            if method is None:
                raise ConfigError(f"method: no worker method {command.method!r}", parameter="method")
            result = method(*command.args, **command.kwargs)  # type: ignore[operator]
        except Exception as error:  # goes to the caller
            return CallMethodReply(rank=rank, call_id=command.call_id, error=describe(error, rank))
        return CallMethodReply(rank=rank, call_id=command.call_id, result=result)

    def shutdown(self) -> None:
        self._sequences.clear()

    def rng_digests(self) -> dict[str, str]:
        digests: dict[str, str] = msgspec.structs.asdict(self.digests())
        return digests

    def slow(self, seconds: float) -> None:
        """Make every further step take this long."""
        self._step_seconds = seconds

    def hold(self, seconds: float) -> None:
        """Keep the interpreter's lock this long, as native code may: no other thread runs."""
        interval, end = sys.getswitchinterval(), time.monotonic() + seconds
        sys.setswitchinterval(2 * seconds)
        while time.monotonic() < end:
            pass
        sys.setswitchinterval(interval)

    def repeat(self, text: str, times: int) -> str:
        """A reply of any size."""
        return text * times

    @property
    def _settings(self) -> WorkerConfig:
        assert self._config is not None
        return self._config

    def _run(self, scheduled: ScheduledRequest) -> SampledTokens:
        sequence = self._sequences[scheduled.request_id]
        end = scheduled.num_computed_tokens + scheduled.num_tokens
        if end < len(sequence.token_ids):
            return SampledTokens(request_id=scheduled.request_id)
        tokens: list[int] = []
        for draft in [*scheduled.draft_token_ids, None]:
            tokens.append(next_token(sequence.seed, sequence.token_ids))
            sequence.token_ids.append(tokens[-1])
            if tokens[-1] != draft:
                break
        rows = _rows(tokens) if sequence.params.logprobs is not None else None
        return SampledTokens(request_id=scheduled.request_id, token_ids=tokens, logprobs=rows)

    def _draft(self, item: DraftRequest) -> list[int]:
        """Right, except for about every fourth token."""
        sequence = self._sequences[item.request_id]
        sequence.token_ids += item.token_ids
        token_ids = sequence.token_ids.copy()
        for _ in range(item.num_drafts):
            token = next_token(sequence.seed, token_ids)
            token_ids.append(token if token % 4 else (token + 1) % VOCAB_SIZE)
        return token_ids[len(sequence.token_ids) :]


def next_token(seed: int, token_ids: list[int]) -> int:
    """In [0, VOCAB_SIZE): from SHA-256 over the seed and the last 8 tokens with their position."""
    tail = token_ids[-8:]
    data = struct.pack(f"<QQ{len(tail)}I", seed, len(token_ids), *tail)
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "little") % VOCAB_SIZE


def _sequence(request: NewRequest) -> _Sequence:
    return _Sequence([*request.token_ids], request.num_prompt_tokens, request.seed, request.params)


def _rows(tokens: list[int]) -> LogprobRows:
    count = len(tokens)
    return LogprobRows(
        num_rows=count,
        width=1,
        token_ids=struct.pack(f"<{count}i", *tokens),
        logprobs=struct.pack(f"<{count}f", *(-token / VOCAB_SIZE for token in tokens)),
        ranks=struct.pack(f"<{count}i", *(token + 1 for token in tokens)),
    )


def run(make_worker: Callable[[], ScriptedWorker]) -> None:
    """The worker program around a scripted worker; ends the process."""
    from sempre.workers.main import main

    main(make_worker)


if __name__ == "__main__":
    run(ScriptedWorker)
