"""`sempre debug ranks`: what each worker of a running server does."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from sempre.engine.cli.exit_codes import EXIT_OK
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import add_server_flags, connect
from sempre.ipc.errors import ServerError
from sempre.ipc.log_lines import plain, plain_lines

_COLUMNS = ("rank", "role", "host", "pid", "state", "process", "heard", "step", "digest", "busy", "memory", "restarts")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--json", action="store_true", help="print the server's JSON object")
    add_server_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Print a line for each worker, then problems, and the stacks of those that lag."""
    if namespace.url is None:
        raise UsageError("--url: give the address of a running server, for example --url http://127.0.0.1:8000")
    with connect(namespace) as server:
        found = server.get("/debug/ranks")
        if not isinstance(found, dict) or not isinstance(found.get("ranks"), list):
            raise ServerError(
                f"{server.url}/debug/ranks does not list ranks: is it a server of Sempre?", url=server.url
            )
    if namespace.json:
        print(json.dumps(found))
        return EXIT_OK
    ranks: list[dict[str, Any]] = found["ranks"]
    rows = [_COLUMNS, *(_cells(rank) for rank in ranks)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print(plain("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()))
    for problem in found.get("problems", []):
        print(plain(f"problem: {problem['reason']}"))
    for rank in ranks:
        if rank["stack"]:
            print(plain(f"rank {rank['rank']} (pid {rank['pid']}) lags; its stack:"))
            print(plain_lines(rank["stack"]))
    return EXIT_OK


def _cells(rank: Mapping[str, Any]) -> tuple[str, ...]:
    memory = rank["resident_bytes"]
    return (
        str(rank["rank"]),
        rank["role"],
        rank["host"] or "-",
        str(rank["pid"]),
        rank["state"],
        rank["process_state"] or "-",
        _age(rank["heartbeat_age_s"]),
        "-" if rank["step_id"] is None else str(rank["step_id"]),
        rank["step_digest"] or "-",
        _age(rank["step_age_s"]),
        "-" if memory is None else f"{memory / 2**20:.0f} MiB",
        str(rank["num_restarts"]),
    )


def _age(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"
