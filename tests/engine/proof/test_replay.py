"""Receipts made again are equal, whatever ran beside them; one changed bit of anything is found and named."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from adapters import ATTENTION, save_adapter, tiny_modules
from hybrid_checkpoint import write_hybrid_checkpoint
from receipts import altered_receipt, record_under_load, with_flipped_bit

from sempre.engine import LLM, LoRARequest, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.cli.parser import UsageError
from sempre.engine.cli.replay import read_share
from sempre.engine.proof.dsse import payload_of
from sempre.engine.proof.receipt_log import receipt_files
from sempre.engine.proof.run_comparison import compare_runs, load_run
from sempre.engine.proof.statement import PREDICATE_TYPE, adapter_digest_of, decode
from sempre.engine.version import __version__
from sempre.workers.fingerprint import CPU_PROFILE

SMALL = ["--num-threads", "1", "--no-multiprocessing"]
TINY = Path(__file__).parents[3] / "engine" / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Receipts of 24 requests."""
    path = tmp_path_factory.mktemp("recorded") / "receipts"
    record_under_load(path, 24, num_threads=1)
    return path


@pytest.fixture
def lines(folder: Path) -> list[bytes]:
    return [line for file in receipt_files(folder) for line in file.read_bytes().splitlines()]


def replay(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON object of a replay."""
    capsys.readouterr()
    code = main(["replay", *map(str, arguments), "--json", *SMALL])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("batch", [1, 64])
def test_receipts_recorded_under_load_are_equal(
    batch: int, folder: Path, lines: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = replay(capsys, folder, "--batch", batch)
    assert (code, found["verdict"], found["different"], found["not_judged"]) == (0, "equal", [], [])
    assert found["outputs"] == len(lines) == 27
    assert found["tokens"] > 200
    assert found["fingerprint_changes"] == []


def test_one_pass_over_the_recorded_tokens(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(capsys, folder, "--teacher-forced")
    assert (code, found["outputs"], found["different"]) == (0, 27, [])


def test_outputs_with_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = save_adapter(tmp_path / "a", tiny_modules(ATTENTION), rank=4, size=0.3)
    settings: dict[str, Any] = {"max_model_len": 96, "num_threads": 1, "multiprocessing": False, "enable_lora": True}
    with LLM("tiny", record=str(tmp_path / "r"), max_lora_rank=8, **settings) as llm:
        params = SamplingParams(max_tokens=5, seed=3)
        prompts = ["It is a truth", "It is a truth", "The sea"]
        named = LoRARequest("a", 1, str(adapter))
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=[named, None, named])
    assert outputs[0].fingerprint != outputs[1].fingerprint
    for arguments in ([], ["--teacher-forced"]):
        code, found = replay(capsys, tmp_path / "r", *arguments)
        assert (code, found["outputs"], found["different"], found["not_judged"]) == (0, 3, [], [])
    [file] = receipt_files(tmp_path / "r")

    def without(statement: dict[str, Any]) -> None:
        request_of(statement).pop("adapter")
        statement["predicate"]["buildDefinition"]["resolvedDependencies"].pop()

    code, found = replay(capsys, altered_receipt(file.read_bytes().splitlines()[0], without, tmp_path / "x.jsonl"))
    assert (code, len(found["different"])) == (5, 1)
    assert [part.partition(":")[0] for part in found["fingerprint_changes"]] == ["adapter"]
    # one bit of the adapter
    weights = adapter / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    code, found = replay(capsys, tmp_path / "r")
    assert (code, found["outputs"], len(found["not_judged"])) == (6, 1, 2)
    assert f"the adapter {adapter}: expected files of digest " in found["not_judged"][0]["problem"]


def test_recurrent_layers_generate_token_by_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_hybrid_checkpoint(tmp_path / "model")
    settings: dict[str, Any] = {"max_model_len": 96, "num_threads": 1, "multiprocessing": False}
    with LLM(str(model), record=str(tmp_path / "r"), load_format="dummy", **settings) as llm:
        llm.generate(["It is a truth"], SamplingParams(max_tokens=5, seed=3), use_tqdm=False)
    assert main(["replay", str(tmp_path / "r"), "--teacher-forced", *SMALL]) == 0
    told = "equal, bit for bit (generated token by token: recurrent layers compute a prompt in another order)"
    assert told in capsys.readouterr().out


@pytest.mark.product
@pytest.mark.timeout(1200)
def test_500_receipts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = tiny_modules(ATTENTION)
    adapters = [save_adapter(tmp_path / name, modules, rank=rank, size=0.3) for name, rank in (("a", 4), ("b", 8))]
    count = record_under_load(tmp_path / "receipts", 445, adapters)
    assert count >= 500
    for batch in (16, 500):
        code, found = replay(capsys, tmp_path / "receipts", "--batch", batch)
        assert (code, found["outputs"], found["different"], found["not_judged"]) == (0, count, [], [])
    [file] = receipt_files(tmp_path / "receipts")
    digests = [adapter_digest_of(decode(payload_of(json.loads(line)))) for line in file.read_bytes().splitlines()]
    assert len(set(digests)) == 3, "no adapter, and two"


def test_what_people_see(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(folder), *SMALL]) == 0
    text = capsys.readouterr().out
    assert text.startswith("27 outputs, ")
    assert text.endswith(" tokens: equal, bit for bit\n")


def request_of(statement: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = statement["predicate"]["buildDefinition"]["externalParameters"]
    return found


def first(lines: list[bytes], **params: Any) -> bytes:
    """Return the first receipt with these parameters and more than five tokens."""
    for line in lines:
        statement = json.loads(base64.b64decode(json.loads(line)["payload"]))
        given = request_of(statement)["sampling"]
        fits = all(given.get(name) == value for name, value in params.items())
        if fits and len(statement["predicate"]["output"]["tokenIds"]) > 5:
            return line
    raise AssertionError(params)


def change_token(statement: dict[str, Any]) -> None:
    statement["predicate"]["output"]["tokenIds"][3] ^= 1


def change_mark(statement: dict[str, Any]) -> None:
    """One bit of the mark of position 2: the log-probability there was another."""
    output = statement["predicate"]["output"]
    marks = bytearray(base64.b64decode(output["marks"]))
    marks[9] ^= 1
    output["marks"] = base64.b64encode(bytes(marks)).decode()


CHANGES = {
    "seed": (lambda statement: request_of(statement).update(seed="12345"), "token", None),
    "parameter": (lambda statement: request_of(statement)["sampling"].update(temperature=3.0), "token", None),
    "prompt": (lambda statement: request_of(statement)["prompt"].__setitem__(0, 7), None, 0),
    "token": (change_token, "token", 3),
    "mark": (change_mark, "logprob", 2),
    "end": (lambda s: s["predicate"]["output"].update(finishReason="stop"), "end", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_of_a_receipt_is_found(
    name: str, lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, kind, position = CHANGES[name]
    line = first(lines, top_p=0.9)
    code, found = replay(capsys, altered_receipt(line, lambda statement: None, tmp_path / "same.jsonl"))
    assert (code, found["verdict"]) == (0, "equal")
    code, found = replay(capsys, altered_receipt(line, change, tmp_path / "changed.jsonl"))
    assert (code, found["verdict"]) == (5, "different")
    [difference] = found["different"]
    assert kind in (None, difference["kind"])
    assert position in (None, difference["position"])
    assert difference["a"]["end"] != "" or difference["kind"] != "end"


def test_one_flipped_bit_of_a_weight_is_found_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_flipped_bit(TINY, tmp_path / "model")
    code, found = replay(capsys, folder, "--model", model)
    assert code == 5
    # each output has other log-probabilities from its first token on, mostly with the same tokens
    assert len(found["different"]) == 27
    kinds = {difference["kind"] for difference in found["different"]}
    assert "logprob" in kinds
    near = [each for each in found["different"] if each["kind"] == "logprob" and each["a"]["logprob"] is not None]
    # what was recorded is known again, from its mark
    assert near
    assert all(each["a"]["bits"] != each["b"]["bits"] for each in near)
    assert "ulp apart" in near[0]["sentence"]
    assert [part.partition(":")[0] for part in found["fingerprint_changes"]] == ["weights"]


def facts_of(statement: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = statement["predicate"]["buildDefinition"]["internalParameters"]
    return found


def test_the_release_that_has_the_recorded_numerics_version_is_named(
    lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(statement: dict[str, Any]) -> None:
        facts = facts_of(statement)
        facts["bits"] = facts["bits"].replace(f"numerics={CPU_PROFILE}", "numerics=cpu-fma-99")
        facts["environment"] = facts["environment"].replace(f"engine={__version__}", "engine=9.1.0")

    _, found = replay(capsys, altered_receipt(lines[0], change, tmp_path / "x.jsonl"))
    hint = f"release {__version__} does not know it; release 9.1.0 recorded it"
    assert found["fingerprint_changes"] == [f"numerics: cpu-fma-99 against {CPU_PROFILE} ({hint})"]


def test_a_receipt_whose_fingerprint_had_the_version_of_the_engine(
    lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(statement: dict[str, Any]) -> None:
        facts = facts_of(statement)
        facts["environment"] = facts["environment"].replace(f"engine={__version__};", "")
        facts["bits"] += ";engine=0.0.9"
        statement["predicate"]["runDetails"]["builder"]["id"] = "sempre:0123456789abcdef"

    path = altered_receipt(lines[0], change, tmp_path / "x.jsonl")
    code, found = replay(capsys, path)
    assert (code, found["verdict"], found["fingerprint_changes"]) == (0, "equal", [])
    new = altered_receipt(lines[0], lambda statement: None, tmp_path / "y.jsonl")
    assert compare_runs(load_run(path), load_run(new)).changed_parts() == []


def test_another_kernel_is_found_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(capsys, folder, "--numerics", "control")
    assert code == 5
    assert found["different"]
    hint = "this release computes as recorded, with another device, dtype or setting of numerics"
    assert found["fingerprint_changes"] == [f"numerics: {CPU_PROFILE} against control ({hint})"]
    code, found = replay(capsys, folder, "--numerics", "control", "--teacher-forced")
    assert code == 5


def test_bad_lines_are_named_and_the_others_judged(
    lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(lines[0] + b"\nhello\n" + lines[1][:100])
    assert main(["replay", str(path), *SMALL]) == 6
    text = capsys.readouterr().out
    assert f"not judged: {path}, line 2: expected a JSON object, found text that is not JSON" in text
    assert f"not judged: {path}, line 3: the last line is torn" in text
    assert text.endswith("tokens: equal, bit for bit; 2 not judged\n")
    assert path.read_bytes().endswith(lines[1][:100])


def test_a_receipt_of_a_missing_model(lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(statement: dict[str, Any]) -> None:
        request_of(statement)["model"] = str(tmp_path / "absent")

    path = altered_receipt(lines[0], change, tmp_path / "x.jsonl")
    assert main(["replay", str(path), *SMALL]) == 2
    assert f"{tmp_path / 'absent'} does not exist" in capsys.readouterr().err


def test_parameters_of_another_version(lines: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(statement: dict[str, Any]) -> None:
        request_of(statement)["sampling"]["warmth"] = 1

    code, found = replay(capsys, altered_receipt(lines[0], change, tmp_path / "x.jsonl"))
    assert (code, found["verdict"]) == (6, "not judged")
    assert "no parameter 'warmth'" in found["not_judged"][0]["problem"]


def test_private_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"max_model_len": 256, "num_threads": 1, "multiprocessing": False}
    with LLM("tiny", record=str(tmp_path / "r"), record_private=True, **settings) as llm:
        [output] = llm.generate("a secret", SamplingParams(max_tokens=4), use_tqdm=False)
    code, found = replay(capsys, tmp_path / "r")
    assert (code, found["outputs"]) == (6, 0)
    assert "the prompt is private" in found["not_judged"][0]["problem"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": output.prompt_token_ids}) + "\n")
    assert replay(capsys, tmp_path / "r", "--prompts", prompts)[0] == 0
    prompts.write_text('{"prompt_token_ids": [-1]}\n')
    assert main(["replay", str(tmp_path / "r"), "--prompts", str(prompts), *SMALL]) == 1
    assert "line 1: prompt_token_ids: expected a list of token ids" in capsys.readouterr().err


def test_a_sample(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = [replay(capsys, folder, "--sample", share)[1]["outputs"] for share in ("0.001%", "40%", "0.4", "100%")]
    assert 0 < counts[1] == counts[2] < counts[3] == 27
    assert counts[0] == 0
    assert read_share("1%") == 0.01
    for text in ("0", "101%", "x", "-1%"):
        with pytest.raises(UsageError, match="--sample must be a share"):
            read_share(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no receipts: give a file, or a folder that --record named"),
        (["x", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["x", "--url", "http://localhost:1", "--dtype", "float32"], "--dtype: set these when you start the server"),
        (["x", "--follow"], "--follow needs --url, the address of the server that is audited"),
        (["x", "--url", "http://localhost:1", "--teacher-forced"], "--teacher-forced works on an own engine"),
    ],
    ids=str,
)
def test_usage(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("")
    assert main(["replay", *[word if word != "x" else str(tmp_path / "x") for word in arguments]]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "absent.jsonl"]) == 1
    assert "absent.jsonl: cannot be read: No such file or directory" in capsys.readouterr().err
    assert PREDICATE_TYPE.endswith("v1")


def test_nothing_is_not_equal_to_anything(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = replay(capsys, folder, "--sample", "0.001%")
    assert (code, found["verdict"], found["outputs"]) == (6, "not judged", 0)
    (tmp_path / "none.jsonl").write_bytes(b"")
    assert main(["replay", str(tmp_path / "none.jsonl")]) == 6
    assert capsys.readouterr().out == "no output was judged\n"
