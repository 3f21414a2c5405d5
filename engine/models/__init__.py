"""Resolves a model argument to a local Hugging Face folder.

`resolve_model`   a path, an embedded or catalogue name, or a hub id → `ResolvedModel`
`resolve_tokenizer`   a path or a hub id → the folder of a tokenizer
`with_overrides`  a folder with another config.json
`pull`            download a catalogue model into the user's cache, checked and converted once
`CATALOG`         the named models `pull` knows
`cache_folder`    where pulled models live
"""

from sempre.engine.models.cache import cache_folder, with_overrides
from sempre.engine.models.pull import CATALOG, CatalogModel, pull
from sempre.engine.models.resolve import ResolvedModel, refuse_remote_code, resolve_model, resolve_tokenizer

__all__ = [
    "CATALOG",
    "CatalogModel",
    "ResolvedModel",
    "cache_folder",
    "pull",
    "refuse_remote_code",
    "resolve_model",
    "resolve_tokenizer",
    "with_overrides",
]
