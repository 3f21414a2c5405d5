"""The progress bar of `LLM.generate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sempre.engine.outputs import RequestOutput

UseTqdm = bool | Callable[..., Any]
"""True, False, or what makes a bar, called as `tqdm` is."""


class GenerationProgress:
    """Counts finished sequences and estimates the speed."""

    def __init__(self, use_tqdm: UseTqdm, num_sequences: int) -> None:
        self._bar: Any = None
        self._num_input_tokens = 0
        self._num_output_tokens = 0
        if use_tqdm is False:
            return
        self._bar = (_tqdm() if use_tqdm is True else use_tqdm)(
            total=num_sequences, desc="Processed prompts", dynamic_ncols=True, postfix=_speeds(0.0, 0.0)
        )

    def finish(self, output: RequestOutput) -> None:
        """Count a request that has finished."""
        if self._bar is None:
            return
        self._num_input_tokens += len(output.prompt_token_ids) * len(output.outputs)
        self._num_output_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        elapsed = self._bar.format_dict["elapsed"]
        if elapsed > 0.0:
            self._bar.postfix = _speeds(self._num_input_tokens / elapsed, self._num_output_tokens / elapsed)
        self._bar.update(len(output.outputs))

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _tqdm() -> Callable[..., Any]:
    from tqdm import tqdm

    make: Callable[..., Any] = tqdm
    return make


def _speeds(input_speed: float, output_speed: float) -> str:
    return f"est. speed input: {input_speed:.2f} toks/s, output: {output_speed:.2f} toks/s"
