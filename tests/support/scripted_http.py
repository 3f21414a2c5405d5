"""An HTTP server that gives scripted answers, in the script's own pieces, and records what it was sent."""

from __future__ import annotations

import json
import ssl
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODELS = {"object": "list", "data": [{"id": "scripted", "object": "model", "root": "tiny"}]}


@dataclass(frozen=True)
class Answer:
    """A status, headers, and a body in pieces; `cut` closes the connection before the body's end."""

    status: int = 200
    pieces: Sequence[bytes] = ()
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(status, [json.dumps(value).encode()], {"Content-Type": "application/json", **headers})


def refusal(message: str, status: int, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "type": "x", "param": "p", "code": status}}, status, **headers)


def events(*chunks: Any, done: bool = True) -> bytes:
    written = b"".join(b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n" for chunk in chunks)
    return written + (b"data: [DONE]\n\n" if done else b"")


def text_chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None, "seed": 7}], **more}


@dataclass
class Scripted:
    url: str
    bodies: list[dict[str, Any]]
    headers: list[dict[str, str]]


@contextmanager
def scripted_server(
    script: Callable[[str, dict[str, Any]], Answer], tls: ssl.SSLContext | None = None
) -> Iterator[Scripted]:
    """Serve until the end of the block; `script(path, body)` answers each POST."""
    record = Scripted("", [], [])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(as_json(MODELS))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            record.bodies.append(body)
            record.headers.append({name.lower(): value for name, value in self.headers.items()})
            self._send(script(self.path, body))

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for piece in answer.pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                self.wfile.flush()
            if answer.cut:
                self.close_connection = True
            else:
                self.wfile.write(b"0\r\n\r\n")

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        # clients that connect at once; the default of 5 would refuse some
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            """A client that leaves in the middle of an answer is no error of the test; others are shown."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                traceback.print_exc()

    with Server(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        record.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}"
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield record
        finally:
            server.shutdown()
            thread.join()
