"""Arguments of a call as Python writes them, against Python's own parser, however the text is cut."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine.parsing.pieces import well_formed
from sempre.engine.parsing.python_call import PythonCallReader

_WORDS = {"true": True, "false": False, "null": None}


def value_of(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _WORDS:
            return _WORDS[name]
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [value_of(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys):
                raise ValueError
            return {ast.literal_eval(key): value_of(value) for key, value in zip(keys, values, strict=True) if key}
    value = ast.literal_eval(node)
    if not isinstance(value, str | int | float | None):
        raise ValueError
    return value


def by_python(text: str) -> str | None:
    """The arguments of f(text as JSON; None if Python has no such call, or JSON no such value."""
    try:
        with warnings.catch_warnings():
            # of strings with unknown escapes, which are kept as they are
            warnings.simplefilter("ignore")
            call = ast.parse(f"f({text}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        arguments = {keyword.arg: value_of(keyword.value) for keyword in call.keywords}
        return well_formed(json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    except (SyntaxError, ValueError, TypeError):
        return None


def read(text: str, size: int) -> str | None:
    reader = PythonCallReader()
    for start in range(0, len(text), size):
        part = text[start : start + size]
        end = reader.feed(part)
        if reader.malformed or (reader.done and start + end < len(text)):
            return None  # what follows is none of its arguments
        if reader.done:
            break
    return reader.arguments if reader.done else None


# fmt: off
SCALARS = st.sampled_from([
    '1', '-2', '+3', '- 1', '--1', '0', '007', '00', '1.5', '.5', '1.', '1e5', '1e+5', '1E-3', '1_000', '1__0',
    '0x1f', '0b11', '0o17', '0xg', '1j', '1e999', 'True', 'false', 'null', 'None', 'x', '"a"', "'b'", '"a" "b"',
    '"a"\'b\'"c"', "r'\\d'", 'R"x"', "u'x'", "b'x'", "f'x'", "br'x'", '"\\n\\x41\\u00e9"', '"\\q"', '"\\x4"',
    '"\\U00110000"', '"\\400"', '"\\0"', '"\\N{BULLET}"', '"\\N{NOTHING}"', '"\\ud83d\\ude00"', "'''a'b'''",
    '"""a"b\n"""', '""""""', '""', "''", '"a\nb"', '"a\\\nb"', '(1)', '(1,)', '()', '(1,2)', '[1,]', '[,]', '{1:2}',
    '{1}', '{"a"}', '{"a" "b":1,}', '{"a":1,"a":2}', '{"a":}', '1+2', '-"a"', '[1 2]', '("a")"b"', '"open', '*a',
    '**a', '"é日"', 'f(1)', 'a.b', 'a[0]', '1 if x else 2',
])
# fmt: on
def as_dict(values: list[str]) -> str:
    return "{" + ",".join([f'"k{i}": {value}' for i, value in enumerate(values)]) + "}"


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(inner, max_size=3).map(as_dict)
        | inner.map(lambda item: f"({item})")
    ),
    max_leaves=5,
)
PAIRS = st.tuples(st.sampled_from(["a", "b", "long_name", "é", "a ", "1"]), VALUES).map("=".join)
ENDS = st.sampled_from([")", ",)", " )", ""])
CALLS = st.builds(lambda pairs, end: ",".join(pairs) + end, st.lists(PAIRS, max_size=3), ENDS)


@settings(max_examples=150)
@given(CALLS, st.integers(1, 9))
def test_arguments_are_those_that_python_reads(text: str, size: int) -> None:
    expected = by_python(text)
    assert read(text, len(text) or 1) == expected
    assert read(text, size) == expected


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("from='x', class=1)", '{"from": "x", "class": 1}'),
        ("a=" + "[" * 300 + "]" * 300 + ")", None),
        ("a=" + "1" * 5000 + ")", None),
        ("a=1 # why\n)", None),
    ],
)
def test_where_it_differs_from_python(text: str, arguments: str | None) -> None:
    """Names of parameters may be Python's keywords; what is too deep or too long is none, as in Python; no comments."""
    assert read(text, 10**9) == read(text, 3) == arguments
