"""The graph of imports has no cycle, not even one hidden by an import inside a function; models are below workers."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("engine", "workers", "ipc", "kernels")
MODELS = "sempre.workers.models"
LAYERS = ("sempre.workers.layers", "sempre.workers.quantization")
# what a model's modules may know of a worker: a step's arrays, a checkpoint's tensors, the fields of its config, and
# its rank and stage
WORKER = tuple(f"sempre.workers.{name}" for name in ("steps", "tensor_source", "config_fields", "parallel", "stages"))
BELOW_LAYERS = ("sempre.kernels", "sempre.ipc", *WORKER)
BELOW_MODELS = (*LAYERS, *BELOW_LAYERS)


class Imported(NamedTuple):
    """A name that a module imports, as `package.module` or `package.module.attribute`."""

    name: str
    is_for_types: bool
    """under TYPE_CHECKING: never run"""


def _sources() -> dict[str, str]:
    """Every module of the project with its source; a package is named after its folder."""
    sources = {}
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[:2] == ("engine", "namespace"):
            continue  # `sempre` itself, which imports the engine when a name is accessed
        sources[".".join(("sempre", *parts)).removesuffix(".__init__")] = path.read_text()
    return sources


def _imported(node: ast.AST, is_for_types: bool = False) -> Iterator[Imported]:
    """What is imported anywhere below `node`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        for child in node.body:
            yield from _imported(child, is_for_types=True)
        for child in node.orelse:
            yield from _imported(child, is_for_types)
        return
    if isinstance(node, ast.Import):
        yield from (Imported(alias.name, is_for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (Imported(f"{node.module}.{alias.name}", is_for_types) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from _imported(child, is_for_types)


def _lazily_imported(package: str, tree: ast.AST) -> Iterator[Imported]:
    """The modules of a package that stand there as a LazyModule."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "LazyModule":
            assert ast.unparse(node.args[0]) == "__name__"
            yield Imported(f"{package}.{ast.literal_eval(node.args[1])}", is_for_types=False)


def _and_packages(name: str) -> Iterator[str]:
    """`name` and the packages around it, which run before it."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _arrows(sources: Mapping[str, str], *, with_types: bool) -> dict[str, set[str]]:
    """For each module all that it imports, except the packages that contain it: those are loaded already."""
    graph = {}
    for module, source in sources.items():
        tree = ast.parse(source)
        imported = (*_imported(tree), *_lazily_imported(module, tree))
        names = (i.name for i in imported if with_types or not i.is_for_types)
        graph[module] = {found for name in names for found in _and_packages(name) if found in sources}
        graph[module] -= set(_and_packages(module))
    return graph


def _circle(graph: Mapping[str, set[str]]) -> list[str]:
    """A cycle in the graph, or nothing."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle
    return []


def _upward(graph: Mapping[str, set[str]], package: str, below: tuple[str, ...]) -> list[str]:
    """Arrows from `package` to anything but itself and `below`."""
    allowed = (package, *below)
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in sorted(targets)
        if package in _and_packages(module) and not set(allowed) & set(_and_packages(target))
    ]


def test_no_circle() -> None:
    graph = _arrows(_sources(), with_types=False)
    assert len(graph) > 100
    assert sum(map(len, graph.values())) > len(graph), "the imports are read"
    assert _circle(graph) == []


def test_a_circle_is_noticed() -> None:
    """Through a function, through a package's own module, and through many modules; not through a type."""
    inside = {"a": "import b", "b": "def f():\n    from a import x"}
    package = {"p": "from p.inner import x", "p.inner": "from q import y", "q": "import p.inner"}
    long = {"a": "import b.c", "b": "", "b.c": "if x:\n    from d import e", "d": "", "d.e": "", "f": ""}
    lazy = {"p": "x = LazyModule(__name__, 'inner')", "p.inner": "import q", "q": "from p import y"}
    types = {"a": "import b", "b": "if TYPE_CHECKING:\n    from a import x"}
    assert _circle(_arrows(inside, with_types=False))
    assert _circle(_arrows(package, with_types=False))
    assert not _circle(_arrows(long, with_types=False))
    assert _circle(_arrows(long | {"d.e": "from a import y"}, with_types=False))
    assert _circle(_arrows(lazy, with_types=False))
    assert not _circle(_arrows(types, with_types=False))
    assert _circle(_arrows(types, with_types=True))


def test_a_circle_is_noticed_in_the_project() -> None:
    sources = _sources()
    sources["sempre.kernels.checks"] += "\ndef f() -> None:\n    from sempre.kernels.attention import KvCache\n"
    assert {"sempre.kernels.checks", "sempre.kernels.attention"} <= set(_circle(_arrows(sources, with_types=False)))


def test_models_import_nothing_above_them() -> None:
    """Not even for types: a model's parts are described next to it."""
    graph = _arrows(_sources(), with_types=True)
    assert any(module.startswith(MODELS + ".") and targets for module, targets in graph.items())
    assert _upward(graph, MODELS, BELOW_MODELS) == []
    for package in LAYERS:
        assert _upward(graph, package, (*LAYERS, *BELOW_LAYERS)) == []


def test_an_arrow_up_is_noticed() -> None:
    sources = _sources()
    sources["sempre.workers.models.llama"] += "\nif TYPE_CHECKING:\n    from sempre.workers.loading import load_model\n"
    sources["sempre.workers.layers.norm"] += "\nfrom sempre.workers.models.base import CausalLM\n"
    graph = _arrows(sources, with_types=True)
    assert _upward(graph, MODELS, BELOW_MODELS) == ["sempre.workers.models.llama -> sempre.workers.loading"]
    assert _upward(graph, LAYERS[0], (*LAYERS, *BELOW_LAYERS)) == [
        "sempre.workers.layers.norm -> sempre.workers.models",
        "sempre.workers.layers.norm -> sempre.workers.models.base",
    ]


def test_only_models_and_layers_name_projections() -> None:
    """Code that walks a model's tree knows no family."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "workers").rglob("*.py")}
    naming = {name for name, text in files.items() if any(part in text for part in ("qkv", "gate_up", "o_proj"))}
    assert {name.rsplit("/", 1)[0] for name in naming} == {"workers/layers", "workers/models"}
