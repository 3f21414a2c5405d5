"""Makes the receipt of each output that is to have one, and appends it to the engine's file of receipts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from sempre.engine.arguments import Arguments
from sempre.engine.fingerprint import fingerprint_with_adapter
from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.proof.dsse import Signer, envelope, load_signer
from sempre.engine.proof.json_values import json_ready
from sempre.engine.proof.model_manifest import file_digest, manifest_digest
from sempre.engine.proof.output_chain import OutputChain
from sempre.engine.proof.receipt_log import ReceiptLog
from sempre.engine.proof.statement import (
    ADAPTER,
    BUILD_TYPE,
    BUILDER,
    PREDICATE_TYPE,
    STATEMENT_TYPE,
    BuildDefinition,
    Builder,
    Digest,
    EngineFacts,
    Metadata,
    NamedAdapter,
    Output,
    Predicate,
    Request,
    Resource,
    RunDetails,
    Statement,
    encode,
    pooled_digest,
    prompt_digest,
    recorded_bits_of,
    written_parts,
)
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.structured_outputs import with_defaults
from sempre.ipc.errors import RecordError
from sempre.ipc.messages import LogprobRows

# what reports an output, counts siblings or names the seed, which a receipt has on its own
_NOT_RECORDED = frozenset(
    {
        "n",
        "seed",
        "output_kind",
        "stream_interval",
        "logprobs",
        "prompt_logprobs",
        "prompt_logprob_token_ids",
        "prompt_logprob_start",
        "logprob_token_ids",
        "flat_logprobs",
        "truncate_prompt_tokens",
        "truncation_side",
    }
)
_DEFAULTS = SamplingParams()
# settings that may decide bits; the seed only makes dummy weights
DECIDING_SETTINGS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "numerics",
    "logprobs_mode",
    "max_model_len",
    "load_format",
    "device",
    "runner",
    "convert",
    "pooler_config",
)
# without which an output with an adapter cannot be made again
ADAPTER_SETTINGS = ("enable_lora", "max_lora_rank")
DECIDING_OPTIONS = ("tokenizer", "tokenizer_revision", "revision", "hf_overrides", "skip_tokenizer_init")


@dataclass(slots=True)
class Recording:
    """What is recorded of one output while it grows."""

    tokens: OutputChain
    rows: OutputChain | None
    """of whole distributions, if the request reports them"""

    def add(self, token_ids: Sequence[int], logprobs: LogprobRows) -> None:
        """Add tokens, whose rows `logprobs` begins with."""
        stride = 4 * logprobs.width
        self.tokens.add_tokens(token_ids, logprobs.logprobs, stride)
        if self.rows is not None:
            self.rows.add_rows(logprobs.token_ids, logprobs.logprobs, len(token_ids), stride)


@dataclass(frozen=True, slots=True)
class Finished:
    """One output that has ended."""

    request: PreparedRequest
    index: int
    token_ids: list[int]
    recording: Recording
    finish_reason: str
    stop_reason: int | str | None
    finished_time: float
    """seconds since the epoch"""
    pooled: bytes | None = None
    """float32 values, in place of tokens"""
    beam_search: dict[str, Any] | None = None
    """what found the tokens, in place of sampling"""


class Recorder:
    """Makes receipts for one engine."""

    def __init__(self, arguments: Arguments, structured_outputs: Mapping[str, Any]) -> None:
        """Load the key, and check the folder. Raises ConfigError for the key, RecordError for the folder."""
        self._config, self._options = arguments
        self._structured_outputs = structured_outputs
        self._weights_folder = Path(self._config.weights_folder)
        folder, key = self._options.record, self._options.record_key
        self._signer: Signer | None = None if key is None else load_signer(Path(key).expanduser())
        self._log = ReceiptLog(Path(folder).expanduser() if isinstance(folder, str) else None)
        self._bits: dict[str, str] = {}
        self._environment: dict[str, str] = {}

    def connect(self, bits: dict[str, str], environment: dict[str, str], weights_folder: Path) -> None:
        """Set the fingerprint's parts of the engine, which is ready, with the weights of this folder."""
        self._bits, self._environment = bits, environment
        if weights_folder != self._weights_folder:
            self._weights_folder = weights_folder
            self.__dict__.pop("_dependencies", None)

    @property
    def records_all(self) -> bool:
        """Whether every output has a receipt, not only those that ask for one."""
        return bool(self._options.record)

    def prepare(self) -> None:
        """Hash the model's files, which takes seconds for a large one. Raises ModelError."""
        _ = self._dependencies

    def receipt(self, finished: Finished) -> str:
        """Return the receipt of an output, on one line, after it was appended to the file.

        Raises RecordError if it cannot be written, or if a parameter has no canonical JSON.
        """
        try:
            return self._log.append(lambda previous: self._line(finished, previous)).decode()
        except ValueError as error:
            raise RecordError(f"this output has no receipt: {error}") from None

    def _line(self, finished: Finished, previous: str | None) -> bytes:
        return envelope(encode(self._statement(finished, previous)), self._signer)

    def _statement(self, finished: Finished, previous: str | None) -> Statement:
        request, recording = finished.request, finished.recording
        rows, dependencies = recording.rows, self._dependencies
        adapter = None if request.adapter is None else request.adapter.spec.digest
        if adapter is not None:
            dependencies = [*dependencies, Resource(ADAPTER, Digest(adapter))]
        metadata = Metadata(
            invocation_id=f"{request.request_id}/{finished.index}",
            finished_on=_time(finished.finished_time),
            previous=previous,
        )
        output = Output(
            token_ids=finished.token_ids,
            marks=base64.b64encode(recording.tokens.marks).decode(),
            finish_reason=finished.finish_reason,
            stop_reason=finished.stop_reason,
            distribution_marks=None if rows is None else base64.b64encode(rows.marks).decode(),
            distribution_digest=None if rows is None else Digest(rows.digest),
            pooled=None if finished.pooled is None else base64.b64encode(finished.pooled).decode(),
        )
        definition = BuildDefinition(
            build_type=BUILD_TYPE,
            external_parameters=self._request(finished),
            internal_parameters=EngineFacts(
                settings=self._settings if adapter is None else {**self._settings, **self._adapter_settings},
                bits=written_parts(recorded_bits_of(self._bits)),
                environment=written_parts(self._environment),
            ),
            resolved_dependencies=dependencies,
        )
        subject = Digest(recording.tokens.digest) if finished.pooled is None else pooled_digest(finished.pooled)
        builder = Builder(BUILDER + fingerprint_with_adapter(self._bits, adapter))
        return Statement(
            type_=STATEMENT_TYPE,
            subject=[Resource("output", subject)],
            predicate_type=PREDICATE_TYPE,
            predicate=Predicate(build_definition=definition, run_details=RunDetails(builder, metadata), output=output),
        )

    def _request(self, finished: Finished) -> Request:
        request = finished.request
        token_ids = request.prompt_token_ids
        is_private = self._options.record_private
        adapter = request.adapter
        pooling, search = request.sequences[0].pooling, finished.beam_search
        is_sampled = pooling is None and search is None
        return Request(
            model=self._config.model,
            seed=str(request.seeds[finished.index if search is None else 0]),
            sampling_params=recorded_params(request, self._structured_outputs) if is_sampled else {},
            pooling=None if pooling is None else msgspec.structs.asdict(pooling),
            beam_search=search,
            prompt_token_ids=None if is_private else token_ids,
            prompt_digest=Digest(prompt_digest(token_ids)) if is_private else None,
            adapter=None if adapter is None else NamedAdapter(adapter.spec.name, adapter.spec.path),
        )

    @cached_property
    def _settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for config, names in ((self._config, DECIDING_SETTINGS), (self._options, DECIDING_OPTIONS)):
            defaults = {field.name: field.default for field in msgspec.structs.fields(config)}
            given = {name: getattr(config, name) for name in names}
            found |= {name: value for name, value in given.items() if value != defaults[name]}
        if self._config.load_format == "dummy":
            found["seed"] = str(self._config.seed)
        return found

    @cached_property
    def _adapter_settings(self) -> dict[str, Any]:
        return {name: getattr(self._config, name) for name in ADAPTER_SETTINGS}

    @cached_property
    def _dependencies(self) -> list[Resource]:
        found = []
        if self._config.load_format != "dummy" or self._weights_folder != Path(self._config.model_path):
            found.append(Resource("weights", Digest(manifest_digest(self._weights_folder))))
        # the manifest covers a tokenizer in the same folder
        tokenizer = Path(self._options.tokenizer or self._config.model_path) / "tokenizer.json"
        is_covered = found and tokenizer.parent.resolve() == self._weights_folder.resolve()
        if tokenizer.is_file() and not self._options.skip_tokenizer_init and not is_covered:
            found.append(Resource("tokenizer", Digest(file_digest(tokenizer).hex())))
        return found


def recorded_params(request: PreparedRequest, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that may change an output and are not the defaults; the length is always there."""
    params = request.params
    names = [field.name for field in fields(params) if field.name not in _NOT_RECORDED]
    found = {name: json_ready(getattr(params, name)) for name in names if getattr(params, name) not in _empty(name)}
    if params.structured_outputs is not None:
        form = json_ready(with_defaults(params.structured_outputs, defaults))
        found["structured_outputs"] = {name: value for name, value in form.items() if value not in (None, False)}
    found["max_tokens"] = request.sequences[0].params.max_tokens
    return found


def _empty(name: str) -> tuple[object, ...]:
    """Values that are as good as the default."""
    default = getattr(_DEFAULTS, name)
    return (default, None, []) if default in (None, []) else (default,)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
