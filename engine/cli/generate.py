"""`sempre generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.answers import PlainDisplay, engine_pieces, show_answer
from sempre.engine.cli.arguments import (
    add_engine_flags,
    add_required_model_flag,
    add_sampling_flags,
    engine_keywords,
    sampling_keywords,
)
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.prompt_source import PromptRow, prompts_from_arguments, prompts_from_file
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.ipc.errors import ConfigError, RequestError
from sempre.ipc.log_lines import for_terminal, plain

if TYPE_CHECKING:
    from sempre.engine.llm import LLM
    from sempre.engine.outputs import CompletionOutput, Logprob, RequestOutput

# 16 tokens are the default of the Python interface; at a terminal people want to see more.
DEFAULT_MAX_TOKENS = 128


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="a prompt; - reads one per line of standard input")
    parser.add_argument("--input", metavar="FILE", help="JSONL file: prompt, prompt_token_ids or messages, and fields")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion, without any times")
    add_required_model_flag(parser)
    add_engine_flags(parser)
    add_sampling_flags(parser, defaults={"max_tokens": DEFAULT_MAX_TOKENS})


def run(namespace: argparse.Namespace) -> int:
    """Complete all prompts and print the completions in order; exit code 1 if one failed.

    At a terminal, the completion of a single prompt is printed as it arrives.
    """
    given = sampling_keywords(namespace)
    rows = _rows(namespace)
    # Find wrong values before loading a model.
    checked = SamplingParams(**_with_length(given))
    for row in rows:
        _with_row(checked, row.sampling, row)

    from sempre.engine.llm import LLM

    with LLM(namespace.model, **engine_keywords(namespace)) as llm:
        base = _base_params(llm, given)
        params = [_with_row(base, row.sampling, row) for row in rows]
        if len(rows) == params[0].n == 1 and sys.stdout.isatty() and not namespace.json:
            streamed = dataclasses.replace(params[0], output_kind=RequestOutputKind.DELTA)
            return int(show_answer(engine_pieces(llm, _prompt(llm, rows[0]), streamed), PlainDisplay()) is None)
        outputs = _generate(llm, rows, params)
        for index, output in enumerate(outputs):
            for completion in output.outputs:
                _print(index, output, completion, as_json=namespace.json, alone=len(outputs) == params[index].n == 1)
    return 1 if any(completion.error is not None for output in outputs for completion in output.outputs) else 0


def _rows(namespace: argparse.Namespace) -> list[PromptRow]:
    if namespace.input is not None:
        if namespace.prompts:
            raise UsageError("give prompts as arguments or with --input, not both")
        rows = prompts_from_file(namespace.input)
    else:
        from_pipe = not namespace.prompts and not sys.stdin.isatty()
        rows = prompts_from_arguments(["-"] if from_pipe else namespace.prompts, sys.stdin)
    if not rows:
        raise UsageError("no prompt: give one as an argument, on standard input, or with --input FILE")
    return rows


def _base_params(llm: LLM, given: dict[str, Any]) -> SamplingParams:
    defaults = llm.get_default_sampling_params()
    model_sets_length = defaults.max_tokens != SamplingParams().max_tokens
    return dataclasses.replace(defaults, **(given if model_sets_length else _with_length(given)))


def _with_length(given: dict[str, Any]) -> dict[str, Any]:
    return {"max_tokens": max(DEFAULT_MAX_TOKENS, given.get("min_tokens", 0)), **given}


def _with_row(base: SamplingParams, fields: dict[str, Any], row: PromptRow) -> SamplingParams:
    if not fields:
        return base
    try:
        return dataclasses.replace(base, **fields)
    except (ConfigError, TypeError) as error:
        where = f"{row.where}: " if row.where else ""
        raise ConfigError(f"{where}{error}", parameter=getattr(error, "parameter", None)) from None


def _generate(llm: LLM, rows: Sequence[PromptRow], params: list[SamplingParams]) -> list[RequestOutput]:
    prompts = [_prompt(llm, row) for row in rows]
    return llm.generate(prompts, params, use_tqdm=sys.stderr.isatty(), priority=[row.priority for row in rows])


def _prompt(llm: LLM, row: PromptRow) -> Any:
    salt = {} if row.cache_salt is None else {"cache_salt": row.cache_salt}
    if row.messages is not None:
        try:
            return {**llm.render_chat(row.messages), **salt}
        except RequestError as error:
            raise RequestError(f"{row.where}: {error}", parameter=error.parameter, value=error.value) from None
    if row.prompt is not None:
        return {"prompt": row.prompt, **salt}
    return {"prompt_token_ids": row.prompt_token_ids, **salt}


def _print(index: int, output: RequestOutput, completion: CompletionOutput, *, as_json: bool, alone: bool) -> None:
    if as_json:
        print(json.dumps(_record(index, output, completion), ensure_ascii=False))
        return
    if not alone:
        print(f"--- prompt {index}, completion {completion.index} ---")
    print(for_terminal(completion.text, sys.stdout))
    if completion.error is not None:
        print(f"sempre: error: prompt {index}: {plain(completion.error)}", file=sys.stderr)


def _record(index: int, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    """Return the record to print; it must be reproducible, so without times and cache hits."""
    prompt_logprobs = output.prompt_logprobs
    record: dict[str, Any] = {
        "index": index,
        "completion": completion.index,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "seed": completion.seed,
        "fingerprint": output.fingerprint,
        "logprobs": None if completion.logprobs is None else [_entries(row) for row in completion.logprobs],
        "cumulative_logprob": completion.cumulative_logprob,
    }
    if prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if row is None else _entries(row) for row in prompt_logprobs]
    if completion.error is not None:
        record["error"] = completion.error
    return record


def _entries(row: dict[int, Logprob]) -> list[dict[str, Any]]:
    """Return one position; a float32 is printed with all digits of its value as a double."""
    return [
        {
            "token_id": token_id,
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
        }
        for token_id, entry in row.items()
    ]
