"""The house rules of size, and of where the parts of a decoder block are named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "workers", "ipc", "kernels")
MOST_LINES = 400
MOST_FUNCTION_LINES = 60
MOST_PARAMETERS = 7
COMPILED = re.compile(r"\b(jit|gluon_jit|compiled|compiled_twice|intrinsic)\b")

KEYWORD_APIS = {
    "engine/llm.py chat": "keywords of vLLM's LLM.chat",
    "engine/async_llm.py generate": "keywords of vLLM's AsyncLLM.generate",
}
# what exceeds a limit today; the list only gets shorter
EXCEPTIONS: set[str] = set()

PARTS = re.compile(r"qkv|gate_up|o_proj")
PARTS_OF_A_BLOCK = ("workers/models/", "workers/layers/")
NAMES_OF_OTHERS = {
    "engine/models/gguf_families.py": "maps names of a format to those that models read",
    "kernels/": "an operand is named for its layout, which its contract states",
}


def _sources() -> dict[str, str]:
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in files}


def _excesses(file: str, source: str) -> Iterator[str]:
    """`file`, or `file function`, for each that exceeds a limit; kernels are compiled, and have their operands."""
    if source.count("\n") > MOST_LINES:
        yield file
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any(COMPILED.search(ast.unparse(decorator)) for decorator in node.decorator_list):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        parameters = [each for each in given if each.arg not in ("self", "cls")]
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > MOST_FUNCTION_LINES or len(parameters) > MOST_PARAMETERS:
            yield f"{file} {node.name}"


def _names_parts(file: str, source: str) -> bool:
    return PARTS.search(source) is not None and not file.startswith((*PARTS_OF_A_BLOCK, *NAMES_OF_OTHERS))


def test_files_functions_and_parameter_lists_are_short() -> None:
    found = {excess for file, source in _sources().items() for excess in _excesses(file, source)}
    assert found == EXCEPTIONS | KEYWORD_APIS.keys()


def test_an_excess_is_noticed() -> None:
    body = "    x = 1\n"
    assert not list(_excesses("a.py", "def f(a, b, c, d, e, f, g):\n" + body * 59))
    assert list(_excesses("a.py", "def f():\n" + body * 60)) == ["a.py f"]
    assert list(_excesses("a.py", "class C:\n async def f(self, a, b, c, d, *, e, f, g, h): ...\n")) == ["a.py f"]
    assert not list(_excesses("a.py", "@compiled(parallel=True)\ndef f():\n" + body * 60))
    assert list(_excesses("a.py", "x = 1\n" * 401)) == ["a.py"]


def test_parts_of_a_block_are_named_by_models_and_layers_alone() -> None:
    sources = _sources()
    assert [file for file, source in sources.items() if _names_parts(file, source)] == []
    assert any(PARTS.search(sources[file]) for file in sources if file.startswith(PARTS_OF_A_BLOCK))
    assert _names_parts("workers/loading.py", "x = layer.qkv_proj\n")
    for place in NAMES_OF_OTHERS:
        assert any(PARTS.search(source) for file, source in sources.items() if file.startswith(place)), place
