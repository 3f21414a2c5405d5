"""Outputs as a table: one row per completion, or per token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from sempre.ipc.errors import ConfigError

if TYPE_CHECKING:
    from sempre.engine.outputs import CompletionOutput, RequestOutput

Per = Literal["completion", "token"]


def to_frame(outputs: Sequence[RequestOutput], per: Per = "completion") -> Any:
    """Return a `pandas.DataFrame` of outputs, one row per completion or per token.

    Raises ConfigError without pandas, or for another `per`.
    """
    if per not in ("completion", "token"):
        raise ConfigError(f"per must be 'completion' or 'token', got {per!r}.", parameter="per", value=per)
    try:
        import pandas
    except ImportError:
        raise ConfigError("to_frame needs pandas, which is not installed: pip install pandas") from None
    return pandas.DataFrame(list(frame_rows(outputs, per)))


def frame_rows(outputs: Sequence[RequestOutput], per: Per) -> Iterator[dict[str, Any]]:
    """Yield the rows of the table, in the order of the outputs."""
    for output in outputs:
        for completion in output.outputs:
            if per == "completion":
                yield {**_keys(output, completion), **_completion(output, completion)}
            else:
                yield from ({**_keys(output, completion), **row} for row in _tokens(completion))


def _keys(output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    return {"request_id": output.request_id, "index": completion.index, "seed": completion.seed}


def _completion(output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    return {
        "prompt": output.prompt,
        "text": completion.text,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_tokens": len(completion.token_ids),
        "cumulative_logprob": completion.cumulative_logprob,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "error": completion.error,
        "fingerprint": output.fingerprint,
    }


def _tokens(completion: CompletionOutput) -> Iterator[dict[str, Any]]:
    for position, token_id in enumerate(completion.token_ids):
        entry = None if completion.logprobs is None else completion.logprobs[position].get(token_id)
        yield {
            "position": position,
            "token_id": token_id,
            "token": None if entry is None else entry.decoded_token,
            "logprob": None if entry is None else entry.logprob,
            "rank": None if entry is None else entry.rank,
        }
