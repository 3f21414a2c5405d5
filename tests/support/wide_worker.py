"""A light worker whose log-probabilities take a megabyte for each token."""

from __future__ import annotations

from light_worker import LightWorker
from msgspec.structs import replace
from scripted_worker import run

from sempre.ipc.messages import ExecuteStep, StepResult

WIDTH = 1 << 17
ROW_BYTES = 8 * WIDTH


class WideWorker(LightWorker):
    """Row after row of the same entries."""

    def execute(self, command: ExecuteStep) -> StepResult:
        result = super().execute(command)
        sampled = [
            replace(one, logprobs=replace(one.logprobs, width=WIDTH, token_ids=ids * WIDTH, logprobs=values * WIDTH))
            for one in result.sampled
            if one.logprobs is not None
            for ids, values in [(one.logprobs.token_ids, one.logprobs.logprobs)]
        ]
        return replace(result, sampled=sampled)


if __name__ == "__main__":
    run(WideWorker)
