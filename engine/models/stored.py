"""The models on this machine: those of the package, of the catalogue, and of the hub's cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sempre.engine.checkpoints import EMBEDDED, embedded_checkpoint
from sempre.engine.models.cache import exclusive, model_cache_folder
from sempre.engine.models.pull import CATALOG, PROVENANCE_FILE
from sempre.engine.near_names import near_names
from sempre.ipc.errors import ConfigError

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo


class StoredModel(NamedTuple):
    """A model that starts without a download."""

    name: str
    source: str
    """package, catalogue or hub"""
    path: Path
    num_bytes: int


def stored_models() -> list[StoredModel]:
    """Return all models on this machine, by source and name; folders elsewhere are not searched for."""
    found = []
    for name in EMBEDDED:
        folder = embedded_checkpoint(name)
        assert folder is not None
        found.append(StoredModel(name, "package", folder, _size(folder)))
    for name in CATALOG:
        folder = model_cache_folder(name)
        if (folder / PROVENANCE_FILE).is_file():
            found.append(StoredModel(name, "catalogue", folder, _size(folder)))
    cache = _hub_cache()
    repositories = [] if cache is None else sorted(cache.repos, key=lambda one: one.repo_id)
    return found + [_of_hub(repository) for repository in repositories if _is_model(repository)]


def stored_model(name: str) -> StoredModel:
    """Return one of `stored_models`. Raises ConfigError if there is none of this name."""
    models = stored_models()
    for model in models:
        if model.name == name:
            return model
    near = near_names(name, [model.name for model in models])[:2]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(
        f"no model {name!r} is on this machine. {hint}`sempre list` shows all; `sempre pull` downloads one.",
        parameter="model",
        value=name,
    )


def remove_model(name: str) -> int:
    """Delete a model of the catalogue or the hub, in all revisions, and return its size in bytes.

    Raises ConfigError for an unknown model and one of the package.
    """
    model = stored_model(name)
    if model.source == "package":
        raise ConfigError(f"{name!r} is part of the package and is not removed.", parameter="model", value=name)
    if model.source == "catalogue":
        with exclusive(model.path):
            shutil.rmtree(model.path)
        return model.num_bytes
    cache = _hub_cache()
    assert cache is not None
    [repository] = [one for one in cache.repos if one.repo_id == name and one.repo_type == "model"]
    cache.delete_revisions(*(revision.commit_hash for revision in repository.revisions)).execute()
    return model.num_bytes


def _hub_cache() -> HFCacheInfo | None:
    # imported late: half a second that the other sources do without
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _is_model(repository: CachedRepoInfo) -> bool:
    """Whether some revision has what `resolve_model` needs."""
    names = {file.file_name for revision in repository.revisions for file in revision.files}
    is_usable = any(name == "config.json" or name.endswith(".gguf") for name in names)
    return repository.repo_type == "model" and is_usable


def _of_hub(repository: CachedRepoInfo) -> StoredModel:
    """The revision that `main` names, else the newest."""
    revision = max(repository.revisions, key=lambda one: ("main" in one.refs, one.last_modified))
    return StoredModel(repository.repo_id, "hub", revision.snapshot_path, repository.size_on_disk)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
