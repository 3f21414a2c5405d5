"""Workers that go wrong in one way each, started as a module; SEMPRE_TEST_ODDITY names the way.

Run by the tests of this folder in place of the real worker program.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import msgspec
from light_worker import LightWorker

from sempre.ipc.errors import TensorMismatch
from sempre.ipc.messages import (
    ExecuteStep,
    LoadModel,
    LogprobRows,
    ModelLoaded,
    SampledTokens,
    StartServing,
    StepResult,
    WorkerReady,
)
from sempre.workers.main import main

ODDITY = os.environ["SEMPRE_TEST_ODDITY"]


def _is_first() -> bool:
    """Whether no worker of this coordinator was here before."""
    mark = Path(tempfile.gettempdir()) / f"sempre-test-{os.getppid()}"
    try:
        mark.mkdir()
    except FileExistsError:
        mark.rmdir()
        return False
    return True


class OddWorker(LightWorker):
    def load_model(self, command: LoadModel) -> ModelLoaded:
        loaded = super().load_model(command)
        match ODDITY:
            case "tensor is missing":
                raise TensorMismatch("tensor w: expected [2], found none", tensor="w", expected="[2]", found="none")
            case "load crashes":
                raise KeyError("a bug")
            case "load exits" if command.config.rank == 1:
                print("the last line of a worker", flush=True)
                os._exit(3)
            case "loads slowly":
                time.sleep(0.3)
            case "never loads":
                time.sleep(60)
            case "draws before load" if command.config.rank == 1:
                random.random()
                return msgspec.structs.replace(loaded, digests_before_load=self.digests())
            case "other vocabulary" if command.config.rank == 1:
                return msgspec.structs.replace(loaded, vocab_size=7)
            case "other end" if command.config.rank == 1:
                return msgspec.structs.replace(loaded, eos_token_ids=[7])
            case "other fingerprint" if command.config.rank == 1:
                return msgspec.structs.replace(loaded, fingerprint={"torch": "7"})
            case "other block size" if command.config.rank == 1:
                return msgspec.structs.replace(loaded, kv_block_bytes=7)
            case "less memory" if command.config.rank == 1:
                return msgspec.structs.replace(loaded, available_kv_blocks=7, max_model_len=70, max_num_seqs=3)
            case "limits of its own":
                # that no two workers choose alike
                return msgspec.structs.replace(
                    loaded,
                    max_model_len=command.config.max_model_len or 10_000 + os.getpid(),
                    max_num_seqs=command.config.max_num_seqs or os.getpid(),
                )
        return loaded

    def start_serving(self, command: StartServing) -> WorkerReady:
        ready = super().start_serving(command)
        if ODDITY == "successor is seeded differently" and not _is_first():
            random.random()
            return msgspec.structs.replace(ready, digests_after_warm_up=self.digests())
        if ODDITY == "draws at warm-up" and self._settings.rank == 1:
            return msgspec.structs.replace(
                ready, digests_after_warm_up=msgspec.structs.replace(ready.digests_after_warm_up, torch_cpu="0")
            )
        return ready

    def execute(self, command: ExecuteStep) -> StepResult:
        if ODDITY == "dies of a request":
            self._die_of_it(command)
        if command.step_id == 3:
            match ODDITY:
                case "another token" if self._settings.rank == 1:
                    result = super().execute(command)
                    other = msgspec.structs.replace(result.sampled[-1], token_ids=[9])
                    return msgspec.structs.replace(result, sampled=[*result.sampled[:-1], other])
                case "another hidden state, once" if self._settings.rank == 1 and _is_first():
                    result = super().execute(command)
                    other = msgspec.structs.replace(result.sampled[0], hidden_digest=b"\1" * 8)
                    return msgspec.structs.replace(result, sampled=[other, *result.sampled[1:]])
                case "a result is left out" if self._settings.rank == 1:
                    result = super().execute(command)
                    return msgspec.structs.replace(result, sampled=result.sampled[:-1])
                case "step crashes":
                    raise ZeroDivisionError("in the middle of a step")
                case "step ends by a signal":
                    os.kill(os.getpid(), signal.SIGSEGV)
                case "step is answered out of turn":
                    return StepResult(rank=0, step_id=7)
                case "step is answered for others":
                    super().execute(command)
                    return StepResult(rank=0, step_id=3, sampled=[SampledTokens(request_id="nobody")])
                case "step has another rank":
                    return StepResult(rank=5, step_id=3)
                case "logprobs are too large":
                    result = super().execute(command)
                    rows = LogprobRows(num_rows=1, width=1, token_ids=b"", logprobs=b"\0" * 100_000, ranks=b"")
                    large = msgspec.structs.replace(result.sampled[0], logprobs=rows)
                    return msgspec.structs.replace(result, sampled=[large, *result.sampled[1:]])
                case "step is too large":
                    super().execute(command)
                    return StepResult(rank=0, step_id=3, sampled=[SampledTokens(request_id="x" * 100_000)])
        return super().execute(command)

    def _die_of_it(self, command: ExecuteStep) -> None:
        """At the fifth token of a request whose prompt begins with 13."""
        known = {new.request_id: new.token_ids for new in command.new_requests}
        known |= {name: sequence.token_ids for name, sequence in self._sequences.items()}
        for item in command.scheduled:
            if known[item.request_id][0] == 13 and item.num_computed_tokens + item.num_tokens == 6:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(OddWorker)
