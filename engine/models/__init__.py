"""From a model argument to a local Hugging Face folder.

`resolve_model`   a path, an embedded or catalogue name, or a hub id → `ResolvedModel`
`pull`            fetch a catalogue model into the user's cache, checked and converted once
`CATALOG`         the named models `pull` knows
`cache_folder`    where pulled models live
"""

from sempre.engine.models.cache import cache_folder
from sempre.engine.models.catalog import CATALOG, CatalogModel
from sempre.engine.models.pull import pull
from sempre.engine.models.resolve import ResolvedModel, resolve_model

__all__ = [
    "CATALOG",
    "CatalogModel",
    "ResolvedModel",
    "cache_folder",
    "pull",
    "resolve_model",
]
