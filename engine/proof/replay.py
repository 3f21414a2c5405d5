"""Receipts made again: the same requests on an engine or a server, and each output compared with the recorded one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from sempre.engine.adapters import LoRARequest
from sempre.engine.fingerprint import fingerprint_bits
from sempre.engine.frontend.beam_search import BeamSearchParams
from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.llm import LLM
from sempre.engine.numerics_versions import changed_bits
from sempre.engine.outputs import BeamSearchOutput, RequestOutput
from sempre.engine.pooling import PoolingParams
from sempre.engine.proof.differences import Difference, difference
from sempre.engine.proof.kept_output import (
    KeptOutput,
    kept_beam,
    kept_completion,
    kept_pooled,
    kept_receipt,
    own_logprobs,
)
from sempre.engine.proof.receipt_log import Receipt
from sempre.engine.proof.statement import adapter_digest_of, recorded_bits_of
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.structured_outputs import StructuredOutputsParams
from sempre.ipc.adapter_files import adapter_digest
from sempre.ipc.errors import ConfigError, ModelError, RequestError
from sempre.ipc.model_files import read_json_object


@dataclass(frozen=True)
class Replayed:
    """A receipt and what came of it: equal if there is neither a difference nor a problem."""

    name: str
    num_tokens: int
    difference: Difference | None = None
    problem: str | None = None
    """why it could not be judged"""
    changed_parts: tuple[str, ...] = ()
    """the parts of the fingerprint that decide bits and are not as recorded"""

    @property
    def is_equal(self) -> bool:
        return self.difference is None and self.problem is None


class Replayer(Protocol):
    """Makes outputs again."""

    bits: dict[str, str]
    """of its fingerprint, as receipts have them"""

    def outputs(self, receipts: Sequence[Receipt]) -> list[KeptOutput | ConfigError]:
        """Return the output of each receipt, or why its request was refused."""

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens."""


def replay(receipts: Sequence[Receipt], replayer: Replayer) -> Iterator[Replayed]:
    """Make the outputs of all receipts in one batch, and yield what came of each."""
    for receipt, found in zip(receipts, replayer.outputs(receipts), strict=True):
        recorded = kept_receipt(receipt)
        count = len(recorded.token_ids)
        engine = receipt.statement.predicate.build_definition.internal_parameters
        parts = engine.bits_by_name
        changed = tuple(changed_bits(parts, replayer.bits, engine.recorder))
        if isinstance(found, ConfigError):
            yield Replayed(recorded.name, count, problem=str(found), changed_parts=changed)
            continue
        # the digest of an earlier receipt is also of the engine's version, so it cannot be compared
        is_earlier = fingerprint_bits(parts) != parts
        if not changed and not is_earlier and found.fingerprint != recorded.fingerprint:
            # what a fingerprint has beside the engine's parts
            changed = (f"adapter: {adapter_digest_of(receipt.statement)} against another",)
        if recorded.finish_reason == "abort":
            # it was cut by its reader, so only its beginning can be compared
            recorded = replace(recorded, finish_reason=found.finish_reason, stop_reason=found.stop_reason)
        differs = difference(recorded, found, replayer.decode)
        yield Replayed(recorded.name, count, difference=differs, changed_parts=changed)


class _LocalRequest(NamedTuple):
    prompt: list[int]
    params: SamplingParams
    adapter: LoRARequest | None


class _Pooled(NamedTuple):
    prompt: list[int]
    params: PoolingParams


class _Search(NamedTuple):
    prompt: list[int]
    params: BeamSearchParams
    place: int
    """of the beam among the best"""
    seed: int


class LocalReplayer:
    """Replays on an engine of this process."""

    def __init__(self, llm: LLM, *, teacher_forced: bool = False) -> None:
        """`teacher_forced`: compute the log-probabilities of the recorded tokens in one pass over prompt and output.
        That is faster, and does not show that these tokens are sampled. Recurrent layers compute a prompt in another
        order than generated tokens: with them each output is generated, token by token, and `is_one_pass` is false.
        Raises ConfigError for processed log-probabilities, which a pass over a prompt does not compute."""
        self.bits = recorded_bits_of(llm.fingerprint_parts)
        mode = self.bits.get("logprobs_mode", "raw_logprobs")
        if teacher_forced and mode.startswith("processed"):
            raise ConfigError(
                f"teacher_forced: expected log-probabilities of raw logits, found logprobs_mode={mode!r}: a pass over "
                "recorded tokens processes no logits. Replay without it.",
                parameter="teacher_forced",
                value=True,
            )
        self._llm = llm
        self.is_one_pass = teacher_forced and not has_recurrent_layers(llm.model_folder)
        self._adapters: dict[str, LoRARequest] = {}
        self._searches: dict[str, BeamSearchOutput] = {}

    def outputs(self, receipts: Sequence[Receipt]) -> list[KeptOutput | ConfigError]:
        """Return the output of each receipt, all made in one batch, or why its request was refused."""
        requests = [self._request(receipt) for receipt in receipts]
        made = iter(self._made([request for request in requests if isinstance(request, _LocalRequest)]))
        found: list[KeptOutput | ConfigError] = []
        for receipt, request in zip(receipts, requests, strict=True):
            match request:
                case _LocalRequest():
                    output = next(made)
                    found.append(_scored(receipt, output) if self.is_one_pass else output)
                case _Pooled() | _Search():
                    found.append(self._made_alone(request))
                case _:
                    found.append(request)
        return found

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens."""
        return self._llm.get_tokenizer().decode(token_ids)

    def _request(self, receipt: Receipt) -> _LocalRequest | _Pooled | _Search | ConfigError:
        asked = receipt.statement.predicate.build_definition.external_parameters
        try:
            prompt = prompt_of(receipt)
            if asked.pooling is not None:
                return _Pooled(prompt, PoolingParams(**asked.pooling))
            adapter = self._adapter(receipt)
            if self.is_one_pass:
                return _LocalRequest(*_teacher_forced(receipt, prompt), adapter)
            if asked.beam_search is not None:
                search = dict(asked.beam_search)
                index = search.pop("index")
                return _Search(prompt, BeamSearchParams(**search), index, int(asked.seed))
            return _LocalRequest(prompt, sampling_params(receipt), adapter)
        except ConfigError as error:
            return error
        except ModelError as error:
            return ConfigError(str(error))
        except TypeError as error:
            return ConfigError(f"the recorded parameters are not those of this version: {error}")

    def _adapter(self, receipt: Receipt) -> LoRARequest | None:
        """Return the adapter. Raises ModelError without its files, RequestError if they are others."""
        named = receipt.statement.predicate.build_definition.external_parameters.adapter
        if named is None:
            return None
        expected, found = adapter_digest_of(receipt.statement), adapter_digest(Path(named.path))
        if expected != found:
            raise RequestError(f"the adapter {named.path}: expected files of digest {expected}, found {found}.")
        return self._adapters.setdefault(found, LoRARequest(named.name, len(self._adapters) + 1, named.path))

    def _made_alone(self, request: _Pooled | _Search) -> KeptOutput | ConfigError:
        """Pool a prompt; or search, once for all beams of a search."""
        prompt: TokensPrompt = {"prompt_token_ids": request.prompt}
        try:
            if isinstance(request, _Pooled):
                [pooled] = self._llm.encode([prompt], request.params, use_tqdm=False)
                return kept_pooled(pooled)
            key = repr(request[:2])
            if key not in self._searches:
                [self._searches[key]] = self._llm.beam_search([prompt], request.params)
            beams = self._searches[key].sequences
        except ConfigError as error:
            return error
        if request.place >= len(beams):
            return RequestError(f"index: expected one of the {len(beams)} beams of this search, found {request.place}.")
        fingerprint = self._llm.fingerprint
        return kept_beam(beams[request.place], len(request.prompt), seed=request.seed, fingerprint=fingerprint)

    def _made(self, requests: Sequence[_LocalRequest]) -> list[KeptOutput | ConfigError]:
        """Run all requests at once; if one is refused, each alone, since no request of a refused call is run."""
        prompts: list[TokensPrompt] = [{"prompt_token_ids": each.prompt} for each in requests]
        params, adapters = [each.params for each in requests], [each.adapter for each in requests]
        try:
            outputs = self._llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        except ConfigError as error:
            if len(requests) == 1:
                return [error]
            return [found for request in requests for found in self._made([request])]
        if self.is_one_pass:
            return [_as_scored(output) for output in outputs]
        return [kept_completion(output, output.outputs[0]) for output in outputs]


def prompt_of(receipt: Receipt) -> list[int]:
    """Return the prompt. Raises RequestError for a private one, of which only the digest is known."""
    token_ids = receipt.statement.predicate.build_definition.external_parameters.prompt_token_ids
    if token_ids is None:
        raise RequestError("the prompt is private: the receipt has only its digest; give the prompts with --prompts.")
    return token_ids


def with_prompts(receipt: Receipt, prompts: Mapping[str, list[int]]) -> Receipt:
    """Return a receipt with its private prompt, if it is among `prompts`, which go by digest."""
    predicate = receipt.statement.predicate
    definition = predicate.build_definition
    request = definition.external_parameters
    if request.prompt_digest is None or request.prompt_digest.sha256 not in prompts:
        return receipt
    known = msgspec.structs.replace(request, prompt_token_ids=prompts[request.prompt_digest.sha256], prompt_digest=None)
    definition = msgspec.structs.replace(definition, external_parameters=known)
    statement = msgspec.structs.replace(
        receipt.statement, predicate=msgspec.structs.replace(predicate, build_definition=definition)
    )
    return receipt._replace(statement=statement)


def sampling_params(receipt: Receipt) -> SamplingParams:
    """Return the parameters that make the output again. Raises ConfigError, TypeError for an unknown parameter."""
    predicate = receipt.statement.predicate
    request = predicate.build_definition.external_parameters
    given: dict[str, Any] = dict(request.sampling_params)
    form = given.pop("structured_outputs", None)
    output = predicate.output
    if output.finish_reason == "abort":
        given["max_tokens"] = max(1, len(output.token_ids))
        given["min_tokens"] = min(given.get("min_tokens", 0), given["max_tokens"])
    return SamplingParams(
        **given,
        seed=int(request.seed),
        structured_outputs=None if form is None else StructuredOutputsParams(**form),
        logprobs=0 if output.distribution_marks is None else -1,
    )


def _teacher_forced(receipt: Receipt, prompt: list[int]) -> tuple[list[int], SamplingParams]:
    """Score all but the last token as a prompt, and the last one as the token that follows."""
    token_ids = receipt.statement.predicate.output.token_ids
    if not token_ids:
        raise RequestError("the output has no tokens to score.")
    params = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=0, logprob_token_ids=token_ids[-1:], detokenize=False
    )
    return [*prompt, *token_ids[:-1]], params


def _as_scored(output: RequestOutput) -> KeptOutput:
    """Return the scored tokens of a whole prompt and of what follows, which `_scored` cuts."""
    kept = kept_completion(output, output.outputs[0])
    rows = output.prompt_logprobs or []
    return replace(kept, rows=[*(row or {} for row in rows), *(kept.rows or [])], logprobs=None)


def _scored(receipt: Receipt, found: KeptOutput | ConfigError) -> KeptOutput | ConfigError:
    """Return the recorded output with the log-probabilities of the pass over it."""
    if isinstance(found, ConfigError) or found.error is not None:
        return found
    recorded = kept_receipt(receipt)
    rows = list(found.rows or [])[-len(recorded.token_ids) :]
    values = own_logprobs(recorded.token_ids, rows)
    return replace(recorded, name=found.name, marks=None, distribution_marks=None, logprobs=values)


def has_recurrent_layers(folder: Path) -> bool:
    """Whether a model's config.json describes layers that keep a state instead of keys and values."""
    path = folder / "config.json"
    config = read_json_object(path) if path.is_file() else {}
    fields = config.get("text_config", config)
    return isinstance(fields, dict) and any(name.startswith("linear_") for name in fields)
