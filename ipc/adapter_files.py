"""The files of a low-rank adapter, as PEFT saves it, and the digest that identifies their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import MAX_CONFIG_BYTES, check_regular, read_bytes

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_CHUNK = 1 << 20


def adapter_digest(folder: Path) -> str:
    """Return SHA-256 (hex) over both files' lengths and bytes. Raises ModelError naming the file."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: expected the folder of an adapter, found {'a file' if folder.exists() else 'nothing'}."
        )
    config = read_bytes(folder / CONFIG_FILE, MAX_CONFIG_BYTES)
    weights = folder / WEIGHTS_FILE
    if not weights.exists() and (folder / _PICKLED_FILE).exists():
        raise ModelError(
            f"{folder}: expected {WEIGHTS_FILE}, found {_PICKLED_FILE}; pickled weights are refused. Save the adapter "
            "with safe_serialization=True."
        )
    size = check_regular(weights)
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config + size.to_bytes(8, "little"))
    try:
        with weights.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ModelError(f"{weights}: cannot be read: {error}") from error
    return digest.hexdigest()
