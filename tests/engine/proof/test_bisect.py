"""The first operation that differs is found and named: another kernel, one flipped bit of one weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from receipts import with_flipped_bit

from sempre.engine import LLM, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.proof.bisection import tracer
from sempre.engine.proof.receipt_log import receipt_files
from sempre.engine.proof.traces import TracedOperation, first_different, same_results, shared_results
from sempre.ipc.errors import ConfigError

FLAGS = ["--num-threads", "1"]
TINY = Path(__file__).parents[3] / "engine" / "checkpoints" / "tiny"
SETTINGS: dict[str, Any] = {"max_model_len": 256, "num_threads": 1, "multiprocessing": False}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS) as engine:
        yield engine


def bisect(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["bisect", *map(str, arguments), "--json", *FLAGS])
    return code, json.loads(capsys.readouterr().out)


def test_settings_that_decide_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bisect(capsys, "tiny", '{"max_num_batched_tokens": 64, "enable_prefix_caching": false}')
    assert (code, found["verdict"], found["token"], found["operation"]) == (0, "equal", None, None)
    assert found["operations_compared"] > 80


def test_another_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = bisect(capsys, "tiny", '{"numerics": "control"}')
    assert (code, found["verdict"]) == (5, "different")
    operation = found["operation"]
    # the first matmul; the norm before it has the same kernel
    assert operation["path"] == "model.layers.0.self_attn.qkv_proj"
    assert operation["a_bits"] != operation["b_bits"]
    assert operation["ulps"] > 0
    [change] = found["fingerprint_changes"]
    assert change.startswith("numerics: cpu-fma-")
    assert change.endswith(" against control")
    assert main(["bisect", "tiny", '{"numerics": "control"}', *FLAGS]) == 5
    text = capsys.readouterr().out
    assert "first difference of the outputs: at output token 0" in text
    assert "first operation that differs: model.layers.0.self_attn.qkv_proj (" in text


@pytest.mark.parametrize(
    ("tensor", "path"),
    [
        ("model.layers.3.post_attention_layernorm.weight", "model.layers.3.post_attention_layernorm"),
        ("model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj"),
        ("model.norm.weight", "model.norm"),
    ],
)
def test_one_flipped_bit_of_a_weight(
    tensor: str, path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = bisect(capsys, "tiny", with_flipped_bit(TINY, tmp_path / "model", tensor), "--prompt", "A test of")
    assert (code, found["operation"]["path"]) == (5, path)
    # one element of one row of the weight is another
    assert found["operation"]["element"] == 0
    assert found["operation"]["num_elements"] == 1
    assert [part.partition(":")[0] for part in found["fingerprint_changes"]] == ["weights"]


def test_a_receipt_is_the_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with LLM("tiny", record=str(tmp_path), **SETTINGS) as engine:
        engine.generate(["a", "The sea"], SamplingParams(max_tokens=4, seed=3), use_tqdm=False)
    [file] = receipt_files(tmp_path)
    code, found = bisect(capsys, "tiny", '{"numerics": "control"}', "--receipt", f"{file}:2")
    assert (code, found["operation"]["path"]) == (5, "model.layers.0.self_attn.qkv_proj")
    for text, message in ((f"{file}:9", "has no valid receipt in line 9"), ("x", "--receipt must be FILE:LINE")):
        assert main(["bisect", "tiny", "tiny", "--receipt", text]) == 2
        assert message in capsys.readouterr().err


def test_rows_do_not_depend_on_the_rows_after_them(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("It was a dark and stormy night, and the rain fell in torrents")
    whole, part = tracer(llm).trace(ids), tracer(llm).trace(ids[:7])
    assert [entry[:4] for entry in whole] == [entry[:4] for entry in part]
    assert [entry.digests[:56] for entry in whole] == [entry.digests for entry in part]
    other = tracer(llm).trace([*ids[:6], 5])
    assert [entry.digests[:48] for entry in whole] == [entry.digests[:48] for entry in other]
    assert whole[0].digests[48:56] != other[0].digests[48:56]


def test_the_traced_logits_are_those_of_generation(llm: LLM) -> None:
    prompt = "It was a dark and stormy night, and"
    [output] = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=6, logprobs=1), use_tqdm=False)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    trace = tracer(llm).trace(ids)
    assert trace[-1].path == "logits"
    for place, token_id in enumerate(output.outputs[0].token_ids):
        row = len(output.prompt_token_ids) + place - 1
        values = tracer(llm).row(trace[-1], ids, row)
        logits = memoryview(values).cast("f").tolist()
        assert logits.index(max(logits)) == token_id


def test_worker_methods_refuse_other_arguments(llm: LLM) -> None:
    for method, arguments, message in (
        ("trace_modules", [[]], "token_ids: expected 1 to 2048 ids, found 0"),
        ("trace_modules", [[-1]], r"token_ids: expected ids in \[0, "),
        ("trace_modules", [["a"]], "found 'a'"),
        ("traced_row", [[1], 0, 10_000, 0], "index, row: expected less than"),
    ):
        with pytest.raises(ConfigError, match=message):
            llm.collective_rpc(method, args=arguments)


def operation(path: str, width: int = 2, digests: bytes = bytes(8), dtype: str = "float32") -> TracedOperation:
    return TracedOperation(path, "Linear", dtype, width, digests)


def test_models_of_other_trees() -> None:
    one = [operation("a"), operation("b")]
    with pytest.raises(ConfigError, match=r"different things: b \(Linear, float32\) against c \(Linear, float32\)"):
        same_results(one, [one[0], operation("c")])
    with pytest.raises(ConfigError, match="the models have 2 and 1 results"):
        same_results(one, one[:1])
    assert first_different(same_results(one, list(one))) is None
    assert first_different(same_results(one, [operation("a", digests=b"1234567x"), one[1]])) == (0, [0])


def test_what_two_layouts_have_whole_is_compared() -> None:
    alone = [operation("a"), operation("b", 4), operation("b", 4), operation("c"), operation("logits")]
    shared = [operation("a"), operation("b", 4), operation("b", 2), operation("logits", digests=b"1234567x")]
    pairs = shared_results(alone, shared)
    # the second result of b is a rank's own part, and c is another rank's
    assert [one.path for one, _ in pairs] == ["a", "b", "logits"]
    assert first_different(pairs) == (2, [0])
    with pytest.raises(ConfigError, match="no logits in common"):
        shared_results(alone, shared[:-1])
    with pytest.raises(ConfigError, match=r"a \(Linear, float32\) against a \(Linear, float16\)"):
        shared_results(alone, [operation("a", dtype="float16"), *shared[1:]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "expected two sides, found 1"),
        (["{}", "{}"], "one of the sides must be a model"),
        (["tiny", "{x"], "expected a JSON object"),
        (["tiny", "{}", "--prompt", "a", "--receipt", "b:1"], "give --prompt or --receipt, not both"),
        (["tiny", '{"numerics": "other"}'], "numerics must be 'invariant' or 'control'"),
    ],
    ids=str,
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bisect", *arguments, *FLAGS]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    assert main(["bisect", "tiny", str(tmp_path / "model"), *FLAGS]) == 3
    assert "model.safetensors" in capsys.readouterr().err
