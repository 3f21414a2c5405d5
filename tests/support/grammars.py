"""Grammars over the tokenizer of the embedded model, for tests of the sampler."""

from __future__ import annotations

from pathlib import Path

from sempre.workers.sampling import GrammarCompiler

TINY = Path(__file__).parents[2] / "engine" / "checkpoints" / "tiny"
VOCABULARY = 4096
EOS = [0, 2]

LETTERS = '{"grammars": [{"lark_grammar": "start: /[a-m]{2,9}/"}]}'
OBJECT = '{"grammars": [{"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]}'


def compiler() -> GrammarCompiler:
    return GrammarCompiler(TINY, VOCABULARY)
