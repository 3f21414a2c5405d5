"""`sempre compare`: two runs, output by output and bit for bit."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sempre.engine.cli.exit_codes import EXIT_DIFFERENT, EXIT_NOT_JUDGED, EXIT_OK
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import add_certificate_flags
from sempre.ipc.log_lines import plain

if TYPE_CHECKING:
    from sempre.engine.proof.run_comparison import Run, RunComparison

_MOST_SHOWN = 10
_ADDRESSES = ("http://", "https://")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="RUN",
        help="two of: a file of save_outputs, a file or folder of receipts, the address of a server, which answers the "
        "requests of the receipts on the other side",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for a build server")
    parser.add_argument("--html", metavar="FILE", help="also write a report that a browser shows")
    parser.add_argument("--requests", metavar="FILE", help="receipts whose requests two servers answer")
    parser.add_argument("--api-key", metavar="KEY", help="key of the servers; better set in the environment")
    add_certificate_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Compare two runs; exit code 5 if they differ, else 6 if a line could not be read."""
    names: list[str] = namespace.runs
    if len(names) != 2:
        raise UsageError(f"expected two runs to compare, found {len(names)}. See sempre compare --help.")
    from sempre.engine.proof.run_comparison import compare_runs

    found = compare_runs(*_runs(namespace, names))
    if namespace.html is not None:
        from sempre.engine.proof.report_html import report_html

        Path(namespace.html).write_text(report_html(found), encoding="utf-8")
    if namespace.json:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        _print(found)
    if not found.is_equal:
        return EXIT_DIFFERENT
    return EXIT_NOT_JUDGED if found.problems else EXIT_OK


def _runs(namespace: argparse.Namespace, names: list[str]) -> list[Run]:
    from sempre.engine.proof.run_comparison import load_run

    servers = [name.startswith(_ADDRESSES) for name in names]
    if namespace.requests is not None and not all(servers):
        raise UsageError("--requests is for two servers; a run on one side says itself what was asked")
    if all(servers) and namespace.requests is None:
        raise UsageError("two servers need --requests FILE, receipts that say what to ask them")
    asked = namespace.requests or next((name for name, is_server in zip(names, servers, strict=True) if not is_server))
    return [
        _served(namespace, name, Path(asked)) if is_server else load_run(Path(name))
        for name, is_server in zip(names, servers, strict=True)
    ]


def _served(namespace: argparse.Namespace, url: str, asked: Path) -> Run:
    """Return what a server answers to the requests of receipts. Raises UsageError for saved outputs."""
    from sempre.engine.cli.remote.connection import connect
    from sempre.engine.cli.remote.replaying import ServerReplayer, answered_run
    from sempre.engine.proof.receipt_log import Receipt, read_receipts, receipt_files

    receipts = [found for file in receipt_files(asked) for found in read_receipts(file) if isinstance(found, Receipt)]
    if not receipts:
        raise UsageError(f"{asked} has no receipts: only they say with which parameters a server must be asked")
    with connect(namespace, url) as server:
        return answered_run(ServerReplayer(server, None), receipts, url)


def _print(found: RunComparison) -> None:
    for problem in found.problems:
        print(plain(f"not read: {problem}"))
    for pair in found.different[:_MOST_SHOWN]:
        assert pair.difference is not None
        print(plain(f"{pair.a.name}: {pair.difference.sentence()}"))
        for change in pair.changed_params:
            print(plain(f"  parameter {change}"))
    if len(found.different) > _MOST_SHOWN:
        print(f"… and {len(found.different) - _MOST_SHOWN:,} more")
    positions = found.positions()
    if positions:
        middle = positions[len(positions) // 2]
        print(f"tokens until the first difference: least {positions[0]:,}, median {middle:,}, most {positions[-1]:,}")
    for change in found.changed_parts():
        print(plain(f"the fingerprint changed: {change}"))
    print(plain(found.verdict()))
