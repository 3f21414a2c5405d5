"""`sempre bisect`: where two settings or checkpoints first differ."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.arguments import add_engine_flags, engine_keywords, json_object
from sempre.engine.cli.exit_codes import EXIT_DIFFERENT, EXIT_OK
from sempre.engine.cli.parser import UsageError
from sempre.ipc.log_lines import plain

if TYPE_CHECKING:
    from sempre.engine.frontend.prompts import PromptType
    from sempre.engine.proof.bisection import Bisection
    from sempre.engine.sampling_params import SamplingParams

_PROMPT = "It was a dark and stormy night, and"
_MAX_TOKENS = 32
# both engines live at the same time
_KV_BYTES = "512MiB"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "sides",
        nargs="*",
        metavar="SIDE",
        help='two of: a model, or settings of the first model as a JSON object such as \'{"numerics": "control"}\'',
    )
    parser.add_argument("--prompt", metavar="TEXT", help=f"default: {_PROMPT!r}")
    parser.add_argument("--receipt", metavar="FILE:LINE", help="the prompt and parameters of this receipt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print the first difference of tokens and of operations; exit code 5 if there is one."""
    if len(namespace.sides) != 2:
        raise UsageError(f"expected two sides, found {len(namespace.sides)}. See sempre bisect --help.")
    sides = _sides(namespace.sides, engine_keywords(namespace))
    prompt, params = _request(namespace)
    from sempre.engine.llm import LLM
    from sempre.engine.proof.bisection import bisect

    with LLM(sides[0][0], **sides[0][1]) as a, LLM(sides[1][0], **sides[1][1]) as b:
        found = bisect(a, b, prompt, params)
    if namespace.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        _print(found)
    return EXIT_OK if found.is_equal else EXIT_DIFFERENT


def _sides(given: list[str], common: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the model and the keywords of either side. Raises UsageError."""
    base = {"multiprocessing": False, "kv_cache_memory_bytes": _KV_BYTES, "max_model_len": 512, **common}
    model = next((side for side in given if not side.startswith("{")), None)
    if model is None:
        raise UsageError("one of the sides must be a model")
    sides = []
    for side in given:
        try:
            settings = json_object(side) if side.startswith("{") else {}
        except argparse.ArgumentTypeError as error:
            raise UsageError(str(error)) from None
        sides.append((model if side.startswith("{") else side, {**base, **settings}))
    return sides


def _request(namespace: argparse.Namespace) -> tuple[PromptType, SamplingParams]:
    from dataclasses import replace

    from sempre.engine.sampling_params import SamplingParams

    if namespace.receipt is None:
        params = SamplingParams(temperature=0.0, max_tokens=_MAX_TOKENS, logprobs=0, ignore_eos=True)
        return _PROMPT if namespace.prompt is None else namespace.prompt, params
    if namespace.prompt is not None:
        raise UsageError("give --prompt or --receipt, not both")
    from sempre.engine.proof.receipt_log import Receipt, read_receipts
    from sempre.engine.proof.replay import prompt_of, sampling_params

    name, _, line = namespace.receipt.rpartition(":")
    if not name or not line.isdecimal():
        raise UsageError(f"--receipt must be FILE:LINE, for example receipts.jsonl:3, got {namespace.receipt!r}")
    for found in read_receipts(Path(name)):
        if isinstance(found, Receipt) and found.line == int(line):
            return {"prompt_token_ids": prompt_of(found)}, replace(sampling_params(found), logprobs=0)
    raise UsageError(f"{name} has no valid receipt in line {line}; sempre replay {name} says why")


def _print(found: Bisection) -> None:
    if found.is_equal:
        print(f"equal: the outputs, and {found.num_operations} results of modules")
    if found.token is not None:
        print(plain(f"first difference of the outputs: {found.token.sentence()}"))
    if found.operation is not None:
        print(plain(f"first operation that differs: {found.operation.sentence()}"))
    elif found.token is not None:
        print("no module differs: the difference is in what runs after the logits, or in the batch")
    for change in found.changed_parts:
        print(plain(f"the fingerprint differs: {change}"))
