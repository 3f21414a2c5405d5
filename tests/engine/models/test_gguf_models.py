"""A GGUF file, its shards, or one of a hub repository given as the model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from gguf_files import finish

from sempre.engine.models import cache_folder, resolve_model
from sempre.ipc.errors import ConfigError, ModelError, TensorMismatch
from sempre.workers.gguf_source import open_gguf


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "cache"))


def split(source: Path, count: int, change: Callable[[GGUFWriter, int], None] = lambda writer, number: None) -> Path:
    """The same checkpoint in shards, of which the first has the metadata; returns its path."""
    reader = GGUFReader(source)
    paths = [source.with_name(f"s-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    for number, path in enumerate(paths):
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for name, field in reader.fields.items():
            if number == 0 and not name.startswith("GGUF.") and name != "general.architecture":
                writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        change(writer, number)
        finish(writer)
    return paths[0]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with open_gguf(folder) as source:
        return {name: source.read(name).clone() for name in source.names()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_a_file_is_described_once_and_its_weights_stay_in_it(tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path)
    resolved = resolve_model(path)
    assert resolved.name == str(path)
    assert resolved.path.parent == cache_folder() / "gguf"
    made = {file.name: file.stat().st_mtime_ns for file in resolved.path.iterdir()}
    assert set(made) == {
        "config.json",
        "generation_config.json",
        "model.gguf.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert resolve_model(path).path == resolved.path
    assert {file.name: file.stat().st_mtime_ns for file in resolved.path.iterdir()} == made


def test_another_file_of_the_same_name_is_described_anew(tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, tied=True)
    first = resolve_model(path).path
    write_gguf(path, tied=False)
    second = resolve_model(path).path
    assert second != first
    assert "lm_head.weight" in tensors(second)


def test_a_file_that_is_refused_leaves_nothing(tmp_path: Path, write_gguf: Any) -> None:
    path = tmp_path / "a.gguf"
    write_gguf(path, without="output_norm.weight")
    for _ in range(2):
        with pytest.raises(TensorMismatch, match=r"a\.gguf: GGUF tensor 'output_norm.weight'"):
            resolve_model(path)
    assert [each.name for each in (cache_folder() / "gguf").iterdir() if each.suffix != ".lock"] == []


@pytest.mark.parametrize("count", [2, 3])
def test_shards_are_one_checkpoint(tmp_path: Path, write_gguf: Any, count: int) -> None:
    write_gguf(tmp_path / "a.gguf")
    first = split(tmp_path / "a.gguf", count)
    assert_equal(tensors(resolve_model(first).path), tensors(resolve_model(tmp_path / "a.gguf").path))


def test_shards_that_do_not_belong_together_are_refused(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "a.gguf")
    first = split(tmp_path / "a.gguf", 2)
    second = first.with_name("s-00002-of-00002.gguf")
    whole = second.read_bytes()
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"s-00002-of-00002\.gguf: GGUF field 'split\.no': expected 1, found 0"):
        resolve_model(first)
    second.unlink()
    with pytest.raises(ModelError, match=r"s-00002-of-00002\.gguf: file not found"):
        resolve_model(first)
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"s-00002-of-00002\.gguf cannot be read as GGUF"):
        resolve_model(first)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "a.gguf")
    again = next(t for t in GGUFReader(tmp_path / "a.gguf").tensors if t.name == "output_norm.weight")

    def change(writer: GGUFWriter, number: int) -> None:
        if all(again.name not in group for group in writer.tensors):
            writer.add_tensor(again.name, again.data)

    with pytest.raises(
        TensorMismatch, match=r"'output_norm\.weight': expected one tensor of this name, found a second"
    ):
        resolve_model(split(tmp_path / "a.gguf", 2, change))


def snapshot(root: Path) -> Path:
    """An empty snapshot of `org/repo` in the hub's cache."""
    folder = root / "hub" / "models--org--repo" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    refs = folder.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    return folder


def resolve_offline(model: str, root: Path) -> str:
    """In a process of its own: huggingface_hub reads its settings once, on import."""
    code = (
        "from sempre.engine.models import resolve_model\n"
        "from sempre.ipc.errors import SempreError\n"
        "try:\n"
        f"    print(resolve_model({model!r}, progress=False).path)\n"
        "except SempreError as error:\n"
        "    print(str(error).replace('\\n', ' '))\n"
    )
    settings = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root), "SEMPRE_CACHE": str(root / "cache")}
    environment = {**os.environ, **settings, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def test_a_file_of_a_hub_repository_is_found_by_its_kind(tmp_path: Path, write_gguf: Any) -> None:
    folder = snapshot(tmp_path)
    (folder / "parts").mkdir()
    write_gguf(folder / "Model-Q8_0.gguf")
    write_gguf(folder / "parts" / "a.gguf")
    split(folder / "parts" / "a.gguf", 2).rename(folder / "parts" / "Model-F32-00001-of-00002.gguf")
    (folder / "parts" / "s-00002-of-00002.gguf").rename(folder / "parts" / "Model-F32-00002-of-00002.gguf")
    for kind in ("Q8_0", "F32"):
        found = Path(resolve_offline(f"org/repo:{kind}", tmp_path))
        assert found.parent == tmp_path / "cache" / "gguf"
        assert_equal(tensors(found), tensors(resolve_model(folder / "Model-Q8_0.gguf").path))
    write_gguf(folder / "Other-Q8_0.gguf")
    said = resolve_offline("org/repo:Q8_0", tmp_path)
    assert "expected one GGUF file named …Q8_0.gguf, found Model-Q8_0.gguf, Other-Q8_0.gguf" in said
    assert "named …Q2_K.gguf, found none" in resolve_offline("org/repo:Q2_K", tmp_path)


def test_a_revision_is_not_for_files(tmp_path: Path, write_gguf: Any) -> None:
    write_gguf(tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="revision applies to a hub id"):
        resolve_model(tmp_path / "a.gguf", revision="main")
