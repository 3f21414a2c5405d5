"""A folder that describes a GGUF checkpoint as transformers' files do: configuration, tokenizer, index of tensors.

The weights stay in the GGUF files, which workers map.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from sempre.engine.models.cache import cache_folder, exclusive
from sempre.engine.models.gguf_families import Family, Shape, Target, config_of, family_of, read_shape, targets
from sempre.engine.models.gguf_file import GgufFile, mismatch, open_gguf, shards_of
from sempre.engine.models.gguf_rope import TENSORS_OF_ROPE
from sempre.ipc.gguf_index import GgufFile as IndexedFile
from sempre.ipc.gguf_index import GgufIndex, IndexEntry, write_gguf_index

FOLDER_REVISION = 2
"""Increased whenever the same GGUF would give different files, so that older folders are made again."""


def gguf_folder(path: Path) -> Path:
    """Return the folder for a GGUF file, or for the first of its shards; it is made once for each state of the files.

    Raises ModelError naming the file and what does not fit, or if the cache folder is not writable.
    """
    facts = [str(FOLDER_REVISION)]
    for shard in shards_of(path):
        status = shard.stat()
        facts.append(f"{shard.resolve()} {status.st_size} {status.st_mtime_ns}")
    name = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    target = cache_folder() / "gguf" / name
    if not target.is_dir():
        with exclusive(target):
            if not target.is_dir():
                partial = target.with_name(f".{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
                try:
                    write_gguf_folder(path, partial)
                    os.rename(partial, target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    return target


def write_gguf_folder(path: Path, folder: Path, *, shown_path: Callable[[Path], str] | None = None) -> None:
    """Write the new folder `folder`; `shown_path` says how the index names a file (default: by its absolute path).

    Raises ModelError (TensorMismatch for a tensor) naming the invalid field or tensor; anything unknown is an error.
    """
    from sempre.engine.models.gguf_tokenizer import write_tokenizer

    file = open_gguf(path)
    family = family_of(file)
    shape = read_shape(file)
    folder.mkdir(parents=True)
    facts = write_tokenizer(file.metadata, folder, context_length=shape.context_length)
    vocab_size = _vocab_size(file, facts.num_tokens)
    config = config_of(file, family, shape, vocab_size)
    file.metadata.refuse_unread()
    entries = _entries(file, family, shape, config)
    ids: dict[str, object] = {
        name: token_id for name, token_id in facts.special_ids.items() if name in ("bos_token_id", "pad_token_id")
    }
    # also where there is none: a config that is silent has its family's default
    ids["eos_token_id"] = facts.eos_ids[0] if len(facts.eos_ids) == 1 else facts.eos_ids
    _write_json(folder / "config.json", config | ids)
    _write_json(folder / "generation_config.json", ids)
    named = shown_path or (lambda shard: str(shard.resolve()))
    files = tuple(IndexedFile(named(shard), shard.stat().st_size) for shard in file.shards)
    write_gguf_index(folder, GgufIndex(files, entries))


def _vocab_size(file: GgufFile, num_tokens: int) -> int:
    """Rows of the embedding; there may be more of them than tokens."""
    name = "token_embd.weight"
    stored = file.tensors.get(name)
    if stored is None or len(stored.shape) != 2 or stored.shape[0] < num_tokens:
        found = "nothing" if stored is None else str(stored.shape)
        raise mismatch(file.path, name, f"two dimensions, of which the first has at least {num_tokens} rows", found)
    return stored.shape[0]


def _entries(file: GgufFile, family: Family, shape: Shape, config: dict[str, object]) -> dict[str, IndexEntry]:
    counts = [config[name] for name in ("num_experts", "num_local_experts") if name in config]
    num_experts = int(str(counts[0])) if counts else 0
    wanted = targets(file, family, shape, num_experts)
    for name in (name for target in wanted.values() for name in target.sources):
        if name not in file.tensors:
            raise mismatch(file.path, name, f"a tensor of {file.architecture}", "nothing")
    read = {name for target in wanted.values() for name in target.sources}
    for name, stored in file.tensors.items():
        if name not in read and name not in TENSORS_OF_ROPE:
            raise mismatch(file.path, name, f"no such tensor in {file.architecture}", f"shape {stored.shape}")
    return {name: _entry(file, target) for name, target in wanted.items()}


def _entry(file: GgufFile, target: Target) -> IndexEntry:
    return IndexEntry(tuple(file.tensors[name] for name in target.sources), target.form, target.number)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
