"""GGUF files whose counts, lengths and offsets lie: refused by name before the library counts to them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sempre.engine.models.gguf_check import check_gguf
from sempre.engine.models.gguf_folder import write_gguf_folder
from sempre.ipc.errors import ModelError
from sempre.workers.gguf_source import open_gguf

HEAD = b"GGUF" + struct.pack("<I", 3)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def gguf(fields: bytes = b"", num_fields: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return HEAD + struct.pack("<QQ", num_tensors, num_fields) + fields + tensors + b"\0" * 64


def array(kind: int, length: int, items: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, length) + items


def tensor(*sizes: int, offset: int = 0, kind: int = 0, num_dimensions: int | None = None) -> bytes:
    count = len(sizes) if num_dimensions is None else num_dimensions
    return text(b"t") + struct.pack(f"<I{len(sizes)}QIQ", count, *sizes, kind, offset)


LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "other letters": (b"GGML" + b"\0" * 60, "four letters GGUF"),
    "another version": (b"GGUF" + struct.pack("<I", 9) + b"\0" * 60, "expected version"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 60, "little-endian"),
    "a count of fields": (gguf(num_fields=2**60), "at most 4096 fields"),
    "a count of tensors": (gguf(num_tensors=2**63), "at most 65536 tensors"),
    "a key without end": (gguf(text(b"a", 2**62), 1), "field 0: expected a text of at most"),
    "a string without end": (gguf(text(b"a") + struct.pack("<I", 8) + text(b"", 2**62), 1), "a text of at most"),
    "a string beyond the end": (gguf(text(b"a") + struct.pack("<I", 8) + text(b"", 90), 1), "the end of the file"),
    "an unknown type": (gguf(text(b"a") + struct.pack("<I", 77), 1), "a known type"),
    "an array without end": (gguf(array(4, 2**60), 1), "items in all arrays"),
    "an array beyond the end": (gguf(array(4, 2**20), 1), "the end of the file"),
    "an array of strings without end": (gguf(array(8, 2**23), 1), "the end of the file"),
    "nested arrays": (gguf(array(9, 1) + struct.pack("<IQ", 9, 1) * 100_000, 1), "an array of numbers or strings"),
    "dimensions": (gguf(tensors=tensor(1, num_dimensions=2**31), num_tensors=1), "1 to 4 dimensions"),
    "no elements": (gguf(tensors=tensor(0, 5), num_tensors=1), "at least 1"),
    "more elements than bytes": (gguf(tensors=tensor(2**40), num_tensors=1), "tensor 0: expected its end within"),
    "a product beyond 64 bits": (gguf(tensors=tensor(2**63, 2**63, 4), num_tensors=1), "expected its end within"),
    "more blocks than bytes": (gguf(tensors=tensor(256, 2**30, kind=12), num_tensors=1), "expected its end within"),
    "one byte beyond the end": (gguf(tensors=tensor(17), num_tensors=1), "expected its end within"),
    "half a block": (gguf(tensors=tensor(40, 2, kind=8), num_tensors=1), "rows of whole blocks of 32"),
    "an offset beyond the end": (gguf(tensors=tensor(4, offset=2**63), num_tensors=1), "expected its end within"),
}


@pytest.mark.parametrize("name", LIES)
def test_lies(tmp_path: Path, name: str) -> None:
    data, message = LIES[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError) as refusal:
        write_gguf_folder(path, tmp_path / "out")
    assert str(path) in str(refusal.value)
    assert message in str(refusal.value)


def test_a_good_file_passes(tmp_path: Path, write_gguf: Callable[..., Any]) -> None:
    write_gguf(tmp_path / "a.gguf")
    check_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("llama.block_count", 10**9),
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", 2**31),
        ("llama.embedding_length", 2**31),
        ("llama.attention.key_length", 7),
        ("llama.context_length", 0),
    ],
)
def test_numbers_are_bounded(tmp_path: Path, write_gguf: Callable[..., Any], field: str, value: int) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(field, None)
        writer.add_uint32(field, value)

    write_gguf(tmp_path / "a.gguf", change=change)
    with pytest.raises(ModelError, match=field):
        write_gguf_folder(tmp_path / "a.gguf", tmp_path / "out")


@pytest.mark.parametrize("field", ["tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.token_type"])
def test_lists_of_another_kind(tmp_path: Path, write_gguf: Callable[..., Any], field: str) -> None:
    def change(writer: Any) -> None:
        writer.kv_data[0].pop(field, None)
        writer.add_array(field, [1.5, 2.5])

    write_gguf(tmp_path / "a.gguf", change=change)
    with pytest.raises(ModelError, match=field):
        write_gguf_folder(tmp_path / "a.gguf", tmp_path / "out")


def mutate(folder: Path, good: bytes, seed: int, runs: int) -> None:
    drawn = random.Random(seed)
    path = folder / "b.gguf"
    numbers = [b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 2**40), struct.pack("<I", 9), b"\xff", b""]
    for run in range(runs):
        data = bytearray(good)
        for _ in range(drawn.randint(1, 4)):
            at = drawn.randrange(drawn.choice([64, 2048, len(data)]))
            new = drawn.choice(numbers)
            data[at : at + drawn.choice([len(new), 0, 1])] = new
        path.write_bytes(data)
        try:
            write_gguf_folder(path, folder / f"out{run}")
            with open_gguf(folder / f"out{run}") as source:
                for name in source.names():
                    source.read(name)
        except ModelError:
            continue


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_files_that_nobody_foresaw(tmp_path: Path, write_gguf: Callable[..., Any]) -> None:
    """Either read or refused by an error of ours."""
    write_gguf(tmp_path / "a.gguf")
    mutate(tmp_path, (tmp_path / "a.gguf").read_bytes(), seed=1, runs=60)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("seed", range(20))
def test_many_files_that_nobody_foresaw(tmp_path: Path, write_gguf: Callable[..., Any], seed: int) -> None:
    write_gguf(tmp_path / "a.gguf")
    mutate(tmp_path, (tmp_path / "a.gguf").read_bytes(), seed=100 + seed, runs=1000)
