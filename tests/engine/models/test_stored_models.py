"""`sempre list`, `show`, `rm`, and `pull` from a hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sempre.engine.models.cache import model_cache_folder
from sempre.engine.models.pull import PROVENANCE_FILE

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3, "vocab_size": 7}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    # not needed, and not fetched
    "pytorch_model.bin": b"pickle",
    "original/consolidated.safetensors": b"twice",
}


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A server with the parts of the hub's interface that a download uses, and the files that were asked for."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if path.startswith("/api/models/org/name"):
                siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
                if "/tree/" in path:
                    document = [
                        {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                        for name, data in FILES.items()
                    ]
                else:
                    document = {"id": "org/name", "sha": COMMIT, "siblings": siblings}  # type: ignore[assignment]
                self._send(200, json.dumps(document).encode(), with_body)
            elif path.startswith("/org/name/resolve/") and path.split("/", 5)[5] in FILES:
                name = path.split("/", 5)[5]
                if with_body:
                    fetched.append(name)
                self._send(200, FILES[name], with_body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, status: int, data: bytes, with_body: bool) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{_etag(data)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", fetched
        server.shutdown()
        thread.join()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def sempre(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its settings once, on import."""
    own = {"HF_HOME": str(root / "hf"), "SEMPRE_CACHE": str(root / "cache"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "sempre.engine", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **own},
    )


def test_a_model_of_the_hub_is_pulled_listed_shown_and_removed(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    url, fetched = hub
    pulled = sempre(tmp_path, "pull", "org/name", HF_ENDPOINT=url)
    assert pulled.returncode == 0, pulled.stderr
    folder = Path(pulled.stdout.strip())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in ("config.json", "model.safetensors", "tokenizer.json")
    }
    assert sorted(fetched) == ["config.json", "model.safetensors", "tokenizer.json"]
    again = sempre(tmp_path, "pull", "org/name", HF_ENDPOINT=url)
    assert (again.stdout, len(fetched)) == (pulled.stdout, 3)

    listed = json.loads(sempre(tmp_path, "list", "--json").stdout)
    assert [model["name"] for model in listed] == ["tiny", "tiny-draft", "org/name"]
    assert (listed[2]["source"], Path(listed[2]["path"])) == ("hub", folder)
    facts = json.loads(sempre(tmp_path, "show", "org/name", "--json").stdout)
    assert (facts["architecture"], facts["layers"], facts["vocabulary"]) == (["LlamaForCausalLM"], 3, 7)

    removed = sempre(tmp_path, "rm", "org/name")
    assert removed.stdout == "org/name: 0.0 MB removed\n"
    assert not folder.exists()
    assert len(json.loads(sempre(tmp_path, "list", "--json").stdout)) == 2


def test_a_model_that_the_hub_does_not_have_is_refused(tmp_path: Path, hub: tuple[str, list[str]]) -> None:
    result = sempre(tmp_path, "pull", "org/other", HF_ENDPOINT=hub[0])
    assert result.returncode == 3
    assert "model 'org/other' could not be fetched from the hub" in result.stderr


def test_a_model_of_the_catalogue_is_listed_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMPRE_CACHE", str(tmp_path / "cache"))
    assert "sempre pull smollm2-135m (92.9 MB)" in sempre(tmp_path, "list").stdout
    folder = model_cache_folder("smollm2-135m")
    folder.mkdir(parents=True)
    (folder / PROVENANCE_FILE).write_text("{}")
    lines = sempre(tmp_path, "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["tiny", "tiny-draft", "smollm2-135m"]
    assert sempre(tmp_path, "rm", "smollm2-135m").returncode == 0
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rm", "tiny"), "'tiny' is part of the package and is not removed."),
        (("show", "tinny"), "no model 'tinny' is on this machine. Did you mean tiny"),
        (("rm",), "no model given"),
        (("rm", "tiny", "absent"), "no model 'absent' is on this machine."),
    ],
)
def test_refused(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = sempre(tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_what_is_in_the_package_is_shown(tmp_path: Path) -> None:
    shown = sempre(tmp_path, "show", "tiny").stdout
    assert "architecture:          LlamaForCausalLM" in shown
