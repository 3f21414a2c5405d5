"""`sempre fingerprint`."""

from __future__ import annotations

import argparse
import json

from sempre.engine.cli.arguments import add_engine_flags, engine_keywords


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("model", metavar="MODEL", help="name (tiny, smollm2-135m), folder, or hub id")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Start an engine, which alone knows all parts, and print the digest and the parts."""
    from sempre.engine.llm import LLM

    with LLM(namespace.model, **engine_keywords(namespace)) as llm:
        digest, parts = llm.fingerprint, llm.fingerprint_parts
    if namespace.json:
        print(json.dumps({"fingerprint": digest, "parts": parts}, ensure_ascii=False))
        return 0
    print(digest)
    width = max(map(len, parts))
    for name, value in parts.items():
        print(f"  {name:<{width}}  {value}")
    return 0
