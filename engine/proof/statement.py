"""What a receipt says: an in-toto Statement v1 whose subject is an output, and whose predicate is how to make it again.

_type          https://in-toto.io/Statement/v1
subject        the output, by the digest of its chain (`output_chain`)
predicateType  https://sempre.dev/inference/v1
predicate      in the words of SLSA's provenance:
  buildDefinition
    buildType             https://sempre.dev/generate/v1
    externalParameters    the request: model, prompt, parameters that may change the output, seed (a string, since
                          JSON's numbers have 53 bits), adapter; what is asked of a pooling model, or of a beam search
    internalParameters    settings of the engine that were not defaults and may decide bits; the fingerprint's two
                          parts
    resolvedDependencies  digests: weights (OpenSSF's model manifest, which covers all files of the model's folder), the
                          tokenizer if it is in another folder, the adapter
  runDetails
    builder               id: the fingerprint
    metadata              id of the request, when it ended, and the digest of the line before in the file
  output                  token ids, how it ended, the marks of its chain in base64; or what was pooled, whose digest
                          is the subject's
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from sempre.engine.proof.json_values import canonical_json
from sempre.engine.proof.output_chain import MARK_BYTES
from sempre.ipc.model_files import shown

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://sempre.dev/inference/v1"
BUILD_TYPE = "https://sempre.dev/generate/v1"
BUILDER = "sempre:"
"""followed by the fingerprint"""
ADAPTER = "adapter"
WEIGHTS_DIGITS = 16
"""of the digest of weights in the fingerprint; the manifest's is whole"""


class Digest(Struct, frozen=True):
    sha256: str


class Resource(Struct, frozen=True):
    name: str
    digest: Digest


# a receipt is made for each output: the names are short
_SHORT = {
    "sampling_params": "sampling",
    "prompt_token_ids": "prompt",
    "prompt_digest": "promptDigest",
    "beam_search": "beamSearch",
}


class NamedAdapter(Struct, frozen=True):
    """A low-rank adapter: the user's name for it, and its folder."""

    name: str
    path: str


class Request(Struct, frozen=True, kw_only=True, rename=_SHORT, omit_defaults=True):
    """The request of one output. Either the prompt's token ids or, if it is private, their digest."""

    model: str
    seed: str
    sampling_params: dict[str, Any]
    prompt_token_ids: list[int] | None = None
    prompt_digest: Digest | None = None
    adapter: NamedAdapter | None = None
    pooling: dict[str, Any] | None = None
    """the fields of PoolingParams that decide what is pooled"""
    beam_search: dict[str, Any] | None = None
    """those of BeamSearchParams, and `index`, the place of this beam among the best"""


class EngineFacts(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Settings that may decide bits, and the fingerprint's two parts as `written_parts`: see `recorded_bits_of`."""

    settings: dict[str, Any] = {}
    bits: str
    environment: str

    @property
    def bits_by_name(self) -> dict[str, str]:
        """The parts that decide bits. Raises ValueError."""
        return read_parts("bits", self.bits)

    @property
    def recorder(self) -> str | None:
        """The release that recorded; earlier receipts have it among the parts that decide bits. Raises ValueError."""
        parts = {**self.bits_by_name, **read_parts("environment", self.environment)}
        return parts.get("engine")


class BuildDefinition(Struct, frozen=True, kw_only=True, rename="camel"):
    build_type: str
    external_parameters: Request
    internal_parameters: EngineFacts
    resolved_dependencies: list[Resource]


class Builder(Struct, frozen=True):
    id: str


class Metadata(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    invocation_id: str
    finished_on: str
    previous: str | None = None
    """SHA-256 of the line before in its file; None for the first"""


class RunDetails(Struct, frozen=True):
    builder: Builder
    metadata: Metadata


class Output(Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """The output itself; `distribution_marks` only if the request reported whole distributions."""

    token_ids: list[int]
    marks: str
    finish_reason: str
    stop_reason: int | str | None = None
    distribution_marks: str | None = None
    distribution_digest: Digest | None = None
    pooled: str | None = None
    """float32 values, little-endian, in base64; of a request with `pooling`"""


class Predicate(Struct, frozen=True, kw_only=True, rename="camel"):
    build_definition: BuildDefinition
    run_details: RunDetails
    output: Output


class Statement(Struct, frozen=True, kw_only=True, rename={"type_": "_type", "predicate_type": "predicateType"}):
    type_: str
    subject: list[Resource]
    predicate_type: str
    predicate: Predicate


# parts of the fingerprint that receipts leave out; storage, too, if it is the dtype
_USUAL = {"numerics_profile": "single", "quantization": "none"}
_SHA256 = re.compile("[0-9a-f]{64}")
_DECODER = msgspec.json.Decoder(Statement)


def encode(statement: Statement) -> bytes:
    """Return a statement as canonical JSON. Raises ValueError for a value that it cannot hold."""
    return canonical_json(msgspec.to_builtins(statement))


def decode(payload: bytes) -> Statement:
    """Return the statement of a payload. Raises ValueError naming the field, or the version it does not know."""
    head = _head(payload)
    expected = {"_type": STATEMENT_TYPE, "predicateType": PREDICATE_TYPE}
    for name, value in expected.items():
        if head.get(name) != value:
            raise ValueError(
                f"{name}: expected {value!r}, found {head.get(name)!r}; another version wrote this receipt"
            )
    try:
        statement = _DECODER.decode(payload)
    except (msgspec.ValidationError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the statement has other fields than expected: {error}") from None
    _check(statement)
    return statement


def prompt_digest(token_ids: Sequence[int]) -> str:
    """Return SHA-256 over the ids as uint32, little-endian."""
    return hashlib.sha256(struct.pack(f"<{len(token_ids)}I", *token_ids)).hexdigest()


def pooled_digest(values: bytes) -> Digest:
    """Return the digest of what was pooled."""
    return Digest(hashlib.sha256(values).hexdigest())


def digest_of_prompt(request: Request) -> str:
    """Return the digest of a request's prompt, private or not."""
    if request.prompt_digest is not None:
        return request.prompt_digest.sha256
    return prompt_digest(request.prompt_token_ids or [])


def recorded_bits_of(bits: Mapping[str, str]) -> dict[str, str]:
    """Return the parts of a fingerprint that decide bits as receipts have them: the digest of the weights is cut, and
    what is usual is left out."""
    cut = {name: value[:WEIGHTS_DIGITS] if name == "weights" else value for name, value in bits.items()}
    usual = {**_USUAL, "storage": bits.get("dtype")}
    return {name: value for name, value in cut.items() if usual.get(name) != value}


def written_parts(parts: Mapping[str, str]) -> str:
    """Return `name=value` of each part, with semicolons between. Raises ValueError for a value with a semicolon."""
    text = ";".join(f"{name}={value}" for name, value in parts.items())
    if text.count(";") != max(0, len(parts) - 1):
        raise ValueError(f"the fingerprint: expected values without semicolons, found {shown(text)}")
    return text


def read_parts(field: str, text: str) -> dict[str, str]:
    """Return the parts by name. Raises ValueError naming the field."""
    parts = dict(each.partition("=")[::2] for each in text.split(";") if each)
    if written_parts(parts) != text:
        raise ValueError(f"{field}: expected parts of a fingerprint such as 'dtype=bfloat16;…', found {shown(text)}")
    return parts


def adapter_digest_of(statement: Statement) -> str | None:
    """Return the digest of the adapter's files; None: the output is of the model itself."""
    found = statement.predicate.build_definition.resolved_dependencies
    return next((each.digest.sha256 for each in found if each.name == ADAPTER), None)


def marks_of(field: str, text: str) -> bytes:
    """Return marks from base64. Raises ValueError naming the field."""
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"{field}: expected base64, found {shown(text)}") from None


def _head(payload: bytes) -> dict[str, Any]:
    try:
        head = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"payload: expected a JSON object, found something else ({error})") from None
    if not isinstance(head, dict):
        raise ValueError(f"payload: expected a JSON object, found {type(head).__name__}")
    return head


def _check(statement: Statement) -> None:
    """Raise ValueError for fields that contradict each other, as after an altered byte."""
    predicate = statement.predicate
    output, request = predicate.output, predicate.build_definition.external_parameters
    if len(statement.subject) != 1:
        raise ValueError(f"subject: expected one output, found {len(statement.subject)}")
    _check_marks("output.marks", output.marks, statement.subject[0].digest, len(output.token_ids))
    if (output.pooled is None) is not (request.pooling is None):
        raise ValueError("output.pooled: expected it with externalParameters.pooling, or neither")
    if output.pooled is not None:
        values = marks_of("output.pooled", output.pooled)
        if (
            len(values) % 4
            or output.token_ids
            or hashlib.sha256(values).hexdigest() != statement.subject[0].digest.sha256
        ):
            raise ValueError("output.pooled: expected float32 values of the subject's digest: it was altered")
    if output.distribution_marks is not None:
        digest = output.distribution_digest or Digest("")
        _check_marks("output.distributionMarks", output.distribution_marks, digest, len(output.token_ids))
    facts = predicate.build_definition.internal_parameters
    read_parts("bits", facts.bits)
    read_parts("environment", facts.environment)
    if not request.seed.removeprefix("-").isdecimal() or not -(2**63) <= int(request.seed) < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits as a string, found {shown(request.seed)}")
    if (request.prompt_token_ids is None) is (request.prompt_digest is None):
        raise ValueError("externalParameters: expected either prompt or promptDigest")
    if (request.adapter is None) is not (adapter_digest_of(statement) is None):
        raise ValueError(
            "adapter: expected its name in externalParameters and its digest in resolvedDependencies, or none"
        )


def _check_marks(field: str, text: str, digest: Digest, num_tokens: int) -> None:
    """Raise ValueError unless there are marks of every token that end as the digest begins."""
    if _SHA256.fullmatch(digest.sha256) is None:
        raise ValueError(f"the digest of {field}: expected 64 hex digits, found {shown(digest.sha256)}")
    marks = marks_of(field, text)
    if len(marks) != MARK_BYTES * num_tokens:
        expected = MARK_BYTES * num_tokens
        raise ValueError(f"{field}: expected {expected} bytes, {MARK_BYTES} for each token, found {len(marks)}")
    if marks and bytes.fromhex(digest.sha256)[:MARK_BYTES] != marks[-MARK_BYTES:]:
        raise ValueError(f"{field}: expected marks that end as their digest begins, found others: it was altered")
