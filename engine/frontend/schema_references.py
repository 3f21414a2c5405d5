"""Resolves the references in a schema: by pointer, by anchor, and by the addresses of inner schemas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

Schema = dict[str, Any]
ASIDE = ("$defs", "definitions")
"""Where schemas stand that nothing uses unless it refers to them."""
Children = Callable[[Schema], Iterator[tuple[str, Any]]]


class References:
    """The references in a schema as given, to be written again once it has been rewritten in place."""

    def __init__(self, root: Schema, children: Children) -> None:
        """`children` yields (path, subschema). Addresses and anchors are removed from the schema."""
        self._root = root
        self._children = children
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Any] = {}
        self._bases: dict[int, str] = {}
        self._found: list[tuple[Schema, Any]] = []
        """Each schema with a reference, and its target."""
        self._pointers: dict[int, str] = {}
        """The original pointers of the targets."""
        # a target may have any parent, like OpenAPI's components
        pending = self._enter(root, "")
        done = 0
        while done < len(pending):
            schema, address = pending[done]
            done += 1
            target, base = self._target(address)
            if target is None:
                # the library will not find it either, if it is needed
                schema["$ref"] = address
            else:
                self._found.append((schema, target))
                self._pointers.setdefault(id(target), f"#{urldefrag(address).fragment}")
                pending += self._enter(target, base)

    def _enter(self, root: Any, base: str) -> list[tuple[Schema, str]]:
        """Record the names in a schema and all inside it; return the schemas with references, each with its address."""
        referring = []
        pending = [(root, base)]
        while pending:
            schema, around = pending.pop()
            if not isinstance(schema, dict) or id(schema) in self._bases:
                continue
            around = self._bases[id(schema)] = self._named(schema, around)
            if isinstance(schema.get("$ref"), str):
                reference = schema["$ref"]
                # an address like urn:… cannot be joined
                address = around + reference if reference.startswith("#") else urljoin(around, reference)
                referring.append((schema, address))
            pending += [(child, around) for _, child in self._children(schema)]
        return referring

    def _named(self, schema: Schema, around: str) -> str:
        """Record the schema's own address and anchor; return the base address inside it."""
        # draft 4 says `id`
        names = [schema.pop(word, None) for word in ("id", "$id") if isinstance(schema.get(word), str)]
        if names:
            address, _, fragment = names[-1].partition("#")
            if address:
                around = urljoin(around, address)
                self._resources.setdefault(around, schema)
            if fragment and not fragment.startswith("/"):
                self._anchors.setdefault((around, fragment), schema)
        anchor = schema.pop("$anchor", None)
        if isinstance(anchor, str):
            self._anchors.setdefault((around, anchor), schema)
        return around

    def _target(self, address: str) -> tuple[Any, str]:
        """The target of an absolute reference and its base address; None: not inside this schema."""
        document, fragment = urldefrag(address)
        resource = self._resources.get(document)
        if resource is None or not fragment:
            return resource, document
        if fragment.startswith("/"):
            return target_of(resource, f"#{fragment}"), document
        return self._anchors.get((document, unquote(fragment))), document

    def targets(self) -> list[tuple[str, Schema]]:
        """The targets of references, each with the pointer that was used."""
        return [(self._pointers[id(target)][1:], target) for _, target in self._found if isinstance(target, dict)]

    def write(self) -> None:
        """Write every reference as a pointer from the root, after everything else has been rewritten."""
        places = {id(self._root): "#"}
        for _, target in self._found:
            pointer = self._pointers[id(target)]
            if target_of(self._root, pointer) is target:
                places.setdefault(id(target), pointer)
        pending = [(self._root, "#")]
        entered = {id(self._root)}
        while pending:
            schema, place = pending.pop()
            for path, child in self._children(schema):
                if isinstance(child, dict) and id(child) not in entered:
                    entered.add(id(child))
                    places.setdefault(id(child), f"{place}/{quote(path)}")
                    pending.append((child, places[id(child)]))
        for schema, target in self._found:
            if schema.get("$ref") is None:
                continue
            if not isinstance(target, dict):
                del schema["$ref"]
                schema["allOf"] = [*schema.get("allOf", ()), target]
                continue
            if id(target) not in places:
                definitions = self._root.setdefault("$defs", {})
                name = next(name for i in range(len(definitions), -1, -1) if (name := f"part-{i}") not in definitions)
                definitions[name] = target
                places[id(target)] = f"#/$defs/{name}"
            schema["$ref"] = places[id(target)]


def reached(root: Schema, pending: list[Schema], children: Children) -> set[int]:
    """These schemas and what is inside or referred to, by identity; definitions only where something refers to them."""
    found: set[int] = set()
    while pending:
        schema = pending.pop()
        if id(schema) in found:
            continue
        found.add(id(schema))
        reference = schema.get("$ref")
        target = target_of(root, reference) if isinstance(reference, str) and reference.startswith("#") else None
        inside = [child for path, child in children(schema) if path.partition("/")[0] not in ASIDE]
        pending += [child for child in (target, *inside) if isinstance(child, dict)]
    return found


def target_of(root: Any, reference: str) -> Any:
    """The target of `#` or `#/…`; None if there is none."""
    node: Any = root
    for part in reference[2:].split("/") if reference[1:] else ():
        name = unquote(part).replace("~1", "/").replace("~0", "~")
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict) and name in node:
            node = node[name]
        else:
            return None
    return node
