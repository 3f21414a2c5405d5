"""`sempre verify`: the guarantee, checked on this machine, or on a running server from outside."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.arguments import add_engine_flags, add_model_flag, engine_keywords
from sempre.engine.cli.exit_codes import EXIT_DIFFERENT, EXIT_NOT_JUDGED, EXIT_OK
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import add_server_flags
from sempre.ipc.log_lines import plain

if TYPE_CHECKING:
    from sempre.engine.proof.axis_result import AxisResult

_DEFAULT_MODEL = "tiny"
ENGINES = ("sempre", "vllm", "sglang", "llama.cpp")
_COLUMNS = f"{'axis':<30} {'outputs':>7} {'different':>9} {'log-probs':>9} {'seconds':>7}  result"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"the same as --model; default: {_DEFAULT_MODEL}")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, for a build server")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=ENGINES[0],
        help="what runs at --url: its names of fields (default: %(default)s)",
    )
    add_server_flags(parser)
    add_model_flag(parser)
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Check all axes; exit code 5 if one differs, else 6 if a control is equal, so that nothing was shown."""
    given: list[str] = namespace.models
    named = [*given, *([] if namespace.model is None else [namespace.model])]
    if len(named) > 1:
        raise UsageError(f"expected one model, found {', '.join(named)}")
    model = named[0] if named else None
    if namespace.url is None and namespace.engine != ENGINES[0]:
        raise UsageError(f"--engine {namespace.engine} needs --url, the address of that server")
    table = Table(as_json=namespace.json)
    for result in _results(namespace, model, table):
        table.add(result)
    return table.end()


def _results(namespace: argparse.Namespace, model: str | None, table: Table) -> Iterator[AxisResult]:
    if namespace.url is None:
        from sempre.engine.proof.verification import Verification

        verification = Verification(model or _DEFAULT_MODEL, engine_keywords(namespace))
        table.begin(model or _DEFAULT_MODEL)
        yield from verification.results()
        table.fingerprint = verification.fingerprint
        return
    from sempre.engine.cli.remote.answers import refuse_engine_flags
    from sempre.engine.cli.remote.black_box import BlackBox
    from sempre.engine.cli.remote.connection import connect

    refuse_engine_flags(namespace)
    with connect(namespace) as server:
        box = BlackBox(server, namespace.engine, model)
        table.begin(f"{namespace.url} ({namespace.engine})")
        yield from box.results()
        table.fingerprint = box.fingerprint


class Table:
    """A row as soon as its axis is done, and the verdict."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._rows: list[tuple[AxisResult, float]] = []
        self._began = self._last = time.monotonic()
        self._what = ""
        self.fingerprint = ""

    def begin(self, what: str) -> None:
        """Print the head of the table."""
        self._what = what
        self._say(plain(f"checking {what}"))
        self._say(_COLUMNS)

    def add(self, result: AxisResult) -> None:
        """Print a row."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._rows.append((result, seconds))
        told = result.verdict if result.is_as_expected else result.verdict.upper()
        if result.is_control and result.verdict == "different":
            told = "different, as it must be"
        self._say(
            f"{result.axis:<30} {result.num_outputs:>7,} {result.num_different:>9,} {result.num_logprobs:>9,} "
            f"{seconds:>7.1f}  {told}"
        )
        if result.detail is not None and not (result.is_control and result.verdict == "different"):
            self._say(plain(f"    {result.detail}"))

    def end(self) -> int:
        """Print the verdict; return the exit code."""
        rows = [row for row, _ in self._rows]
        broken = [row for row in rows if not row.is_control and row.verdict == "different"]
        useless = [row for row in rows if row.is_control and row.verdict != "different"]
        skipped = [row for row in rows if not row.is_control and row.verdict == "not checked"]
        code = EXIT_DIFFERENT if broken else EXIT_NOT_JUDGED if useless else EXIT_OK
        num_axes = sum(not row.is_control and row.verdict == "equal" for row in rows)
        values = sum(row.num_logprobs for row in rows if not row.is_control)
        if broken:
            verdict = f"not invariant: {', '.join(row.axis for row in broken)}"
        elif useless:
            verdict = f"nothing was shown: {', '.join(row.axis for row in useless)} should differ and did not"
        else:
            verdict = f"equal, bit for bit, on {num_axes} axes: {values:,} log-probabilities"
        verdict += f"; not checked: {', '.join(row.axis for row in skipped)}" if skipped else ""
        if self._as_json:
            print(json.dumps(self._document(verdict, code), ensure_ascii=False))
        else:
            print(plain(f"{verdict} ({self._last - self._began:.0f} s, fingerprint {self.fingerprint or 'not told'})"))
        return code

    def _document(self, verdict: str, code: int) -> dict[str, Any]:
        return {
            "verdict": {EXIT_OK: "equal", EXIT_DIFFERENT: "different"}.get(code, "not judged"),
            "sentence": verdict,
            "checked": self._what,
            "fingerprint": self.fingerprint,
            "axes": [{**row.to_dict(), "seconds": round(seconds, 3)} for row, seconds in self._rows],
        }

    def _say(self, text: str) -> None:
        if not self._as_json:
            print(text, flush=True, file=sys.stdout)
