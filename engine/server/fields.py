"""Converts plain JSON to a request type.

Null counts as left out for every field; a user's own JSON (schemas, messages, template variables) is not changed. A
whole float counts as an integer; unless a string is expected, a string may hold an integer, a number, true or false.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from msgspec import inspect as types

from sempre.engine.near_names import near_name
from sempre.engine.server.errors import BadRequest
from sempre.engine.server.neutral import NEUTRAL, Neutral

Model = TypeVar("Model", bound=Struct)
Cleaner = Callable[[Any, str, bool], Any]
"""(value, its path, whether unknown fields are ignored) → the value without neutral fields"""

_MOST_SHOWN = 80
# spellings of clients that send forms; vLLM accepts them
_INTEGER = re.compile(r"-?[0-9]{1,20}")
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


def to_model(plain: Any, model: type[Model], *, ignore_unknown: bool = False) -> Model:
    """Return `plain` as `model`. Raises BadRequest naming the path, the expected and the found value."""
    cleaned = plain if not isinstance(plain, dict) else _members(plain, model, "", ignore_unknown)
    try:
        return msgspec.convert(cleaned, model)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), cleaned, model) from None


def _members(plain: dict[str, Any], model: type[Struct], path: str, ignore_unknown: bool) -> dict[str, Any]:
    cleaners = _cleaners(model)
    neutral = NEUTRAL.get(model, {})
    kept = {}
    for name, value in plain.items():
        if value is None:
            continue
        cleaner = cleaners.get(name)
        where = f"{path}{name}"
        if cleaner is not None:
            kept[name] = cleaner(value, where, ignore_unknown)
        elif name in neutral:
            _check_neutral(value, neutral[name], where)
        elif not ignore_unknown:
            raise _unknown(where, name, [*cleaners, *neutral])
    return kept


@cache
def _cleaners(model: type[Struct]) -> dict[str, Cleaner]:
    info = types.type_info(model)
    assert isinstance(info, types.StructType)
    return {field.encode_name: _cleaner(field.type) or _unchanged for field in info.fields}


def _unchanged(value: Any, _path: str, _ignore_unknown: bool) -> Any:
    return value


def _cleaner(info: types.Type) -> Cleaner | None:
    """The cleaner of values of this type; None if there is nothing to do."""
    match info:
        case types.Metadata(type=inner):
            return _cleaner(inner)
        case types.UnionType(types=several):
            return _union(several)
        case types.IntType():
            return _integer
        case types.FloatType():
            return _number
        case types.BoolType():
            return _flag
        case types.StructType(tag=None, cls=model):
            return lambda value, path, ignore: (
                _members(value, model, f"{path}.", ignore) if isinstance(value, dict) else value
            )
        case types.StructType():
            return _tagged([info])
        case types.ListType(item_type=item):
            return _list(_cleaner(item))
    return None


def _union(several: tuple[types.Type, ...]) -> Cleaner | None:
    tagged = [info for info in several if isinstance(info, types.StructType) and info.tag is not None]
    others = [info for info in several if info not in tagged]
    found = [cleaner for info in others if (cleaner := _cleaner(info)) is not None]
    if tagged:
        found.append(_tagged(tagged))
    if any(isinstance(info, types.StrType) for info in several):
        # a string is expected here
        found = [_whole if cleaner is _integer else cleaner for cleaner in found if cleaner not in (_number, _flag)]
    if not found:
        return None

    def clean(value: Any, path: str, ignore_unknown: bool) -> Any:
        for cleaner in found:
            value = cleaner(value, path, ignore_unknown)
        return value

    return clean


def _tagged(models: list[types.StructType]) -> Cleaner:
    """The cleaner of objects whose tag says which model they are; without one, the only or the default model is it."""
    of_tag = {info.tag: info for info in models}
    [field] = {info.tag_field for info in models}
    assert field is not None
    default = next((info.tag for info in models if len(models) == 1 or getattr(info.cls, "is_default", False)), None)

    def clean(value: Any, path: str, ignore_unknown: bool) -> Any:
        if not isinstance(value, dict):
            return value
        tag = default if value.get(field) is None else value[field]
        where = f"{path}.{field}"
        if tag is None:
            raise BadRequest(f"{where} is missing.", param=where)
        info = of_tag.get(tag) if isinstance(tag, str) else None
        if info is None:
            known = ", ".join(map(repr, of_tag))
            raise BadRequest(f"{where}: {_shown(tag)} is not supported by this server, only {known}.", param=where)
        members = {name: member for name, member in value.items() if name != field}
        return {field: tag, **_members(members, info.cls, f"{path}.", ignore_unknown)}

    return clean


def _list(item: Cleaner | None) -> Cleaner | None:
    if item is None:
        return None

    def clean(value: Any, path: str, ignore_unknown: bool) -> Any:
        # fast path: token ids and strings are common, and there may be many
        if not isinstance(value, list) or set(map(type, value)) <= {int, str}:
            return value
        return [item(entry, f"{path}[{place}]", ignore_unknown) for place, entry in enumerate(value)]

    return clean


def _whole(value: Any, _path: str, _ignore_unknown: bool) -> Any:
    return int(value) if type(value) is float and value.is_integer() else value


def _integer(value: Any, path: str, ignore_unknown: bool) -> Any:
    if isinstance(value, str):
        return int(value) if _INTEGER.fullmatch(value) else value
    return _whole(value, path, ignore_unknown)


def _number(value: Any, _path: str, _ignore_unknown: bool) -> Any:
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _flag(value: Any, _path: str, _ignore_unknown: bool) -> Any:
    return {"true": True, "false": False}.get(value.lower(), value) if isinstance(value, str) else value


def _check_neutral(value: Any, neutral: Neutral, path: str) -> None:
    try:
        found = msgspec.convert(_whole(value, path, False) if neutral.kind is int else value, neutral.kind)
    except msgspec.ValidationError as error:
        raise BadRequest(f"{path}: {_in_words(str(error), value)}.", param=path) from None
    if neutral.values is None or found in neutral.values:
        return
    if not neutral.values:
        instead = f"Use {neutral.instead}" if neutral.instead else "Leave it out"
        raise BadRequest(f"{path} is not supported by this server. {instead}.", param=path)
    allowed = " or ".join(map(_shown, neutral.values))
    raise BadRequest(f"{path} is supported as {allowed} only, found {_shown(value)}.", param=path)


def _unknown(path: str, name: str, known: list[str]) -> BadRequest:
    near = near_name(name[:_MOST_SHOWN], known)
    hint = f" Did you mean {near!r}?" if near else ""
    shown = path if len(path) <= _MOST_SHOWN else path[:_MOST_SHOWN] + "…"
    return BadRequest(f"Unknown field {shown!r}: it is not supported by this server.{hint}", param=shown)


def _refusal(text: str, plain: Any, model: type[Struct]) -> BadRequest:
    problem, _, location = text.partition(" - at `$")
    path = location.removesuffix("`").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(.*)`", problem)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return BadRequest(f"{path} is missing.", param=path)
    if not path:
        return BadRequest(f"The body must be a JSON object: {_in_words(problem, plain)}.")
    keys = re.findall(r"\[\.\.\.\]|\[(\d+)\]|([^.\[\]]+)", path)
    found: Any = plain
    info: types.Type | None = types.type_info(model)
    for place, name in keys:
        info = _inside(info, name)
        if place or name:
            found = found[int(place)] if place else found[name]
        else:  # the message does not name this field
            return BadRequest(f"{path}: {_problem(problem)}.", param=path.partition("[")[0])
    if problem.startswith("Invalid enum value"):
        problem = "Expected one of " + ", ".join(map(repr, _literals(info)))
    return BadRequest(f"{path}: {_in_words(problem, found)}.", param=path)


def _in_words(problem: str, found: Any) -> str:
    return f"{_problem(problem)}, found {_shown(found)}"


def _problem(problem: str) -> str:
    """Return msgspec's message in words: "Expected `int` >= 1" → "expected an integer greater than or equal to 1"."""
    expected = problem.partition(", got ")[0].replace("| null", "").replace(" `", "`")

    def words(match: re.Match[str]) -> str:
        names = [name.strip() for name in match[1].split("|")]
        return " " + " or ".join(_WORDS.get(name, name) for name in names if name)

    said = re.sub(r"`([^`]*)`", words, expected)
    said = said.replace(" >= ", " greater than or equal to ").replace(" <= ", " less than or equal to ")
    return said[:1].lower() + said[1:]


def _shown(value: Any) -> str:
    """A value as JSON, or its kind if that is long."""
    if isinstance(value, dict):
        return "an object" if value else "{}"
    if isinstance(value, list):
        return "[]" if not value else f"a list of {len(value)}" if len(value) > 1 else f"[{_shown(value[0])}]"
    if isinstance(value, str) and len(value) > _MOST_SHOWN:
        return f"a string of {len(value)} characters"
    return msgspec.json.encode(value).decode()


def _inside(info: types.Type | None, name: str) -> types.Type | None:
    """The type of a field or an entry; None if unknown."""
    match info:
        case types.Metadata(type=inner):
            return _inside(inner, name)
        case types.UnionType(types=several):
            return next((found for each in several if (found := _inside(each, name)) is not None), None)
        case types.StructType(fields=fields) if name:
            return next((field.type for field in fields if field.encode_name == name), None)
        case types.ListType(item_type=item) if not name:
            return item
    return None


def _literals(info: types.Type | None) -> list[Any]:
    match info:
        case types.Metadata(type=inner):
            return _literals(inner)
        case types.UnionType(types=several):
            return [value for each in several for value in _literals(each)]
        case types.LiteralType(values=values):
            return list(values)
    return []
