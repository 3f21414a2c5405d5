"""`sempre run-batch`: an OpenAI batch file, answered line by line (https://platform.openai.com/docs/guides/batch).

A line that is invalid, refused or lost has an error in its output line; all others are answered. Output lines are in
input order, each written as soon as those before it are done. A request without a seed gets one that depends on the
file alone.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from sempre.engine.cli.arguments import add_engine_flags, add_model_flag, engine_keywords, model_of
from sempre.engine.cli.parser import Required, UsageError
from sempre.engine.cli.remote.connection import add_server_flags, base_url, certificate_check, headers_for

if TYPE_CHECKING:
    import ssl

_ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# How long a line retries a busy server.
_BUSY_PATIENCE_S = 600.0
_BUSY = (429, 503)
_NO_SEED = (None, -1)


class Line(NamedTuple):
    """One line of the input: a request, or why it is invalid."""

    number: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = {}  # noqa: RUF012  never changed
    refusal: str | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "-i", "--input-file", action=Required, metavar="FILE", help="JSONL: custom_id, method, url, body"
    )
    parser.add_argument(
        "-o", "--output-file", action=Required, metavar="FILE", help="JSONL: custom_id, response, error"
    )
    parser.add_argument(
        "--max-concurrency", type=int, default=256, metavar="N", help="maximum concurrent lines (default: 256)"
    )
    add_server_flags(parser)
    add_model_flag(parser)
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Answer a batch on the server at `--url`, or on its own server; exit code 1 if a line failed."""
    if namespace.max_concurrency < 1:
        raise UsageError(f"--max-concurrency must be at least 1, got {namespace.max_concurrency}.")
    settings = engine_keywords(namespace)
    lines = seeded(read_lines(Path(namespace.input_file)), settings.get("seed", 0))
    with open(namespace.output_file, "w", encoding="utf-8") as output:
        if namespace.url is not None:
            from sempre.engine.cli.remote.answers import refuse_engine_flags

            refuse_engine_flags(namespace)
            address = Address(
                base_url(namespace.url), None, headers_for(namespace.api_key), certificate_check(namespace)
            )
            failed = asyncio.run(answer(lines, address, output, namespace.max_concurrency))
        else:
            from sempre.engine.cli.remote.own_server import own_server

            with own_server(model_of(namespace), settings) as socket:
                address = Address("http://sempre", socket, {})
                failed = asyncio.run(answer(lines, address, output, namespace.max_concurrency))
    if failed:
        print(f"sempre: {failed} of {len(lines)} lines failed; {namespace.output_file} says why", file=sys.stderr)
    return int(failed > 0)


class Address(NamedTuple):
    """A server: its URL, its Unix socket if any, the headers to send, and how its certificate is checked."""

    url: str
    socket: str | None
    headers: dict[str, str]
    verify: ssl.SSLContext | bool = False


def read_lines(path: Path) -> list[Line]:
    """Return the lines of a batch file without empty ones."""
    lines: list[Line] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), start=1):
        if text.strip():
            lines.append(_line(number, text, seen))
    return lines


def _line(number: int, text: bytes, seen: dict[str, int]) -> Line:
    try:
        value = json.loads(text)
    except ValueError as error:
        return Line(number, None, refusal=f"line {number} is not valid JSON: {error}")
    if not isinstance(value, dict):
        return Line(number, None, refusal=f"line {number} must be a JSON object")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        return Line(number, None, refusal=f"custom_id of line {number} must be a string, got {custom_id!r}")
    url, body = value.get("url"), value.get("body")
    refusal = None
    if custom_id in seen:
        refusal = f"custom_id {custom_id!r} is also used by line {seen[custom_id]}"
    elif value.get("method") != "POST":
        refusal = f"method must be 'POST', got {value.get('method')!r}"
    elif url not in _ENDPOINTS:
        refusal = f"url must be {' or '.join(_ENDPOINTS)}, got {url!r}"
    elif not isinstance(body, dict):
        refusal = f"body must be a JSON object, got {type(body).__name__}"
    elif body.get("stream"):
        refusal = "body.stream must be left out: a batch is not streamed"
    seen.setdefault(custom_id, number)
    return Line(number, custom_id, str(url), body if isinstance(body, dict) else {}, refusal)


def seeded(lines: list[Line], engine_seed: int) -> list[Line]:
    """Return the lines with a seed in every request.

    Lines reach the server in no fixed order, so it cannot number equal requests. So a seed depends on the request and
    the number of equal ones before it: a batch file has the same answers in every run.
    """
    counts: Counter[tuple[str, str]] = Counter()
    return [line if line.refusal is not None else _seeded(line, engine_seed, counts) for line in lines]


def _seeded(line: Line, engine_seed: int, counts: Counter[tuple[str, str]]) -> Line:
    if line.body.get("seed") not in _NO_SEED:
        return line
    body = {name: value for name, value in line.body.items() if name != "seed"}
    request = (line.url, json.dumps(body, sort_keys=True))
    digest = hashlib.sha256(json.dumps([engine_seed, counts[request], *request]).encode()).digest()
    counts[request] += 1
    return line._replace(body={**body, "seed": int.from_bytes(digest[:8], "little") >> 1})


async def answer(lines: list[Line], address: Address, output: IO[str], max_concurrency: int) -> int:
    """Write one record per line, in order; return how many failed."""
    import httpx
    from tqdm import tqdm

    transport = httpx.AsyncHTTPTransport(
        uds=address.socket, limits=httpx.Limits(max_connections=max_concurrency), verify=address.verify
    )
    # No read timeout, since answers take long; a dead server closes its connections.
    timeout = httpx.Timeout(None, connect=10.0)
    waiting = iter(enumerate(lines))
    write = _OrderedWriter(output)
    with tqdm(total=len(lines), unit=" lines", disable=not sys.stderr.isatty()) as bar:
        async with httpx.AsyncClient(
            transport=transport, base_url=address.url, headers=address.headers, timeout=timeout
        ) as client:

            async def work() -> None:
                for place, line in waiting:
                    write(place, await _record(client, line))
                    bar.update()

            await asyncio.gather(*(work() for _ in range(min(max_concurrency, len(lines)))))
    return write.num_failed


class _OrderedWriter:
    """Holds back each record until all earlier ones are written."""

    def __init__(self, output: IO[str]) -> None:
        self._output = output
        self._held: dict[int, str] = {}
        self._next = 0
        self.num_failed = 0

    def __call__(self, place: int, record: dict[str, Any]) -> None:
        self.num_failed += record["error"] is not None
        self._held[place] = json.dumps(record, ensure_ascii=False)
        while self._next in self._held:
            self._output.write(self._held.pop(self._next) + "\n")
            self._next += 1
        self._output.flush()


async def _record(client: Any, line: Line) -> dict[str, Any]:
    """Process one line; any failure becomes its record."""
    import httpx

    if line.refusal is not None:
        error = {"message": line.refusal, "type": "BadRequestError", "param": None, "code": 400}
        return _result(line, 400, f"batch-{line.number}", None, {"error": error})
    try:
        response = await _ask(client, line)
    except httpx.HTTPError as failure:
        message = f"the connection to the server failed: {str(failure) or type(failure).__name__}"
        error = {"message": message, "type": "APIConnectionError", "param": None, "code": None}
        return {"id": _id(line), "custom_id": line.custom_id, "response": None, "error": {"error": error}}
    try:
        document = response.json()
    except ValueError:
        document = {"error": {"message": response.text[:500], "type": "APIError", "param": None}}
    request_id = response.headers.get("x-request-id", f"batch-{line.number}")
    if response.status_code == 200:
        return _result(line, 200, request_id, document, None)
    return _result(line, response.status_code, request_id, None, document)


async def _ask(client: Any, line: Line) -> Any:
    """Send a line; retry while the server is busy."""
    loop = asyncio.get_running_loop()
    until = loop.time() + _BUSY_PATIENCE_S
    body = json.dumps(line.body).encode()
    while True:
        response = await client.post(line.url, content=body, headers={"Content-Type": "application/json"})
        pause = _retry_after(response.headers.get)
        if response.status_code not in _BUSY or loop.time() + pause > until:
            return response
        await asyncio.sleep(pause)


def _retry_after(header: Callable[[str, str], str]) -> float:
    text = header("retry-after", "1")
    return float(text) if text.isdigit() else 1.0


def _id(line: Line) -> str:
    return f"batch_req_{line.number}"


def _result(line: Line, status: int, request_id: str, body: Any, error: Any) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": _id(line), "custom_id": line.custom_id, "response": response, "error": error}
