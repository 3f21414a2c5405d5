"""What the references of a schema mean: by pointer, by anchor, and by the addresses of the schemas inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote, unquote, urldefrag, urljoin

Schema = dict[str, Any]
Children = Callable[[Schema], Iterator[tuple[str, Any]]]


class References:
    """The references in a schema as it was given, to be told again once it has been rewritten in place."""

    def __init__(self, root: Schema, children: Children) -> None:
        """`children` yields (path, subschema). Addresses and anchors are taken out of the schema."""
        self._root = root
        self._children = children
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], Any] = {}
        self._bases: dict[int, str] = {}
        self._found: list[tuple[Schema, Any]] = []
        """Each schema that refers to another, and that one."""
        self._pointers: dict[int, str] = {}
        """Where those that are referred to were said to stand."""
        # what is referred to may stand under any name, as OpenAPI's components do
        pending = self._enter(root, "")
        done = 0
        while done < len(pending):
            schema, address = pending[done]
            done += 1
            target, base = self._target(address)
            if target is None:
                # which the library will not find either, where it is asked for
                schema["$ref"] = address
            else:
                self._found.append((schema, target))
                self._pointers.setdefault(id(target), f"#{urldefrag(address).fragment}")
                pending += self._enter(target, base)

    def _enter(self, root: Any, base: str) -> list[tuple[Schema, str]]:
        """Note the names in a schema and all inside; return those that refer, each with the address."""
        referring = []
        pending = [(root, base)]
        while pending:
            schema, around = pending.pop()
            if not isinstance(schema, dict) or id(schema) in self._bases:
                continue
            around = self._bases[id(schema)] = self._named(schema, around)
            if isinstance(schema.get("$ref"), str):
                reference = schema["$ref"]
                # an address as urn:… joins with nothing
                address = around + reference if reference.startswith("#") else urljoin(around, reference)
                referring.append((schema, address))
            pending += [(child, around) for _, child in self._children(schema)]
        return referring

    def _named(self, schema: Schema, around: str) -> str:
        """Note the schema's own address and anchor; return the address that counts inside."""
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
        """What an absolute reference means, and the address that counts there; None: nothing inside this schema."""
        document, fragment = urldefrag(address)
        resource = self._resources.get(document)
        if resource is None or not fragment:
            return resource, document
        if fragment.startswith("/"):
            return target_of(resource, f"#{fragment}"), document
        return self._anchors.get((document, unquote(fragment))), document

    def targets(self) -> list[tuple[str, Schema]]:
        """The schemas that are referred to, each with the pointer that was used."""
        return [(self._pointers[id(target)][1:], target) for _, target in self._found if isinstance(target, dict)]

    def write(self) -> None:
        """Say every reference as a pointer from the root, where all else has been rewritten."""
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


def target_of(root: Any, reference: str) -> Any:
    """What `#` or `#/…` means; None where nothing stands."""
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
