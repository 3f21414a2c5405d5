"""Every logprobs_mode: the bits that are reported depend neither on the batch, nor on chunks, nor on speculation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from workload import launch_inproc, make_requests, run_inproc

from sempre.engine import LLM, BeamSearchParams, RequestOutput, SamplingParams
from sempre.engine.cli.main import main
from sempre.engine.harness import Generation, generate
from sempre.ipc.config import LogprobsMode
from sempre.ipc.errors import ConfigError, RequestError
from sempre.ipc.messages import RequestSpec

MODES: tuple[LogprobsMode, ...] = get_args(LogprobsMode)
OTHERS = [mode for mode in MODES if mode != "raw_logprobs"]
CROWDED: dict[str, Any] = {
    "max_num_seqs": 7,
    "max_num_batched_tokens": 33,
    "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
}
SMALL: dict[str, Any] = {"max_model_len": 128, "num_threads": 1, "multiprocessing": False}


def plain(found: list[Generation]) -> list[Any]:
    return [(each.token_ids, each.logprobs, each.prompt_logprobs) for each in found]


def run_alone(requests: list[RequestSpec], **settings: Any) -> list[Generation]:
    """Each request by itself, one after the other, without a prefix cache."""
    client = launch_inproc(enable_prefix_caching=False, **settings)
    try:
        return [generate(client, [request])[0] for request in requests]
    finally:
        client.close()


@pytest.mark.parametrize("mode", OTHERS)
def test_batches_chunks_and_speculation(mode: LogprobsMode) -> None:
    requests = make_requests()
    alone = run_alone(requests[:9], logprobs_mode=mode)
    together = run_inproc(requests, logprobs_mode=mode, **CROWDED)
    assert plain(together[:9]) == plain(alone)
    raw = run_inproc(requests, **CROWDED)
    assert [each.token_ids for each in raw] == [each.token_ids for each in together]
    assert plain(raw) != plain(together)  # control: the mode has an effect


def test_control_of_another_matmul() -> None:
    requests = make_requests()[:9]
    settings: dict[str, Any] = {"logprobs_mode": "processed_logits", "numerics": "control"}
    alone = run_alone(requests, **settings)
    assert plain(run_inproc(requests, **settings, **CROWDED)) != plain(alone)


def one(llm: LLM, **params: Any) -> RequestOutput:
    [output] = llm.generate("It is a truth", SamplingParams(max_tokens=6, seed=3, **params), use_tqdm=False)
    return output


@pytest.fixture(scope="module")
def raw() -> Iterator[LLM]:
    with LLM("tiny", **SMALL) as llm:
        yield llm


def test_the_fingerprint_names_a_mode_that_is_not_the_default(raw: LLM) -> None:
    with LLM("tiny", **SMALL, logprobs_mode="processed_logprobs") as llm:
        assert llm.fingerprint != raw.fingerprint
        assert llm.fingerprint_parts["logprobs_mode"] == "processed_logprobs"
        assert llm.llm_engine.model_config.logprobs_mode == "processed_logprobs"
        shown, plain = one(llm, top_k=2, logprobs=4), one(raw, top_k=2, logprobs=4)
    assert "logprobs_mode" not in raw.fingerprint_parts
    assert shown.outputs[0].token_ids == plain.outputs[0].token_ids
    for row in shown.outputs[0].logprobs or []:
        finite = [entry.logprob for entry in row.values() if entry.logprob > float("-inf")]
        assert len(finite) == 2
        assert abs(sum(2.718281828459045**value for value in finite) - 1) < 1e-5


def test_a_prompt_is_never_processed(raw: LLM) -> None:
    expected = one(raw, prompt_logprobs=2).prompt_logprobs
    for mode, is_equal in (("processed_logprobs", True), ("processed_logits", False)):
        with LLM("tiny", **SMALL, logprobs_mode=mode) as llm:
            assert (one(llm, prompt_logprobs=2, top_k=1).prompt_logprobs == expected) is is_equal


def test_a_beam_search_needs_logprobs(raw: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    expected = raw.beam_search(["The sea"], params)
    with LLM("tiny", **SMALL, logprobs_mode="processed_logprobs") as llm:
        assert llm.beam_search(["The sea"], params) == expected
    refused = pytest.raises(RequestError, match="logprobs_mode='raw_logits' reports logits")
    with LLM("tiny", **SMALL, logprobs_mode="raw_logits") as llm, refused:
        llm.beam_search(["The sea"], params)


@pytest.mark.parametrize("mode", OTHERS)
def test_receipts_are_replayed_in_their_mode(
    mode: LogprobsMode, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with LLM("tiny", **SMALL, logprobs_mode=mode, record=str(tmp_path / "r")) as llm:
        one(llm, temperature=0.7, top_p=0.9)
        one(llm, repetition_penalty=1.3)
    arguments = ["replay", str(tmp_path / "r"), "--num-threads", "1", "--no-multiprocessing"]
    assert main(arguments) == 0
    assert "equal, bit for bit" in capsys.readouterr().out
    # control: an engine in another mode reports other values
    assert main([*arguments, "--logprobs-mode", "raw_logprobs"]) == 5
    assert "logprobs_mode" in capsys.readouterr().out


def test_one_pass_is_refused_where_logits_are_processed() -> None:
    from sempre.engine.proof.replay import LocalReplayer

    refused = pytest.raises(ConfigError, match="teacher_forced: expected log-probabilities of raw logits")
    with LLM("tiny", **SMALL, logprobs_mode="processed_logits") as llm, refused:
        LocalReplayer(llm, teacher_forced=True)
