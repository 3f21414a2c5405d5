"""Receipts of what is not sampled: the beams of a search, and what a model pools."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from pooling_checkpoints import embedder
from receipts import altered_receipt

from sempre.engine import LLM, BeamSearchParams, PoolingParams, RecordError
from sempre.engine.cli.main import main
from sempre.engine.proof.dsse import payload_of
from sempre.engine.proof.output_chain import OutputChain
from sempre.engine.proof.receipt_log import Receipt, read_receipts, receipt_files
from sempre.engine.proof.statement import Statement, decode

SMALL = ["--num-threads", "1", "--no-multiprocessing"]
SETTINGS: dict[str, Any] = {"max_model_len": 128, "num_threads": 1, "multiprocessing": False}


def replay(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["replay", *map(str, arguments), "--json", *SMALL])
    return code, json.loads(capsys.readouterr().out)


def recorded(folder: Path) -> tuple[Path, list[bytes], list[Statement]]:
    """The one file of a folder, its lines, and what they say."""
    [file] = receipt_files(folder)
    lines = file.read_bytes().splitlines()
    return file, lines, [decode(payload_of(json.loads(line))) for line in lines]


def asked_of(statement: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = statement["predicate"]["buildDefinition"]["externalParameters"]
    return found


def test_beams(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = BeamSearchParams(beam_width=3, max_tokens=6, length_penalty=0.8)
    prompts: list[Any] = [{"prompt": "It is a truth"}, {"prompt": "The sea"}]
    with LLM("tiny", record=str(tmp_path / "r"), **SETTINGS) as llm:
        outputs = llm.beam_search(prompts, params)
    _, lines, statements = recorded(tmp_path / "r")
    beams = [beam for output in outputs for beam in output.sequences]
    assert [beam.receipt for beam in beams] == [line.decode() for line in lines]
    for beam, statement in zip(beams, statements, strict=True):
        predicate = statement.predicate
        asked, output = predicate.build_definition.external_parameters, predicate.output
        assert asked.prompt_token_ids is not None
        assert beam.tokens == [*asked.prompt_token_ids, *output.token_ids]
        assert (output.finish_reason, output.stop_reason) == (beam.finish_reason, beam.stop_reason)
        assert asked.sampling_params == {}
        chain = OutputChain()
        for token_id, row in zip(output.token_ids, beam.logprobs, strict=False):
            chain.add_tokens([token_id], struct.pack("<f", row[token_id].logprob), 4)
        assert base64.b64decode(output.marks) == chain.marks
    for arguments in ([], ["--batch", 1], ["--teacher-forced"]):
        code, found = replay(capsys, tmp_path / "r", *arguments)
        assert (code, found["outputs"], found["different"], found["not_judged"]) == (0, 6, [], [])
    for change, expected in (({"index": 1}, 5), ({"length_penalty": 1.0, "max_tokens": 5}, 5), ({"index": 3}, 6)):
        altered = altered_receipt(
            lines[0], lambda s, change=change: asked_of(s)["beamSearch"].update(change), tmp_path / "x.jsonl"
        )
        assert replay(capsys, altered)[0] == expected, change
    assert main(["compare", str(tmp_path / "r"), str(tmp_path / "r")]) == 0


def test_pooled_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = embedder(tmp_path / "model", "MEAN", matryoshka_dimensions=[16, 64])
    with LLM(model, record=str(tmp_path / "r"), **SETTINGS) as llm:
        whole = llm.embed(["It is a truth", "The sea"], use_tqdm=False)
        [cut] = llm.encode("It is a truth", PoolingParams(dimensions=16, use_activation=False), use_tqdm=False)
    _, lines, statements = recorded(tmp_path / "r")
    kept = [base64.b64decode(statement.predicate.output.pooled or "") for statement in statements]
    vectors = [*(output.outputs.embedding for output in whole), cut.outputs.data]
    assert kept == [struct.pack(f"<{len(vector)}f", *vector) for vector in vectors]
    assert [len(values) for values in kept] == [4 * len(vectors[0])] * 2 + [64]
    code, found = replay(capsys, tmp_path / "r")
    assert (code, found["outputs"], found["different"], found["not_judged"]) == (0, 3, [], [])
    prompt = statements[1].predicate.build_definition.external_parameters.prompt_token_ids
    altered = altered_receipt(lines[0], lambda s: asked_of(s).update(prompt=prompt), tmp_path / "x.jsonl")
    code, found = replay(capsys, altered)
    assert (code, len(found["different"])) == (5, 1)
    assert "at element 0 of what is pooled: " in json.dumps(found["different"])
    flipped = base64.b64encode(bytes([kept[0][0] ^ 1]) + kept[0][1:]).decode()
    altered = altered_receipt(lines[0], lambda s: s["predicate"]["output"].update(pooled=flipped), tmp_path / "y.jsonl")
    [error] = read_receipts(altered)
    assert isinstance(error, RecordError)
    assert "output.pooled: expected float32 values of the subject's digest: it was altered" in str(error)
    assert all(isinstance(receipt, Receipt) for receipt in read_receipts(receipt_files(tmp_path / "r")[0]))
