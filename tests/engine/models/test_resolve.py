"""Which of folder, embedded name, catalogue name and hub id a model argument means."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sempre.engine.checkpoints import EMBEDDED
from sempre.engine.models import CATALOG, cache_folder, resolve_model
from sempre.engine.models.cache import exclusive, model_cache_folder
from sempre.ipc.errors import ConfigError, ModelError


def make_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_a_local_folder_wins_over_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "org/model", "smollm2-135m"):
        folder = make_folder(tmp_path / name)
        resolved = resolve_model(name)
        assert resolved.name == name
        assert resolved.path == folder.resolve()


def test_embedded_names_are_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in EMBEDDED:
        path = resolve_model(name).path
        assert path.name == name
        assert (path / "config.json").is_file()
        assert (path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tinny", "not a local folder.*Did you mean tiny"),
        ("SmolLM2-135M", "Did you mean smollm2-135m.*Known names: tiny, tiny-draft, smollm2-135m"),
        ("./nowhere", "looks like a path, but .*nowhere does not exist"),
        ("/nowhere/at/all", "looks like a path"),
        ("empty", "is a folder without config.json"),
        ("weights.bin", "is a file .*a GGUF file or a folder"),
    ],
)
def test_unknown_models_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=said) as refusal:
        resolve_model(model)
    assert refusal.value.parameter == "model"
    assert refusal.value.value == model


@pytest.mark.parametrize("model", ["", None, 3])
def test_model_must_be_a_string(model: object) -> None:
    with pytest.raises(ConfigError, match="model must be a non-empty string"):
        resolve_model(model)  # type: ignore[arg-type]


def test_revision_is_for_hub_ids(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here")
    for model in (str(folder), "tiny", *CATALOG):
        with pytest.raises(ConfigError, match="revision applies to a hub id") as refusal:
            resolve_model(model, revision="main")
        assert refusal.value.parameter == "revision"


def test_a_hub_id_is_read_from_the_hub_cache_when_offline(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its settings once, on import."""
    snapshot = tmp_path / "hub" / "models--org--cached" / "snapshots" / "0123"
    make_folder(snapshot)
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    code = (
        "from sempre.engine.models import resolve_model\n"
        "from sempre.ipc.errors import ModelError\n"
        "print(resolve_model('org/cached', progress=False).path)\n"
        "try:\n"
        "    resolve_model('org/absent', progress=False)\n"
        "except ModelError as error:\n"
        "    print(str(error).replace('\\n', ' '))\n"
    )
    lines = run_python(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)).splitlines()
    assert Path(lines[0]) == snapshot
    assert lines[1].startswith("model 'org/absent' could not be fetched from the hub")
    assert "Known names: tiny" in lines[1]


def test_resolving_a_folder_imports_neither_torch_nor_the_hub(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here")
    code = (
        "import sys\n"
        "from sempre.engine.models import resolve_model\n"
        f"resolve_model({str(folder)!r})\n"
        "print([name for name in ('torch', 'huggingface_hub', 'transformers', 'gguf') if name in sys.modules])\n"
    )
    assert run_python(code).strip() == "[]"


def run_python(code: str, **environment: str) -> str:
    merged = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True, check=True).stdout


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEMPRE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "sempre"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache" / "sempre"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "sempre"
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "own"))
    assert model_cache_folder("a") == tmp_path / "own" / "models" / "a"
    monkeypatch.setenv("SEMPRE_CACHE", "relative")
    with pytest.raises(ConfigError, match="SEMPRE_CACHE must be an absolute path"):
        cache_folder()


def test_a_path_object_is_a_model(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here")
    assert resolve_model(folder).path == folder.resolve()
    assert resolve_model(folder).name == str(folder)


def test_a_relative_cache_folder_is_refused_for_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_CACHE", "here")
    with pytest.raises(ConfigError, match="SEMPRE_CACHE must be an absolute path, got 'here'"):
        resolve_model("tiny")


def test_a_cache_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = r"the cache folder .*/file cannot be written to: .*Set SEMPRE_CACHE"
    with pytest.raises(ModelError, match=said), exclusive(tmp_path / "file" / "model"):
        pytest.fail("the lock was given")
