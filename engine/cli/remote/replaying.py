"""Replays receipts on a running server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sempre.engine.cli.remote.connection import Server
from sempre.engine.proof.dsse import payload_of
from sempre.engine.proof.kept_output import KeptOutput
from sempre.engine.proof.receipt_log import Receipt
from sempre.engine.proof.replay import prompt_of, sampling_params
from sempre.engine.proof.run_comparison import Run
from sempre.engine.proof.statement import Statement, decode, digest_of_prompt, marks_of, recorded_bits_of
from sempre.engine.sampling_params import SamplingParams
from sempre.ipc.errors import ConfigError, RequestError, ServerError

# what the interface lacks and no output depends on, or says in another way
# of one output the form alone, or given in another
_NOT_SENT = frozenset(
    {"n", "detokenize", "output_kind", "stream_interval", "prompt_logprobs", "flat_logprobs", "structured_outputs"}
)
_AT_ONCE = 64
_RECEIPT = {"X-Sempre-Receipt": "1"}


class ServerReplayer:
    """Sends each request to /v1/completions, all of a batch at once."""

    def __init__(self, server: Server, model: str | None) -> None:
        """Raises ServerError if the server does not answer, or is none of this project."""
        self._server = server
        self._model = server.model(model)
        info = server.get("/server_info")
        bits = info.get("fingerprint_parts") if isinstance(info, dict) else None
        if not isinstance(bits, dict):
            raise ServerError(f"{server.url}/server_info has no fingerprint_parts", url=server.url)
        self.bits = recorded_bits_of({str(name): str(value) for name, value in bits.items()})
        self._made: set[tuple[str, str]] = set()

    def has_made(self, receipt: Receipt) -> bool:
        """Whether this receipt is of an answer to this replayer, which a server that records everything also keeps."""
        return _identity(receipt.statement) in self._made

    def outputs(self, receipts: Sequence[Receipt]) -> list[KeptOutput | ConfigError]:
        """Return the output of each receipt, or why its request was refused. Raises ServerError."""
        with ThreadPoolExecutor(max_workers=max(1, len(receipts))) as pool:
            return list(pool.map(self._output, receipts))

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens."""
        answer = self._server.post("/detokenize", {"model": self._model, "tokens": token_ids})
        return str(answer.get("prompt", ""))

    def _output(self, receipt: Receipt) -> KeptOutput | ConfigError:
        asked = receipt.statement.predicate.build_definition.external_parameters
        if asked.pooling is not None or asked.beam_search is not None:
            kind = "pooled outputs" if asked.beam_search is None else "beams"
            return RequestError(f"{kind} are made again by an engine of this process; leave out --url.")
        try:
            params = sampling_params(receipt)
            adapter = asked.adapter
            model = self._model if adapter is None else adapter.name
            body = {"model": model, "prompt": prompt_of(receipt), **body_of(params), "return_token_ids": True}
            answer = self._server.post("/v1/completions", {**body, "logprobs": params.logprobs}, _RECEIPT)
        except ConfigError as error:
            return error
        except TypeError as error:
            return RequestError(f"the recorded parameters are not those of this version: {error}")
        choice = answer["choices"][0]
        statement = decode(payload_of(choice["receipt"]))
        self._made.add(_identity(statement))
        return _kept(choice, statement, str(answer["system_fingerprint"]))


def body_of(params: SamplingParams) -> dict[str, Any]:
    """Return the fields of a request: all that decide an output, since the server's defaults may be the model's."""
    names = [field.name for field in dataclasses.fields(params) if field.name not in _NOT_SENT]
    found = {name: getattr(params, name) for name in names}
    form = params.structured_outputs
    if form is not None:
        given = dataclasses.asdict(form)
        found["structured_outputs"] = {name: value for name, value in given.items() if value not in (None, False)}
    if found["logit_bias"] is not None:
        found["logit_bias"] = {str(token_id): value for token_id, value in found["logit_bias"].items()}
    return {name: value for name, value in found.items() if value not in (None, [])}


def _identity(statement: Statement) -> tuple[str, str]:
    metadata = statement.predicate.run_details.metadata
    return metadata.invocation_id, metadata.finished_on


def _kept(choice: dict[str, Any], statement: Statement, fingerprint: str) -> KeptOutput:
    output = statement.predicate.output
    logprobs = choice["logprobs"]["token_logprobs"]
    rows = output.distribution_marks
    return KeptOutput(
        name=f"choice {choice['index']}",
        token_ids=choice["token_ids"],
        finish_reason=choice["finish_reason"],
        stop_reason=choice["stop_reason"],
        seed=choice["seed"],
        fingerprint=fingerprint,
        prompt_digest=digest_of_prompt(statement.predicate.build_definition.external_parameters),
        logprobs=logprobs,
        marks=marks_of("output.marks", output.marks),
        distribution_marks=None if rows is None else marks_of("output.distributionMarks", rows),
    )


def answered_run(replayer: ServerReplayer, receipts: Sequence[Receipt], name: str) -> Run:
    """Return a server's answers to the requests of receipts, as a run. Raises ServerError."""
    run = Run(name, bits=[replayer.bits])
    for start in range(0, len(receipts), _AT_ONCE):
        part = receipts[start : start + _AT_ONCE]
        for receipt, found in zip(part, replayer.outputs(part), strict=True):
            asked = f"{receipt.path.name}, line {receipt.line}"
            if isinstance(found, ConfigError):
                run.problems.append(f"{name}: {asked}: {found}")
            else:
                run.outputs.append(dataclasses.replace(found, name=f"{name}, asked as {asked}"))
    return run
