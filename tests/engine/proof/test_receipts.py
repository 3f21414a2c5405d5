"""Receipts: what they say, how large they are, that every alteration is noticed, and what a failure of writing does."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sempre.engine import LLM, RecordError, SamplingParams, StructuredOutputsParams
from sempre.engine.outputs import RequestOutput
from sempre.engine.proof.dsse import PAYLOAD_TYPE, pre_authentication_encoding
from sempre.engine.proof.json_values import canonical_json
from sempre.engine.proof.model_manifest import manifest_digest, model_files
from sempre.engine.proof.output_chain import OutputChain, first_difference, recorded_bits
from sempre.engine.proof.receipt_log import Receipt, read_receipts, receipt_files
from sempre.engine.proof.statement import Statement, decode, read_parts, recorded_bits_of
from sempre.ipc.errors import ConfigError, ModelError

SETTINGS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 8, "num_threads": 1, "multiprocessing": False}
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=8, logprobs=1),
    SamplingParams(n=2, temperature=0.9, top_p=0.9, max_tokens=12, seed=-7, stop=["e"], logit_bias={5: 1.5}),
    SamplingParams(max_tokens=4, logprobs=-1, ignore_eos=True),
]


def statement_of(receipt: str | None) -> Statement:
    assert receipt is not None
    return decode(base64.b64decode(json.loads(receipt)["payload"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("receipts")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM("tiny", record=str(folder), max_logprobs=-1, **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def outputs(llm: LLM) -> list[RequestOutput]:
    return llm.generate(["It is a truth", "The sea, the", "a"], PARAMS, use_tqdm=False)


def test_a_receipt_says_what_is_needed_to_make_the_output_again(llm: LLM, outputs: list[RequestOutput]) -> None:
    statement = statement_of(outputs[1].outputs[1].receipt)
    definition = statement.predicate.build_definition
    request, engine = definition.external_parameters, definition.internal_parameters
    assert (request.model, request.seed) == ("tiny", "-6")
    assert request.prompt_token_ids == outputs[1].prompt_token_ids
    assert request.sampling_params == {
        "temperature": 0.9,
        "top_p": 0.9,
        "max_tokens": 12,
        "stop": ["e"],
        "logit_bias": {"5": 1.5},
    }
    assert engine.bits_by_name == recorded_bits_of(llm.fingerprint_parts)
    assert read_parts("environment", engine.environment) == llm.fingerprint_environment
    assert engine.settings == {"max_model_len": 128}
    assert statement.predicate.run_details.builder.id == f"sempre:{llm.fingerprint}"
    output = statement.predicate.output
    assert output.token_ids == outputs[1].outputs[1].token_ids
    assert (output.finish_reason, output.stop_reason) == (
        outputs[1].outputs[1].finish_reason,
        outputs[1].outputs[1].stop_reason,
    )
    manifest = manifest_digest(Path(llm._frontend.config.model_path))
    assert [each.name for each in definition.resolved_dependencies] == ["weights"]
    assert definition.resolved_dependencies[0].digest.sha256 == manifest


def test_the_marks_are_those_of_tokens_and_logprobs(outputs: list[RequestOutput]) -> None:
    completion = outputs[0].outputs[0]
    state = hashlib.sha256(b"sempre/output-chain/v1\0").digest()
    marks = b""
    for token_id, row in zip(completion.token_ids, completion.logprobs or [], strict=True):
        state = hashlib.sha256(state + struct.pack("<If", token_id, row[token_id].logprob)).digest()
        marks += state[:4]
    statement = statement_of(completion.receipt)
    assert base64.b64decode(statement.predicate.output.marks) == marks
    assert statement.subject[0].digest.sha256 == state.hex()
    assert statement.predicate.output.distribution_marks is None


def test_whole_distributions_have_marks_of_their_own(outputs: list[RequestOutput]) -> None:
    output = statement_of(outputs[2].outputs[0].receipt).predicate.output
    chain = OutputChain()
    for row in outputs[2].outputs[0].logprobs or []:
        ids = list(row)
        values = [row[token_id].logprob for token_id in ids]
        # the sampled token's column comes first, and again at its rank
        sampled = row[ids[0]]
        ids.insert(sampled.rank or 0, ids[0])
        values.insert(sampled.rank or 0, sampled.logprob)
        chain.add(struct.pack(f"<{len(ids)}i", *ids) + struct.pack(f"<{len(ids)}f", *values))
    assert base64.b64decode(output.distribution_marks or "") == chain.marks
    assert output.distribution_digest is not None
    assert output.distribution_digest.sha256 == chain.digest


def test_recording_changes_no_output(outputs: list[RequestOutput]) -> None:
    with LLM("tiny", max_logprobs=-1, **SETTINGS) as engine:
        plain = engine.generate(["It is a truth", "The sea, the", "a"], PARAMS, use_tqdm=False)
    for one, other in zip(plain, outputs, strict=True):
        for completion, recorded in zip(one.outputs, other.outputs, strict=True):
            assert completion.receipt is None
            assert {**completion.to_dict(), "receipt": ""} == {**recorded.to_dict(), "receipt": ""}


def test_the_size_of_receipts(outputs: list[RequestOutput]) -> None:
    for output in outputs:
        for completion in output.outputs:
            assert completion.receipt is not None
            ids = len(canonical_json([*output.prompt_token_ids, *completion.token_ids])) * 4 / 3
            marks = 8 * len(completion.token_ids)
            # whole distributions have a second chain
            rows = marks + 200 if completion.logprobs is not None and len(completion.logprobs[0]) > 100 else 0
            assert len(completion.receipt) - ids - marks - rows < 1_630


def test_the_file_has_every_receipt_in_order(folder: Path, outputs: list[RequestOutput]) -> None:
    [file] = receipt_files(folder)
    lines = file.read_text().splitlines()
    given = [completion.receipt for output in outputs for completion in output.outputs]
    assert sorted(lines[: len(given)]) == sorted(text for text in given if text is not None)
    found = list(read_receipts(file))
    assert all(isinstance(each, Receipt) for each in found)
    assert [each.line for each in found if isinstance(each, Receipt)] == list(range(1, len(lines) + 1))


def altered(line: bytes, change: Any) -> bytes:
    document = json.loads(line)
    statement = json.loads(base64.b64decode(document["payload"]))
    change(statement)
    return canonical_json({**document, "payload": base64.b64encode(canonical_json(statement)).decode()})


def put(path: str, value: Any) -> Any:
    def change(statement: Any) -> None:
        *names, last = path.split(".")
        for name in names:
            statement = statement[int(name) if isinstance(statement, list) else name]
        statement[int(last) if isinstance(statement, list) else last] = value

    return change


OUTPUT = "predicate.output"
REQUEST = "predicate.buildDefinition.externalParameters"
ALTERED = {
    "version": (put("predicateType", "https://sempre.dev/inference/v2"), "another version wrote this receipt"),
    "type": (put("_type", 7), "_type: expected 'https://in-toto.io/Statement/v1', found 7"),
    "marks": (put(f"{OUTPUT}.marks", "AAAA"), "output.marks: expected 32 bytes, 4 for each token, found 3"),
    "base64": (put(f"{OUTPUT}.marks", "A"), "output.marks: expected base64, found 'A'"),
    "digest": (
        put("subject.0.digest.sha256", "0" * 64),
        "expected marks that end as their digest begins, found others",
    ),
    "no digest": (
        put("subject.0.digest.sha256", "xyz"),
        "the digest of output.marks: expected 64 hex digits",
    ),
    "subject": (put("subject", []), "subject: expected one output, found 0"),
    "seed": (put(f"{REQUEST}.seed", "-"), "seed: expected an integer of 64 bits as a string, found '-'"),
    "prompt": (put(f"{REQUEST}.promptDigest", {"sha256": ""}), "expected either prompt or promptDigest"),
    "field": (put(f"{OUTPUT}.tokenIds", "x"), r"Expected `array`, got `str` - at `$.predicate.output.tokenIds`"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_receipt_is_named_and_the_others_are_read(
    name: str, folder: Path, outputs: list[RequestOutput], tmp_path: Path
) -> None:
    change, message = ALTERED[name]
    lines = receipt_files(folder)[0].read_bytes().splitlines()[:4]
    place = next(i for i, line in enumerate(lines) if len(statement_of(line.decode()).predicate.output.token_ids) == 8)
    lines[place] = altered(lines[place], change)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = list(read_receipts(path))
    assert message in str(found[place])
    assert f"line {place + 1}: " in str(found[place])
    # a change is also seen from the line after it
    suspects = {place, place + 1} & set(range(4))
    assert [isinstance(each, RecordError) for each in found] == [i in suspects for i in range(4)]
    assert "a line was altered, removed or inserted" in str(found[place + 1]) if place < 3 else True


def test_lines_that_are_missing_or_torn(folder: Path, outputs: list[RequestOutput], tmp_path: Path) -> None:
    lines = receipt_files(folder)[0].read_bytes().splitlines(keepends=True)[:4]
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines[0] + lines[2] + lines[3][:-20])
    found = [str(each) for each in read_receipts(path) if isinstance(each, RecordError)]
    assert [text.partition(": ")[2].partition(":")[0] for text in found] == ["previous", "the last line is torn"]
    path.write_bytes(lines[1])
    assert "lines before it are missing" in str(next(read_receipts(path)))
    with pytest.raises(RecordError, match=r"expected files of receipts \(\*\.jsonl\), found none"):
        receipt_files(tmp_path / ".." / tmp_path.name / "..")
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        list(read_receipts(tmp_path / "absent.jsonl"))


@pytest.mark.parametrize("bit", range(0, 8 * 900, 997))
def test_a_flipped_bit_is_noticed(bit: int, folder: Path, outputs: list[RequestOutput], tmp_path: Path) -> None:
    lines = receipt_files(folder)[0].read_bytes().splitlines(keepends=True)[:3]
    damaged = bytearray(lines[1])
    damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines[0] + bytes(damaged) + lines[2])
    assert any(isinstance(each, RecordError) for each in read_receipts(path))


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    script = (
        "import os, sys\nfrom sempre.engine import LLM, SamplingParams\n"
        "llm = LLM('tiny', record=sys.argv[1], max_model_len=128, num_threads=1, multiprocessing=False)\n"
        "llm.generate(['a', 'b'], SamplingParams(max_tokens=3), use_tqdm=False)\nos.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, timeout=120, check=False)
    [file] = receipt_files(tmp_path)
    assert [isinstance(each, Receipt) for each in read_receipts(file)] == [True, True]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"could not be written to .*/file: File exists"):
        LLM("tiny", record=str(tmp_path / "file"), **SETTINGS)


def test_a_receipt_that_cannot_be_written_fails_its_output_alone(tmp_path: Path) -> None:
    folder = tmp_path / "receipts"
    with LLM("tiny", record=str(folder), **SETTINGS) as engine:
        params = SamplingParams(max_tokens=3, seed=1)
        first = engine.generate("a", params, use_tqdm=False)[0].outputs[0]
        os.rename(folder, tmp_path / "away")
        lost = engine.generate("a", params, use_tqdm=False)[0].outputs[0]
        os.rename(tmp_path / "away", folder)
        again = engine.generate("a", params, use_tqdm=False)[0].outputs[0]
    assert (first.finish_reason, lost.finish_reason, again.finish_reason) == ("length", "error", "length")
    assert lost.error is not None
    assert "RecordError: a receipt could not be written to" in lost.error
    assert lost.receipt is None
    assert lost.token_ids == again.token_ids
    # the next receipt begins a new file
    assert [len(list(read_receipts(file))) for file in receipt_files(folder)] == [1, 1]


def test_private_prompts_structured_outputs_and_no_folder() -> None:
    form = StructuredOutputsParams(json={"type": "object"})
    with LLM("tiny", record=True, record_private=True, **SETTINGS) as engine:
        params = SamplingParams(max_tokens=3, structured_outputs=form)
        [output] = engine.generate("a", params, use_tqdm=False)
    request = statement_of(output.outputs[0].receipt).predicate.build_definition.external_parameters
    assert request.prompt_token_ids is None
    ids = output.prompt_token_ids
    assert request.prompt_digest is not None
    assert request.prompt_digest.sha256 == hashlib.sha256(struct.pack(f"<{len(ids)}I", *ids)).hexdigest()
    assert request.sampling_params["structured_outputs"] == {"json": '{"type": "object"}'}
    assert statement_of(output.outputs[0].receipt).predicate.run_details.metadata.previous is None


def test_marks_find_the_first_difference_and_what_was_recorded() -> None:
    tokens, bits = [5, 6, 7, 8], [0xBF800000, 0xC0000000, 0xC0400000, 0xBDCCCCCD]
    chains = []
    for change in (0, 3):
        chain = OutputChain()
        states = []
        for place, (token_id, value) in enumerate(zip(tokens, bits, strict=True)):
            states.append(chain.state)
            chain.add_tokens([token_id], struct.pack("<I", value + change * (place == 2)), 4)
        chains.append((chain, states))
    (one, states), (other, _) = chains
    assert first_difference(one.marks, other.marks) == 2
    assert first_difference(one.marks, one.marks) is None
    assert first_difference(one.marks, one.marks[:8]) is None
    # the bits behind a mark are found near those of another run
    assert recorded_bits(states[2], 7, bits[2], other.marks[8:12], 100) == bits[2] + 3
    assert recorded_bits(states[2], 7, bits[2], other.marks[8:12], 2) is None


def test_the_manifest_is_that_of_the_specification(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.bin").write_bytes(b"x")
    (tmp_path / "a.bin").write_bytes(b"a")
    (tmp_path / "model.sig").write_bytes(b"left out")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_bytes(b"left out")
    assert model_files(tmp_path) == ["a.bin", "b/x.bin"]
    digests = [hashlib.sha256(text).digest() for text in (b"a", b"x")]
    assert manifest_digest(tmp_path) == hashlib.sha256(b"".join(digests)).hexdigest()
    os.chmod(tmp_path / "a.bin", 0)
    if os.geteuid() != 0:
        with pytest.raises(ModelError, match="cannot be read: Permission denied"):
            manifest_digest(tmp_path)


def test_encoding_before_authentication() -> None:
    assert pre_authentication_encoding(b"{}") == f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} 2 {{}}".encode()


def test_without_the_library_a_key_is_refused(tmp_path: Path) -> None:
    if importlib.util.find_spec("cryptography") is not None:
        pytest.skip("cryptography is installed: test_signatures tests keys")
    with pytest.raises(ConfigError, match=r"pip install 'sempre\[receipts\]'"):
        LLM("tiny", record=True, record_key=str(tmp_path / "key.pem"), **SETTINGS)
