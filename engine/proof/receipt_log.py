"""Files of receipts: only appended to, each line naming the digest of the one before, so that nothing can be removed
or altered unnoticed except at the end.

An engine writes a file of its own. A line is one write of the whole text, so a process that is killed leaves whole
lines, or one torn line at the end; what was written is never changed. Only a machine that loses power may lose the last
lines.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from sempre.engine.proof.dsse import Verifier, check_signatures, payload_of
from sempre.engine.proof.json_lines import JsonLine, line_error, read_json_lines
from sempre.engine.proof.statement import Statement, decode
from sempre.ipc.errors import RecordError


class Receipt(NamedTuple):
    """One valid receipt."""

    path: Path
    line: int
    """from 1"""
    statement: Statement


class ReceiptLog:
    """The file of one engine, made with its first receipt."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder nothing is written, and no receipt names another. Raises RecordError for an unusable one."""
        self._folder = folder
        self._file: Path | None = None
        self._previous: str | None = None
        self._lock = Lock()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unwritable(folder, error) from error
            if not os.access(folder, os.W_OK):
                raise RecordError(f"receipts cannot be written to {folder}: permission denied.", path=str(folder))

    def append(self, make: Callable[[str | None], bytes]) -> bytes:
        """Append the line that `make` returns for the digest of the line before; return it.

        Raises RecordError if it cannot be written whole; the next one then begins a new file.
        """
        if self._folder is None:
            return make(None)
        with self._lock:
            line = make(self._previous)
            try:
                self._write(line + b"\n", self._folder)
            except OSError as error:
                self._file = self._previous = None
                raise _unwritable(self._folder, error) from error
            self._previous = line_digest(line)
        return line

    def _write(self, data: bytes, folder: Path) -> None:
        file = self._file or folder / _new_name()
        # the first line makes the file, the others need one that is still there
        flags = os.O_CREAT | os.O_EXCL if self._file is None else 0
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | flags, 0o666)
        self._file = file
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        finally:
            os.close(descriptor)


def line_digest(line: bytes) -> str:
    """Return the SHA-256 of a line without its line feed, in hex digits."""
    return hashlib.sha256(line).hexdigest()


def receipt_files(path: Path) -> list[Path]:
    """Return the files of a folder of receipts, in order of their names, or the one file. Raises RecordError."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise RecordError(f"{path}: expected files of receipts (*.jsonl), found none.", path=str(path))
    return files


def read_receipts(path: Path, keys: Sequence[Verifier] = ()) -> Iterator[Receipt | RecordError]:
    """Yield each receipt of a file, or the error of its line: torn, altered, unsigned, of another version, or after a
    line that was altered or removed. With `keys`, one of them must have signed it.

    Raises RecordError if the file cannot be read.
    """
    before: JsonLine | None = None
    for line in read_json_lines(path):
        yield _receipt(path, line, before, keys)
        before = line


class ReceiptFollower:
    """Reads files that still grow: each call has what was added since, as far as its lines are whole."""

    def __init__(self, keys: Sequence[Verifier] = ()) -> None:
        """As for `read_receipts`."""
        self._keys = keys
        self._read: dict[Path, tuple[int, JsonLine | None]] = {}

    def added(self, path: Path) -> Iterator[Receipt | RecordError]:
        """Yield the new receipts of a file or folder, which may be empty. Raises RecordError if it cannot be read."""
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            offset, before = self._read.get(file, (0, None))
            for line in read_json_lines(file, offset, 0 if before is None else before.number):
                if not line.is_whole:
                    break
                offset += len(line.text) + 1
                yield _receipt(file, line, before, self._keys)
                before = line
                self._read[file] = offset, before


def is_receipt(value: dict[str, object]) -> bool:
    """Whether this is an envelope of any kind."""
    return "payloadType" in value and "payload" in value


def _receipt(path: Path, line: JsonLine, before: JsonLine | None, keys: Sequence[Verifier]) -> Receipt | RecordError:
    if line.error is not None:
        return line.error
    try:
        payload = payload_of(line.value)
        statement = decode(payload)
        if keys:
            check_signatures(line.value, payload, keys)
        _check_chain(statement, before)
    except ValueError as error:
        return line_error(path, line.number, str(error))
    return Receipt(path, line.number, statement)


def _check_chain(statement: Statement, before: JsonLine | None) -> None:
    """Raise ValueError unless the statement names the line before."""
    named = statement.predicate.run_details.metadata.previous
    if before is None and named is not None:
        raise ValueError("previous: expected none in the first line of a file, found one: lines before it are missing")
    if before is not None and named != line_digest(before.text):
        raise ValueError(
            f"previous: expected the digest of the line before ({line_digest(before.text)[:16]}…), found"
            f" {'none' if named is None else named[:16] + '…'}: a line was altered, removed or inserted"
        )


def _new_name() -> str:
    """Return the name of a new file; names sort by time."""
    return f"receipts-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S.%fZ')}-{os.getpid()}.jsonl"


def _unwritable(folder: Path, error: OSError) -> RecordError:
    return RecordError(f"a receipt could not be written to {folder}: {error.strerror or error}.", path=str(folder))
