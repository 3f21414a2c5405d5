"""One output as it was kept, in any form: what is compared of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sempre.engine.outputs import BeamSearchSequence, CompletionOutput, Logprob, RequestOutput
from sempre.engine.pooling import PoolingRequestOutput
from sempre.engine.proof.logprob_bits import float32_bytes
from sempre.engine.proof.output_chain import OutputChain
from sempre.engine.proof.receipt_log import Receipt
from sempre.engine.proof.statement import digest_of_prompt, marks_of, prompt_digest

Row = Mapping[int, Logprob]


@dataclass(frozen=True, kw_only=True)
class KeptOutput:
    """A completion. What its form does not hold is None."""

    name: str
    """for messages: a line of a file, a request and its index"""
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None
    seed: int
    fingerprint: str
    prompt_digest: str
    prompt_token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    """of the tokens, as float32 values"""
    rows: Sequence[Row] | None = None
    """what was reported of each position"""
    marks: bytes | None = None
    """of the chain over tokens and log-probabilities"""
    distribution_marks: bytes | None = None
    pooled: bytes | None = None
    """float32 values, in place of tokens"""
    error: str | None = None

    def chain_marks(self) -> bytes | None:
        """Return the marks, which follow from the log-probabilities if those were kept; None without either."""
        if self.marks is not None or self.logprobs is None:
            return self.marks
        chain = OutputChain()
        chain.add_tokens(self.token_ids, float32_bytes(self.logprobs), 4)
        return chain.marks

    def token_text(self, position: int) -> str | None:
        """Return the text of a token, if it was kept."""
        if self.rows is None or position >= len(self.rows):
            return None
        entry = self.rows[position].get(self.token_ids[position])
        return None if entry is None else entry.decoded_token


def kept_completions(output: RequestOutput) -> Iterator[KeptOutput]:
    """Yield the completions of an output."""
    for completion in output.outputs:
        yield kept_completion(output, completion)


def kept_completion(output: RequestOutput, completion: CompletionOutput) -> KeptOutput:
    """Return one completion of an output."""
    rows = completion.logprobs
    return KeptOutput(
        name=f"request {output.request_id}, completion {completion.index}",
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        seed=completion.seed,
        fingerprint=output.fingerprint,
        prompt_digest=prompt_digest(output.prompt_token_ids),
        prompt_token_ids=output.prompt_token_ids,
        logprobs=None if rows is None else own_logprobs(completion.token_ids, rows),
        rows=rows,
        error=completion.error,
    )


def kept_receipt(receipt: Receipt) -> KeptOutput:
    """Return the output of a receipt."""
    predicate = receipt.statement.predicate
    output, request = predicate.output, predicate.build_definition.external_parameters
    rows = output.distribution_marks
    return KeptOutput(
        name=f"{receipt.path.name}, line {receipt.line}",
        token_ids=output.token_ids,
        finish_reason=output.finish_reason,
        stop_reason=output.stop_reason,
        seed=int(request.seed),
        fingerprint=predicate.run_details.builder.id.rpartition(":")[2],
        prompt_digest=digest_of_prompt(request),
        prompt_token_ids=request.prompt_token_ids,
        marks=marks_of("output.marks", output.marks),
        distribution_marks=None if rows is None else marks_of("output.distributionMarks", rows),
        pooled=None if output.pooled is None else marks_of("output.pooled", output.pooled),
    )


def kept_pooled(output: PoolingRequestOutput) -> KeptOutput:
    """Return what was pooled of a prompt."""
    return KeptOutput(
        name=f"request {output.request_id}",
        token_ids=[],
        finish_reason="stop",
        stop_reason=None,
        seed=0,
        fingerprint=output.fingerprint,
        prompt_digest=prompt_digest(output.prompt_token_ids),
        prompt_token_ids=output.prompt_token_ids,
        pooled=float32_bytes(output.outputs.data),
    )


def kept_beam(beam: BeamSearchSequence, num_prompt_tokens: int, *, seed: int, fingerprint: str) -> KeptOutput:
    """Return one beam of a search."""
    prompt, token_ids = beam.tokens[:num_prompt_tokens], beam.tokens[num_prompt_tokens:]
    # an end token that is not shown has a row, too
    rows = beam.logprobs[: len(token_ids)]
    return KeptOutput(
        name="a beam",
        token_ids=token_ids,
        finish_reason=beam.finish_reason,
        stop_reason=beam.stop_reason,
        seed=seed,
        fingerprint=fingerprint,
        prompt_digest=prompt_digest(prompt),
        prompt_token_ids=prompt,
        logprobs=own_logprobs(token_ids, rows),
    )


def own_logprobs(token_ids: Sequence[int], rows: Sequence[Row]) -> list[float] | None:
    """Return the log-probability of each token; None unless every row has it."""
    if len(rows) != len(token_ids) or not all(token_id in row for token_id, row in zip(token_ids, rows, strict=True)):
        return None
    return [row[token_id].logprob for token_id, row in zip(token_ids, rows, strict=True)]


def marks_of_rows(rows: Sequence[Row]) -> bytes:
    """Return the marks of whole distributions, as the worker reports them: the sampled token, then all by rank."""
    chain = OutputChain()
    for row in rows:
        ids = list(row)
        values = [row[token_id].logprob for token_id in ids]
        if ids:
            place = row[ids[0]].rank or 0
            ids.insert(place, ids[0])
            values.insert(place, values[0])
        chain.add(struct.pack(f"<{len(ids)}i", *ids) + float32_bytes(values))
    return chain.marks
