"""A YAML file of settings, and where in it each one stands."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sempre.engine.near_names import near_name
from sempre.ipc.errors import ConfigError


def read_config(path: str, known: Collection[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of a file, and the place of each: `serve.yaml, line 3`.

    Names may be written with dashes. Raises ConfigError for an unreadable file, an unknown name, or a repeated one.
    """
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        found, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", parameter="config") from error
    if found is None:
        return {}, {}
    if not isinstance(found, dict) or not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path} must hold settings as `name: value`, found {type(found).__name__}.")
    places: dict[str, str] = {}
    for key, _ in root.value:
        name = str(key.value).replace("-", "_")
        place = f"{path}, line {key.start_mark.line + 1}"
        if name not in known and key.tag != "tag:yaml.org,2002:merge":
            near = near_name(name, known)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ConfigError(f"{place}: there is no setting {name!r}.{hint}", parameter=name)
        if name in places:
            raise ConfigError(f"{place}: {name!r} is set twice, first in {places[name]}", parameter=name)
        places[name] = place
    return {str(name).replace("-", "_"): value for name, value in found.items()}, places


@contextmanager
def named_places(places: Mapping[str, str]) -> Iterator[None]:
    """Begin the error of a setting in `places` with its place."""
    try:
        yield
    except ConfigError as error:
        place = places.get((error.parameter or "").partition(".")[0])
        if place is None:
            raise
        raise ConfigError(f"{place}: {error}", parameter=error.parameter, value=error.value) from error
