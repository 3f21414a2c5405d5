"""Resolves the `model` argument to a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sempre.engine.checkpoints import EMBEDDED, embedded_checkpoint
from sempre.engine.models.cache import cache_folder
from sempre.engine.models.pull import CATALOG, pull
from sempre.engine.near_names import near_names
from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.model_files import read_json_object

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja")
_TOKENIZER_FILES = ("tokenizer*", "*config.json", "*.jinja")
# Sub-folders hold other formats, except those of sentence-transformers' modules, such as 1_Pooling; consolidated files
# repeat the same weights under other tensor names.
_HUB_IGNORED = ("[!0-9]*/*", "*/*.safetensors", "*/*.jinja", "*/*/*", "consolidated*.safetensors")


_HUB_GGUF = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+):([A-Za-z0-9_]+)")
# a file, and the shards of one; either may be in a folder
_GGUF_FORMS = ("*{}.gguf", "*{}-?????-of-?????.gguf")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A resolved model: `name` as the user wrote it, `path` the local folder with its config.json.

    For a GGUF file, the folder describes it (`gguf_folder`)."""

    name: str
    path: Path


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download_dir: str | None = None,
    progress: bool = True,
) -> ResolvedModel:
    """Find `model`; the first match is used.

    1. a local folder that holds a config.json
    2. a local file `….gguf`, or the first of its shards `…-00001-of-00003.gguf`
    3. an embedded name (`tiny`, `tiny-draft`)
    4. a catalogue name (`smollm2-135m`), pulled into the cache on first use
    5. a hub id `org/name`, through huggingface_hub, which honours `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN`;
       `org/name:Q4_K_M` is the GGUF file of that repository whose name ends so

    `revision` is a branch, tag or commit of a hub id and is refused for anything else. `download_dir` replaces the
    hub's own cache folder and is refused for models of the catalogue. `progress` shows bars during downloads.
    Raises ConfigError for an unknown model, ModelError if a download or a conversion fails.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if not isinstance(model, str) or not model:
        raise ConfigError(f"model must be a non-empty string or a path, got {model!r}.", parameter="model", value=model)
    cache_folder()  # raises for a relative SEMPRE_CACHE before a worker fills that folder
    local = Path(model).expanduser()
    if (local / "config.json").is_file():
        _refuse_revision(model, revision)
        return ResolvedModel(model, local.resolve())
    if local.is_file() and local.suffix == ".gguf":
        _refuse_revision(model, revision)
        return ResolvedModel(model, _described(local))
    embedded = embedded_checkpoint(model)
    if embedded is not None:
        _refuse_revision(model, revision)
        return ResolvedModel(model, embedded)
    if model in CATALOG:
        _refuse_revision(model, revision)
        if download_dir is not None:
            raise ConfigError(
                f"download_dir is for hub ids (org/name); {model!r} comes from the catalogue. Set the environment "
                "variable SEMPRE_CACHE to choose its folder.",
                parameter="download_dir",
                value=download_dir,
            )
        return ResolvedModel(model, pull(model, progress=progress))
    of_hub = _HUB_GGUF.fullmatch(model)
    if not local.exists() and of_hub:
        files = tuple(form.format(of_hub[2]) for form in _GGUF_FORMS)
        folder = _fetch_from_hub(of_hub[1], revision, download_dir, progress, files, ())
        return ResolvedModel(model, _described(_gguf_in(folder, of_hub[1], of_hub[2])))
    if not local.exists() and _HUB_ID.fullmatch(model):
        folder = _fetch_from_hub(model, revision, download_dir, progress)
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"hub repository {model!r} has no config.json, so it is not a transformers-style model folder."
            )
        return ResolvedModel(model, folder)
    raise _unknown(model, local)


def _described(file: Path) -> Path:
    # imports numpy and others, which other models do not need
    from sempre.engine.models.gguf_folder import gguf_folder

    return gguf_folder(file)


def _gguf_in(folder: Path, repository: str, kind: str) -> Path:
    """The one file of this kind, or the first of its shards."""
    forms = (f"*{kind}.gguf", f"*{kind}-00001-of-?????.gguf")
    # another kind may end with the same letters: Q4_K is the end of XQ4_K
    whole = re.compile(rf"(.*[^A-Za-z0-9_])?{re.escape(kind)}(-\d{{5}}-of-\d{{5}})?\.gguf")
    found = sorted({path for form in forms for path in folder.rglob(form) if whole.fullmatch(path.name)})
    if len(found) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise ModelError(f"hub repository {repository!r}: expected one GGUF file named …{kind}.gguf, found {names}.")
    return found[0]


def resolve_tokenizer(
    tokenizer: str, *, revision: str | None = None, download_dir: str | None = None, progress: bool = True
) -> Path:
    """Return the folder of a tokenizer: a local one, an embedded name's, a hub id's.

    Raises ConfigError for an unknown tokenizer, ModelError if a download fails.
    """
    local = Path(tokenizer).expanduser()
    known = local if local.is_dir() else embedded_checkpoint(tokenizer)
    if known is not None:
        if revision is not None:
            raise ConfigError(
                f"tokenizer_revision applies to a hub id (org/name) only, and {tokenizer!r} is none; got "
                f"tokenizer_revision={revision!r}.",
                parameter="tokenizer_revision",
                value=revision,
            )
        return known.resolve()
    if not _HUB_ID.fullmatch(tokenizer):
        raise ConfigError(
            f"tokenizer {tokenizer!r} is neither a local folder nor a hub id (org/name).",
            parameter="tokenizer",
            value=tokenizer,
        )
    return _fetch_from_hub(tokenizer, revision, download_dir, progress, _TOKENIZER_FILES)


def refuse_remote_code(folder: Path) -> None:
    """Raise ConfigError if the checkpoint brings its own code (`auto_map`), which trust_remote_code would run."""
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        try:
            found = read_json_object(path) if path.exists() else {}
        except ModelError:  # reported where the file is needed
            continue
        if found.get("auto_map"):
            raise ConfigError(
                f"trust_remote_code=True: {path} names code of the checkpoint (auto_map), and such code is never run. "
                "Leave it out to use the model without its code.",
                parameter="trust_remote_code",
                value=True,
            )


def _refuse_revision(model: str, revision: str | None) -> None:
    if revision is not None:
        raise ConfigError(
            f"revision applies to a hub id (org/name) only, and model {model!r} is none; got revision={revision!r}.",
            parameter="revision",
            value=revision,
        )


def _fetch_from_hub(
    model: str,
    revision: str | None,
    download_dir: str | None,
    progress: bool,
    files: Sequence[str] = _HUB_FILES,
    ignored: Sequence[str] = _HUB_IGNORED,
) -> Path:
    import huggingface_hub
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet_before = are_progress_bars_disabled()
    if not progress:
        disable_progress_bars()
    try:
        snapshot = huggingface_hub.snapshot_download(
            model,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=list(files),
            ignore_patterns=list(ignored),
        )
    # OSError: the hub's HTTP, offline and not-found errors; ValueError: a malformed id or revision.
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {model!r} could not be fetched from the hub: {type(error).__name__}: {error}\n"
            f"It is not a local folder either. {_known_names(model)}"
        ) from error
    finally:
        if not quiet_before:
            enable_progress_bars()
    return Path(snapshot)


def _unknown(model: str, local: Path) -> ConfigError:
    if local.is_dir():
        found = f"is a folder without config.json ({local.resolve()})"
    elif local.is_file():
        found = (
            f"is a file ({local.resolve()}), and a GGUF file or a folder with config.json and *.safetensors is needed"
        )
    elif os.sep in model or model.startswith(("~", ".")):
        found = f"looks like a path, but {local.absolute()} does not exist"
    else:
        found = "is not a local folder, a known name or a hub id (org/name)"
    return ConfigError(f"model {model!r} {found}. {_known_names(model)}", parameter="model", value=model)


def _known_names(model: str) -> str:
    known = [*EMBEDDED, *CATALOG]
    near = near_names(model.lower().rpartition("/")[2], known, cutoff=0.5)[:2]
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{hint}Known names: {', '.join(known)}."
