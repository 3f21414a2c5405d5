"""The comparison of two runs as one HTML file that loads nothing, for light and dark, narrow and wide screens."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from statistics import median

from sempre.engine.proof.kept_output import KeptOutput
from sempre.engine.proof.run_comparison import Pair, RunComparison, num_by_position, shortened
from sempre.engine.version import __version__

_MOST_PAIRS = 50
_TOKENS_BEFORE, _TOKENS_AFTER = 24, 8
_CSS = """
:root{color-scheme:light dark;--ground:light-dark(#f6f6fa,#14141c);--card:light-dark(#fff,#1e1e2a);
--ink:light-dark(#1b1b26,#ececf4);--soft:light-dark(#5b5b70,#a9a9c0);--line:light-dark(#c9c9d6,#44445a);
--good:light-dark(#0b6b3a,#6fdc9d);--bad:light-dark(#b3261e,#ff9d94);--mark:light-dark(#ffd9d3,#5c1f18)}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.2rem;background:var(--ground);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.3rem;margin:0 0 .6rem}h2{font-size:1.05rem;margin:1.6rem 0 .5rem}
.verdict{padding:.8rem 1rem;border:2px solid;border-radius:8px;font-weight:600;background:var(--card)}
.equal{color:var(--good)}.different{color:var(--bad)}
table{border-collapse:collapse;width:100%;background:var(--card)}
th,td{text-align:left;vertical-align:top;padding:.35rem .6rem;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--soft);width:14rem}
.bars{display:grid;grid-template-columns:max-content 1fr max-content;gap:.2rem .6rem;align-items:center;
background:var(--card);padding:.8rem 1rem;border-radius:8px;font-variant-numeric:tabular-nums}
.bar{height:.9rem;background:var(--bad);border-radius:3px;opacity:.8}
article{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem 1rem;margin:.7rem 0}
article h3{margin:0 0 .3rem;font-size:.95rem}article p{margin:.2rem 0}
.sides{display:grid;grid-template-columns:1fr 1fr;gap:.8rem}
@media (max-width:44rem){.sides{grid-template-columns:1fr}th{width:9rem}body{padding:.8rem}}
.sides h4{margin:.4rem 0 .2rem;font-size:.8rem;color:var(--soft);font-weight:500}
pre{white-space:pre-wrap;margin:0;padding:.5rem .6rem;border:1px solid var(--line);border-radius:6px;
font:14px/1.6 ui-monospace,monospace}
mark{background:var(--mark);color:inherit;border-radius:3px;outline:2px solid var(--bad)}
small,.soft{color:var(--soft)}
"""


def report_html(found: RunComparison) -> str:
    """Return the whole file."""
    state = "equal" if found.is_equal else "different"
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(found.a.name)} and {escape(found.b.name)}</title><style>{_CSS}</style></head><body>",
            "<h1>Two runs, compared bit for bit</h1>",
            f'<p class="verdict {state}" id="verdict">{escape(found.verdict())}</p>',
            _facts(found),
            _positions(found),
            "".join(_differences(found)),
            f"<p><small>sempre {escape(__version__)}</small></p></body></html>\n",
        )
    )


def _facts(found: RunComparison) -> str:
    rows = [("A", found.a.name), ("B", found.b.name)]
    rows += [("fingerprint of A", ", ".join(found.a.fingerprints)), ("of B", ", ".join(found.b.fingerprints))]
    rows += [("changed in the fingerprint", part) for part in found.changed_parts()]
    rows += [(f"first difference: {kind}", f"{count:,} outputs") for kind, count in sorted(found.kinds().items())]
    positions = found.positions()
    if positions:
        told = f"least {positions[0]:,}, median {median(positions):,g}, most {positions[-1]:,}"
        rows.append(("tokens until the first difference", told))
    rows += [
        (f"more in {name} alone", shortened(alone, 5))
        for name, alone in (("A", found.only_a), ("B", found.only_b))
        if alone
    ]
    rows += [("not read", problem) for problem in found.problems]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<h2>Facts</h2><table>{cells}</table>"


def _positions(found: RunComparison) -> str:
    bins = num_by_position(found.positions())
    if not bins:
        return ""
    most = max(count for _, _, count in bins)
    bars = "".join(
        f'<span>{first}–{last}</span><span class="bar" style="width:{100 * count / most:.1f}%"></span>'
        f"<span>{count}</span>"
        for first, last, count in bins
    )
    return f'<h2>Position of the first difference</h2><div class="bars">{bars}</div>'


def _differences(found: RunComparison) -> Iterator[str]:
    different = found.different
    if not different:
        return
    yield "<h2>First differences</h2>"
    if len(different) > _MOST_PAIRS:
        yield f'<p class="soft">The first {_MOST_PAIRS} of {len(different):,}.</p>'
    for pair in different[:_MOST_PAIRS]:
        yield _article(pair)


def _article(pair: Pair) -> str:
    assert pair.difference is not None
    params = "".join(f"<p>parameter {escape(text)}</p>" for text in pair.changed_params)
    sides = "".join(
        f"<div><h4>{name}: {escape(kept.name)}</h4><pre>{_window(kept, pair.difference.position)}</pre></div>"
        for name, kept in (("A", pair.a), ("B", pair.b))
    )
    sentence = escape(pair.difference.sentence())
    return f'<article><h3>seed {pair.a.seed}</h3><p>{sentence}</p>{params}<div class="sides">{sides}</div></article>'


def _window(kept: KeptOutput, position: int | None) -> str:
    """Return the tokens around a position, which is marked; their ids where no text was kept."""
    if kept.error is not None:
        return escape(kept.error)
    middle = len(kept.token_ids) if position is None else position
    first, last = max(0, middle - _TOKENS_BEFORE), min(len(kept.token_ids), middle + _TOKENS_AFTER)
    pieces = ["… "] if first else []
    for place in range(first, last):
        text = kept.token_text(place)
        shown = escape(f"{kept.token_ids[place]} " if text is None else text)
        pieces.append(f"<mark>{shown}</mark>" if place == position else shown)
    if last < len(kept.token_ids):
        pieces.append(" …")
    end = "" if last < len(kept.token_ids) else f" <small>[{escape(str(kept.finish_reason))}]</small>"
    return "".join(pieces) + end
