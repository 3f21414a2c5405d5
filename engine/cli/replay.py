"""`sempre replay`: the outputs of receipts, made again on an engine of its own or on a running server."""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempre.engine.cli.arguments import add_engine_flags, add_model_flag, engine_keywords
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.remote.connection import Server, add_server_flags, connect
from sempre.engine.cli.replay_report import ReplayReport

if TYPE_CHECKING:
    from sempre.engine.proof.dsse import Verifier
    from sempre.engine.proof.receipt_log import Receipt
    from sempre.engine.proof.replay import LocalReplayer, Replayer
    from sempre.ipc.errors import RecordError

_DEFAULT_BATCH = 64
_SAMPLE_SPACE = 2**64
# between two looks at files that grow
_PAUSE_S = 1.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="files of receipts, or folders with them")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.add_argument(
        "--batch",
        type=int,
        default=_DEFAULT_BATCH,
        metavar="N",
        help=f"requests that run at once; 1: each alone (default: {_DEFAULT_BATCH})",
    )
    parser.add_argument(
        "--teacher-forced",
        action="store_true",
        help="only compute the log-probabilities of the recorded tokens, in one pass over prompt and output; faster",
    )
    parser.add_argument("--sample", metavar="SHARE", help="replay a share of the receipts, for example 1%% or 0.01")
    parser.add_argument(
        "--follow",
        action="store_true",
        help="with --url: replay what is recorded from now on, too, until something differs or Ctrl-C",
    )
    parser.add_argument(
        "--key", action="append", default=[], metavar="FILE", help="PEM key that must have signed each receipt"
    )
    parser.add_argument("--prompts", metavar="FILE", help="JSONL with the prompt_token_ids of private prompts")
    add_server_flags(parser)
    add_model_flag(parser)
    add_engine_flags(parser)


def run(namespace: argparse.Namespace) -> int:
    """Replay all receipts; exit code 5 if an output differs, else 6 if a receipt could not be judged."""
    if not namespace.files:
        raise UsageError("no receipts: give a file, or a folder that --record named")
    if namespace.batch < 1:
        raise UsageError(f"--batch must be at least 1, got {namespace.batch}")
    share = 1.0 if namespace.sample is None else read_share(namespace.sample)
    report = ReplayReport(as_json=namespace.json)
    if namespace.follow:
        return _follow(namespace, share, report)
    receipts = []
    for found in _sampled(_receipts(namespace), share):
        if isinstance(found, Exception):
            report.add_bad_line(found)
        else:
            receipts.append(found)
    report.begin(len(receipts))
    try:
        for replayer, group in _replayers(namespace, receipts, report):
            _judge(replayer, group, namespace.batch, report)
    finally:
        report.close()
    return report.end()


def read_share(text: str) -> float:
    """Return a share in (0, 1], written as a number or with a percent sign. Raises UsageError."""
    try:
        share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        share = 0.0
    if not 0.0 < share <= 1.0:
        raise UsageError(f"--sample must be a share such as 1% or 0.01, at most 100%, got {text!r}")
    return share


def _receipts(namespace: argparse.Namespace) -> Iterator[Receipt | RecordError]:
    from sempre.engine.proof.receipt_log import read_receipts, receipt_files
    from sempre.engine.proof.replay import with_prompts
    from sempre.ipc.errors import RecordError

    keys, prompts = _keys_and_prompts(namespace)
    for name in namespace.files:
        for file in receipt_files(Path(name)):
            for found in read_receipts(file, keys):
                yield found if isinstance(found, RecordError) else with_prompts(found, prompts)


def _sampled(receipts: Iterable[Receipt | RecordError], share: float) -> Iterator[Receipt | RecordError]:
    """Yield the receipts that a share picks by their subject, the same in every run, and all bad lines."""
    for found in receipts:
        if isinstance(found, Exception):
            yield found
            continue
        metadata = found.statement.predicate.run_details.metadata
        seed = f"{found.statement.subject[0].digest.sha256} {metadata.invocation_id} {metadata.finished_on}"
        place = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big")
        if place < share * _SAMPLE_SPACE:
            yield found


def _follow(namespace: argparse.Namespace, share: float, report: ReplayReport) -> int:
    """Replay receipts on a server as they are recorded."""
    from sempre.engine.cli.remote.replaying import ServerReplayer
    from sempre.engine.proof.receipt_log import ReceiptFollower
    from sempre.engine.proof.replay import with_prompts

    if namespace.url is None:
        raise UsageError("--follow needs --url, the address of the server that is audited")
    keys, prompts = _keys_and_prompts(namespace)
    follower = ReceiptFollower(keys)
    report.begin(None)
    try:
        with _served(namespace) as server:
            replayer = ServerReplayer(server, namespace.model)
            while not report.has_differences:
                added = (found for name in namespace.files for found in follower.added(Path(name)))
                receipts = []
                for found in _sampled(added, share):
                    if isinstance(found, Exception):
                        report.add_bad_line(found)
                    elif not replayer.has_made(found):
                        receipts.append(with_prompts(found, prompts))
                _judge(replayer, receipts, namespace.batch, report)
                if not receipts:
                    time.sleep(_PAUSE_S)
    except KeyboardInterrupt:
        pass  # the way to end it
    finally:
        report.close()
    return report.end()


@contextmanager
def _served(namespace: argparse.Namespace) -> Iterator[Server]:
    from sempre.engine.cli.remote.answers import refuse_engine_flags

    refuse_engine_flags(namespace)
    if namespace.teacher_forced:
        raise UsageError("--teacher-forced works on an own engine, not with --url")
    with connect(namespace) as server:
        yield server


def _keys_and_prompts(namespace: argparse.Namespace) -> tuple[list[Verifier], dict[str, list[int]]]:
    from sempre.engine.proof.dsse import load_verifier

    keys = [load_verifier(Path(name)) for name in namespace.key]
    return keys, {} if namespace.prompts is None else _prompts(Path(namespace.prompts))


def _prompts(path: Path) -> dict[str, list[int]]:
    """Return prompts by digest. Raises RecordError for a line that has no list of token ids."""
    from sempre.engine.proof.json_lines import line_error, read_json_lines
    from sempre.engine.proof.statement import prompt_digest

    found = {}
    for line in read_json_lines(path):
        if line.error is not None:
            raise line.error
        ids = line.value.get("prompt_token_ids")
        if not isinstance(ids, list) or not all(type(each) is int and 0 <= each < 2**32 for each in ids):
            raise line_error(path, line.number, "prompt_token_ids: expected a list of token ids")
        found[prompt_digest(ids)] = ids
    return found


def _replayers(
    namespace: argparse.Namespace, receipts: Sequence[Receipt], report: ReplayReport
) -> Iterator[tuple[Replayer, Sequence[Receipt]]]:
    """Yield an open engine for each model and its settings, with its receipts; or the one server with all."""
    if namespace.url is not None:
        from sempre.engine.cli.remote.replaying import ServerReplayer

        with _served(namespace) as server:
            yield ServerReplayer(server, namespace.model), receipts
        return
    groups: dict[str, list[Receipt]] = {}
    for receipt in receipts:
        groups.setdefault(json.dumps(_engine_of(receipt), sort_keys=True), []).append(receipt)
    for key, group in groups.items():
        with _local(namespace, json.loads(key)) as replayer:
            if namespace.teacher_forced:
                report.note_pass(is_one_pass=replayer.is_one_pass)
            yield replayer, group


def _engine_of(receipt: Receipt) -> tuple[str, dict[str, Any]]:
    definition = receipt.statement.predicate.build_definition
    return definition.external_parameters.model, definition.internal_parameters.settings


@contextmanager
def _local(namespace: argparse.Namespace, recorded: tuple[str, dict[str, Any]]) -> Iterator[LocalReplayer]:
    """Start an engine as it was recorded, except for what the flags say."""
    from sempre.engine.llm import LLM
    from sempre.engine.proof.replay import LocalReplayer

    model, settings = recorded
    if "seed" in settings:
        settings = {**settings, "seed": int(settings["seed"])}
    keywords = {"max_logprobs": -1, **settings, **engine_keywords(namespace)}
    with LLM(namespace.model or model, **keywords) as llm:
        yield LocalReplayer(llm, teacher_forced=namespace.teacher_forced)


def _judge(replayer: Replayer, receipts: Sequence[Receipt], batch: int, report: ReplayReport) -> None:
    from sempre.engine.proof.replay import replay

    for start in range(0, len(receipts), batch):
        for replayed in replay(receipts[start : start + batch], replayer):
            report.add(replayed)
