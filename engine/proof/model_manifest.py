"""The digest of a model's files as the OpenSSF model-signing specification has it, so that it can be compared with the
signature that a publisher ships: SHA-256 over the SHA-256 digests of all files, sorted by path.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sempre.ipc.errors import ModelError

# what the specification's tools leave out by default
_LEFT_OUT = (".git", ".gitattributes", ".github", ".gitignore", ".cache")
_SIGNATURE = "model.sig"
_THREADS = 8


def model_files(folder: Path) -> list[str]:
    """Return the paths of a model's files below `folder`, sorted, with `/` between their parts."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in files if path.parts[0] not in _LEFT_OUT and path.as_posix() != _SIGNATURE)


def manifest_digest(folder: Path) -> str:
    """Return the digest in hex digits; files are hashed in threads. Raises ModelError for one that cannot be read."""
    names = model_files(folder)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        digests = list(pool.map(file_digest, [folder / name for name in names]))
    return hashlib.sha256(b"".join(digests)).hexdigest()


def file_digest(path: Path) -> bytes:
    """Return the SHA-256 of a file. Raises ModelError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}.") from error
