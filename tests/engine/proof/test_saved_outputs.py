"""Outputs that are saved are loaded equal, bit for bit; a bad line is named, and the others are still read."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sempre.engine import LLM, RecordError, SamplingParams, load_outputs, save_outputs, to_frame
from sempre.engine.outputs import CompletionOutput, Logprob, RequestOutput
from sempre.engine.proof.frames import frame_rows
from sempre.engine.proof.logprob_bits import float32_bits, from_bits, ulps_between
from sempre.engine.proof.saved_outputs import read_outputs
from sempre.ipc.errors import ConfigError


def output(*logprobs: float, text: str = "<b>&\u2028", name: str = "0") -> RequestOutput:
    rows = [{i: Logprob(value, i + 1, f"<{i}>")} for i, value in enumerate(logprobs)]
    ids = list(range(len(logprobs)))
    completion = CompletionOutput(0, text, ids, math.fsum(logprobs), rows, "stop", "</b>", 2**64 - 1)
    return RequestOutput(name, "prompt", [5, 6], [None, {6: Logprob(-0.5, 1)}], [completion], True, fingerprint="f0")


@pytest.fixture(scope="module")
def generated() -> list[RequestOutput]:
    with LLM("tiny", max_model_len=128, num_threads=1, multiprocessing=False) as llm:
        assert repr(llm) == f"LLM('tiny', seed=0, fingerprint={llm.fingerprint!r})"
        params = SamplingParams(n=2, temperature=0.9, max_tokens=6, logprobs=2, prompt_logprobs=1, seed=5)
        return llm.generate(["It is a truth", "The sea, the"], [params, SamplingParams(max_tokens=3)], use_tqdm=False)


def test_generated_outputs_come_back_equal(generated: list[RequestOutput], tmp_path: Path) -> None:
    save_outputs(generated, tmp_path / "run.jsonl")
    assert load_outputs(str(tmp_path / "run.jsonl")) == generated
    assert [path.name for path in tmp_path.iterdir()] == ["run.jsonl"]
    changed = dataclasses.replace(generated[0].outputs[1], token_ids=[*generated[0].outputs[1].token_ids[:-1], 0])
    other = [dataclasses.replace(generated[0], outputs=[generated[0].outputs[0], changed]), generated[1]]
    save_outputs(other, tmp_path / "run.jsonl")
    assert load_outputs(tmp_path / "run.jsonl") == other != generated


@settings(max_examples=30)
@given(st.lists(st.integers(0, 2**32 - 1).map(from_bits).filter(lambda value: value == value), max_size=4))
def test_every_float32_comes_back(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.mktemp("saved") / "run.jsonl"
    original = output(*values) if all(map(math.isfinite, values)) else dataclasses.replace(output(), prompt=None)
    original.outputs[0].logprobs = [{0: Logprob(value)} for value in values]
    save_outputs([original], path)
    rows = load_outputs(path)[0].outputs[0].logprobs or []
    assert [float32_bits(row[0].logprob) for row in rows] == [float32_bits(value) for value in values]


def test_numbers_that_json_lacks() -> None:
    text = output(-math.inf, math.nan).to_json()
    assert [row[str(i)]["logprob"] for i, row in enumerate(json.loads(text)["outputs"][0]["logprobs"])] == [
        "-Infinity",
        "NaN",
    ]
    assert "\n" not in text


def test_a_file_that_cannot_be_replaced_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    save_outputs([output(-1.0)], path)
    before = path.read_bytes()
    bad = output(-1.0)
    bad.prompt_token_ids = object()  # type: ignore[assignment]
    with pytest.raises(TypeError):
        save_outputs([output(-2.0), bad], path)
    with pytest.raises(ConfigError, match=r"^outputs\[1\] must be a RequestOutput, got str\.$"):
        save_outputs([output(-2.0), "x"], path)  # type: ignore[list-item]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


HEAD = '{"schema": "sempre/outputs/v1", "count": 2, "engine": "0.1.0"}\n'
REFUSED = {
    "empty": ("", "is empty: expected a line with the schema sempre/outputs/v1"),
    "other": ('{"a": 1}\n', "line 1: expected the schema 'sempre/outputs/v1', found None. It is no file of save_out"),
    "newer": ('{"schema": "sempre/outputs/v2"}\n', "found 'sempre/outputs/v2'. A newer engine reads it."),
    "count": ('{"schema": "sempre/outputs/v1", "count": true}\n', "line 1: count: expected a number of outputs, found"),
    "text": ("hello\n", "line 1: expected a JSON object, found text that is not JSON"),
    "list": ("[]\n", "line 1: expected a JSON object, found list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    (tmp_path / "x").write_text(text)
    with pytest.raises(RecordError) as caught:
        load_outputs(tmp_path / "x")
    assert message in str(caught.value)
    assert caught.value.path == str(tmp_path / "x")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file or directory"):
        load_outputs(tmp_path / "absent")


def test_bad_lines_are_named_and_the_others_read(tmp_path: Path) -> None:
    good = output(-1.0)
    lines = [good.to_json(), '{"request_id": 7}', good.to_json()[:-9], good.to_json()]
    path = tmp_path / "x"
    path.write_text(HEAD.replace("2", "5", 1) + "\n".join(lines))
    found = read_outputs(path)
    assert found[0] == good
    errors = [str(each).removeprefix(str(path)) for each in found[1:]]
    assert [text[:60] for text in errors] == [
        ", line 3: expected an output, found other fields: Expected `str"[:60],
        ", line 4: expected a JSON object, found text that is not JSON ("[:60],
        ", line 5: the last line is torn: expected a line feed at its e"[:60],
        " is truncated: expected 5 outputs, found 4. Save the run again."[:60],
    ]
    assert path.read_text().startswith(HEAD[:10])


def test_rows_of_a_table(generated: list[RequestOutput]) -> None:
    completions = list(frame_rows(generated, "completion"))
    assert [(row["index"], row["seed"], row["num_tokens"]) for row in completions[:2]] == [(0, 5, 6), (1, 6, 6)]
    tokens = [row for row in frame_rows(generated, "token") if row["request_id"] == generated[0].request_id]
    assert [row["token_id"] for row in tokens] == [t for c in generated[0].outputs for t in c.token_ids]
    assert "".join(row["token"] for row in tokens[:6]) == generated[0].outputs[0].text
    assert [row["logprob"] for row in frame_rows(generated[1:], "token")] == [None] * 3
    with pytest.raises(ConfigError, match="per must be 'completion' or 'token', got 'word'"):
        to_frame(generated, "word")  # type: ignore[arg-type]


def test_a_table_needs_pandas(generated: list[RequestOutput]) -> None:
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(ConfigError, match="to_frame needs pandas, which is not installed: pip install pandas"):
            to_frame(generated)
    else:
        frame = to_frame(generated, "token")
        assert list(frame["token_id"]) == [row["token_id"] for row in frame_rows(generated, "token")]


def test_the_view_of_a_notebook() -> None:
    html = output(-0.01, -5.0)._repr_html_()
    assert 'class="t p4 "' in html
    assert 'title="token 1, logprob -5.0 (0xc0a00000), rank 2">&lt;1&gt;</span>' in html
    assert "<b>" not in html
    plain = dataclasses.replace(output(), outputs=[dataclasses.replace(output().outputs[0], logprobs=None)])
    assert "<pre>&lt;b&gt;&amp;\u2028</pre>" in plain._repr_html_()
    assert 'class="t p0' in output(math.nan)._repr_html_()


def test_ulps() -> None:
    assert ulps_between(-1.0, -1.0) == 0
    assert ulps_between(0.0, -0.0) == 0
    assert ulps_between(from_bits(0xBF800000), from_bits(0xBF800003)) == 3
    assert ulps_between(from_bits(1), from_bits(0x80000002)) == 3
