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
_TRANSFORMERS = "transformers"
# both engines live at the same time
_KV_BYTES = "512MiB"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "sides",
        nargs="*",
        metavar="SIDE",
        help='two of: a model, settings of the first model as a JSON object such as \'{"numerics": "control"}\', or'
        " transformers (transformers:FOLDER for another checkpoint), whose modules are compared",
    )
    parser.add_argument("--prompt", metavar="TEXT", help=f"default: {_PROMPT!r}")
    parser.add_argument("--receipt", metavar="FILE:LINE", help="the prompt and parameters of this receipt")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print the first difference of tokens and of operations; exit code 5 if there is one."""
    if len(namespace.sides) != 2:
        raise UsageError(f"expected two sides, found {len(namespace.sides)}. See sempre bisect --help.")
    if any(side.partition(":")[0] == _TRANSFORMERS for side in namespace.sides):
        return _run_reference(namespace)
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


def _run_reference(namespace: argparse.Namespace) -> int:
    """Compare the modules of one engine with those of transformers; exit code 5 if one is far away."""
    references = [side for side in namespace.sides if side.partition(":")[0] == _TRANSFORMERS]
    own = [side for side in namespace.sides if side not in references]
    if len(own) != 1 or own[0].startswith("{"):
        raise UsageError(f"one of the sides must be a model, the other {_TRANSFORMERS} or {_TRANSFORMERS}:FOLDER")
    [(model, keywords)] = _sides(own, engine_keywords(namespace))
    prompt, params = _request(namespace)
    from sempre.engine.llm import LLM
    from sempre.engine.proof.reference_comparison import compare_with_transformers

    with LLM(model, **keywords) as llm:
        folder = Path(references[0].partition(":")[2] or llm.model_folder)
        found = compare_with_transformers(llm, folder, prompt, params)
    if namespace.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        print(f"{len(found.operations)} results of modules compared, {found.num_skipped} that the reference lacks")
        first, far = found.first_differing, found.first_far
        print(plain(f"first with other bits: {'none' if first is None else first.sentence()}"))
        print(plain(f"furthest: {found.furthest.sentence()}"))
        print(plain(f"first beyond {found.far:g}: {'none' if far is None else far.sentence()}"))
    return EXIT_OK if found.first_far is None else EXIT_DIFFERENT


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
