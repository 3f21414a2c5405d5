"""A client of one server: its address and key, plain and streamed calls."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.parser import UsageError
from sempre.ipc.errors import RequestError, ServerError

if TYPE_CHECKING:
    import ssl

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLES = ("SEMPRE_API_KEY", "OPENAI_API_KEY")
# Connecting and queries about the server are quick or fail; the first token may wait in a long queue.
CONNECT_TIMEOUT_S = 10.0
_QUESTION_TIMEOUT_S = 30.0
_SILENCE_TIMEOUT_S = 600.0
# Servers close longer idle connections, perhaps just when they are reused.
_MOST_IDLE_S = 2.0
DONE = b"[DONE]"
MAX_LINE_BYTES = 16 * 1024 * 1024


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--url`, `--api-key` and the flags about certificates."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help="address of a running server, with or without /v1")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"key of the server; better set in the environment, as {' or '.join(KEY_VARIABLES)}",
    )
    add_certificate_flags(group)


def add_certificate_flags(group: argparse._ActionsContainer) -> None:
    """Add `--ca-file` and `--insecure`."""
    group.add_argument("--ca-file", metavar="FILE", help="certificate authorities to trust, PEM (https only)")
    group.add_argument("--insecure", action="store_true", help="accept any certificate of the server")


def certificate_check(namespace: argparse.Namespace) -> ssl.SSLContext | bool:
    """How a server's certificate is checked, as httpx takes it. Raises UsageError for an unusable file."""
    import ssl

    if namespace.ca_file is None:
        return not namespace.insecure
    if namespace.insecure:
        raise UsageError("--ca-file and --insecure exclude each other")
    try:
        return ssl.create_default_context(cafile=namespace.ca_file)
    except OSError as error:  # of ssl, too
        raise UsageError(f"--ca-file {namespace.ca_file}: no certificates in PEM could be read: {error}") from error


def headers_for(api_key: str | None) -> dict[str, str]:
    """Return the header that carries the key: the one given, else the first set in the environment."""
    key = api_key or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def base_url(url: str) -> str:
    """Return the address without `/v1`. Raises UsageError for anything but an HTTP address."""
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"--url must begin with http:// or https://, got {url!r}; for example {DEFAULT_URL}")
    return url.rstrip("/").removesuffix("/v1")


def connect(namespace: argparse.Namespace, url: str | None = None) -> Server:
    """The server at `url`, or else that of `--url`, with the key and the check of the flags."""
    return Server(url or namespace.url, namespace.api_key, verify=certificate_check(namespace))


class Server:
    """A running server; `with` closes its connections."""

    def __init__(self, url: str, api_key: str | None = None, *, verify: ssl.SSLContext | bool = True) -> None:
        """`verify`: see `certificate_check`."""
        import httpx

        self.url = base_url(url)
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers_for(api_key),
            timeout=httpx.Timeout(_QUESTION_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(keepalive_expiry=_MOST_IDLE_S),
            verify=verify,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def models(self) -> list[dict[str, Any]]:
        """Return the cards of the served models, at least one."""
        document = self.get("/v1/models")
        cards = document.get("data") if isinstance(document, dict) else None
        if not cards or not all(isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards):
            raise ServerError(f"{self.url}/v1/models names no model: {document!r}", url=self.url)
        return list(cards)

    def model(self, wanted: str | None) -> str:
        """Return the name of the model to use: `wanted`, which must be served, or else the first served one."""
        served = [str(card["id"]) for card in self.models()]
        if wanted is not None and wanted not in served:
            raise UsageError(f"{self.url} does not serve {wanted!r}; it serves {', '.join(served)}")
        return wanted or served[0]

    def get(self, path: str) -> Any:
        """Return a JSON document."""
        with self._failures():
            response = self._client.get(path)
        _check(self.url, response.status_code, response.content)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} answered with something that is not JSON", url=self.url) from None

    def post(self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Any:
        """Return the JSON document that answers `body`. Raises RequestError if it is refused, ServerError."""
        import httpx

        patience = httpx.Timeout(_SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with self._failures():
            response = self._client.post(path, json=body, headers=headers, timeout=patience)
        _check(self.url, response.status_code, response.content)
        try:
            return response.json()
        except ValueError:
            raise ServerError(f"{self.url}{path} answered with something that is not JSON", url=self.url) from None

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a streamed answer. Leaving the loop closes the connection, which ends the request.

        Raises RequestError if the request is refused, also in mid-stream; ServerError if the server fails,
        disconnects, or ends the stream without its final event.
        """
        splitter = EventSplitter()
        import httpx

        patience = httpx.Timeout(_SILENCE_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        with self._failures(), self._client.stream("POST", path, json=body, timeout=patience) as response:
            if response.status_code != 200:
                _check(self.url, response.status_code, response.read())
            for received in response.iter_raw():
                for event in _events(splitter, received, self.url):
                    if event == DONE:
                        return
                    yield _chunk(self.url, event)
        raise ServerError(f"{self.url} ended the response too early", url=self.url)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.TimeoutException as error:
            raise ServerError(f"{self.url} did not answer in time ({type(error).__name__})", url=self.url) from None
        except httpx.ConnectError as error:
            raise ServerError(
                f"no server answers at {self.url} ({error}); `sempre serve MODEL` starts one", url=self.url
            ) from None
        except httpx.HTTPError as error:
            raise ServerError(
                f"the connection to {self.url} failed: {str(error) or type(error).__name__}", url=self.url
            ) from None


def _events(splitter: EventSplitter, received: bytes, url: str) -> list[bytes]:
    try:
        return splitter.feed(received)
    except ValueError as error:
        raise ServerError(f"{url} sent something that is not an event stream: {error}", url=url) from None


def _chunk(url: str, event: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(event)
    except ValueError:
        chunk = None
    if not isinstance(chunk, dict):
        raise ServerError(f"{url} sent an event that is not a JSON object: {event[:200]!r}", url=url)
    if "error" in chunk:
        code = chunk["error"].get("code") if isinstance(chunk["error"], dict) else None
        _refuse(url, code if isinstance(code, int) else 500, chunk)
    return chunk


def _check(url: str, status: int, content: bytes) -> None:
    if status < 400:
        return
    try:
        document = json.loads(content)
    except ValueError:
        document = content.decode(errors="replace").strip()
    _refuse(url, status, document)


def _refuse(url: str, status: int, document: Any) -> None:
    """Raise the server's error message: RequestError for 400 to 499, ServerError for the rest."""
    error = document.get("error", document) if isinstance(document, dict) else document
    message = error.get("message", error) if isinstance(error, dict) else error
    text = f"{message or 'no reason given'} (status {status})"
    if 400 <= status < 500:
        parameter = error.get("param") if isinstance(error, dict) else None
        raise RequestError(text, parameter=parameter)
    raise ServerError(f"{url}: {text}", url=url, status=status)


class EventSplitter:
    """Splits a response's bytes, in any chunks, into the data of its events.

    Of server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) only the part that
    OpenAI's interface uses is supported: events end with an empty line and have one `data:` line; comments and
    other fields are skipped. Lines end with LF or CRLF.
    """

    def __init__(self) -> None:
        # of the incomplete line
        self._parts: list[bytes] = []
        self._length = 0

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that `received` completes, in order. Raises ValueError for a long line."""
        if b"\n" not in received:
            self._parts.append(received)
            self._length += len(received)
            if self._length > MAX_LINE_BYTES:
                raise ValueError(f"a line of a stream has more than {MAX_LINE_BYTES} bytes")
            return []
        lines = b"".join([*self._parts, received]).split(b"\n")
        rest = lines.pop()
        self._parts, self._length = [rest], len(rest)
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
