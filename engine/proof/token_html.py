"""Outputs as HTML for a notebook: tokens coloured by probability, with their numbers as a hint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from sempre.engine.proof.logprob_bits import float32_bits

if TYPE_CHECKING:
    from sempre.engine.outputs import CompletionOutput, Logprob, RequestOutput

# lower bounds of probability; the last class has no colour
_CLASSES = (0.1, 0.3, 0.6, 0.9)
TOKEN_CSS = """
.sempre{color-scheme:light dark;font:14px/1.5 system-ui,sans-serif;overflow-wrap:anywhere;max-width:60rem}
.sempre pre{white-space:pre-wrap;font:inherit;line-height:1.9;margin:.3em 0}
.sempre small{opacity:.75}
.sempre .t{border-radius:3px}
.sempre .p0{background:#e0533d66}.sempre .p1{background:#e08a2e55}
.sempre .p2{background:#d6c02e44}.sempre .p3{background:#7db24a33}
"""


def output_html(output: RequestOutput) -> str:
    """Return one output, with all its completions."""
    prompt = "" if output.prompt is None else f"<small>prompt</small><pre>{escape(output.prompt)}</pre>"
    parts = "".join(map(completion_html, output.outputs))
    foot = f"<small>fingerprint {escape(output.fingerprint)}</small>" if output.fingerprint else ""
    return f'<div class="sempre"><style>{TOKEN_CSS}</style>{prompt}{parts}{foot}</div>'


def completion_html(completion: CompletionOutput) -> str:
    """Return one completion; without log-probabilities its text has no colours."""
    end = completion.error or completion.finish_reason or "unfinished"
    head = f"<small>completion {completion.index}, seed {completion.seed}, {escape(end)}</small>"
    if completion.logprobs is None:
        return f"{head}<pre>{escape(completion.text)}</pre>"
    return f"{head}<pre>{''.join(_tokens(completion))}</pre>"


def _tokens(completion: CompletionOutput) -> Iterator[str]:
    for token_id, row in zip(completion.token_ids, completion.logprobs or (), strict=False):
        yield token_html(token_id, row.get(token_id))


def token_html(token_id: int, entry: Logprob | None, extra: str = "") -> str:
    """Return one token; `extra` is one more class."""
    if entry is None:
        return f'<span class="t {extra}">[{token_id}]</span>'
    text = f"[{token_id}]" if entry.decoded_token is None else entry.decoded_token
    probability = math.exp(min(entry.logprob, 0.0)) if entry.logprob == entry.logprob else 0.0
    level = sum(probability >= bound for bound in _CLASSES)
    hint = f"token {token_id}, logprob {entry.logprob!r} (0x{float32_bits(entry.logprob):08x}), rank {entry.rank}"
    return f'<span class="t p{level} {extra}" title="{escape(hint)}">{escape(text)}</span>'
