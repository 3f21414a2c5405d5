"""`sempre fingerprint`."""

from __future__ import annotations

import argparse
import json

from sempre.engine.cli.arguments import add_engine_flags, add_model_flag, engine_keywords, model_of
from sempre.engine.cli.parser import UsageError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="the same as --model MODEL")
    add_model_flag(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Start an engine, since only it knows all parts, and print the digest and the parts."""
    given: list[str] = namespace.models
    surplus = given[1:] if namespace.model is None else given
    if surplus:
        raise UsageError(f"unexpected arguments: {' '.join(surplus)}. See sempre fingerprint --help.")
    model = given[0] if given else model_of(namespace)

    from sempre.engine.llm import LLM

    with LLM(model, **engine_keywords(namespace)) as llm:
        digest, parts, environment = llm.fingerprint, llm.fingerprint_parts, llm.fingerprint_environment
    if namespace.json:
        found = {"fingerprint": digest, "parts": parts, "environment": environment}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(digest)
    width = max(map(len, [*parts, *environment]))
    for name, value in parts.items():
        print(f"  {name:<{width}}  {value}")
    print("without effect on any bit:")
    for name, value in environment.items():
        print(f"  {name:<{width}}  {value}")
    return 0
