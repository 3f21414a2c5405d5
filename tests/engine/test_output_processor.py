"""Deltas to outputs: text, stop strings, log-probabilities, kinds of streaming, and nothing left behind."""

from __future__ import annotations

import math
import struct
from itertools import pairwise
from typing import Any

import pytest
from msgspec.structs import replace

from sempre.engine.frontend.frontend import raise_failure
from sempre.engine.frontend.limits import RequestLimits
from sempre.engine.frontend.output_processor import OutputProcessor, Processed, RequestState
from sempre.engine.frontend.request_builder import RequestBuilder
from sempre.engine.outputs import Logprob, RequestOutput
from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import MessageMalformed, RequestCrashed, RequestError
from sempre.ipc.messages import ErrorInfo, LogprobRows, RequestOutputDelta

LIMITS = RequestLimits(
    engine_seed=0,
    vocab_size=400,
    max_model_len=512,
    max_kv_tokens=1024,
    max_logprobs=20,
    eos_token_ids=[1],
)
DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


class Harness:
    """A builder and a processor, fed with token ids by sequence id."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.builder = RequestBuilder(tokenizer, LIMITS)
        self.processor = OutputProcessor(tokenizer, lambda adapter: "fingerprint")

    def add(self, prompt: Any = "The", request_id: str = "r", **params: Any) -> RequestState:
        return self.processor.add(self.builder.build(prompt, SamplingParams(**params), request_id=request_id))

    def feed(self, token_ids: list[int], request_id: str = "r", **fields: Any) -> Processed:
        return self.processor.process([RequestOutputDelta(request_id=request_id, token_ids=token_ids, **fields)])

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture
def harness(byte_level: Tokenizer) -> Harness:
    return Harness(byte_level)


def output_of(state: RequestState, kind: RequestOutputKind | None = None) -> RequestOutput:
    output = state.take_output(kind)
    assert output is not None
    return output


def rows(*rows_: list[tuple[int, float]], ranks: list[int]) -> LogprobRows:
    width = len(rows_[0])
    flat = [entry for row in rows_ for entry in row]
    return LogprobRows(
        num_rows=len(rows_),
        width=width,
        token_ids=struct.pack(f"<{len(flat)}i", *(token_id for token_id, _ in flat)),
        logprobs=struct.pack(f"<{len(flat)}f", *(logprob for _, logprob in flat)),
        ranks=struct.pack(f"<{len(ranks)}i", *ranks),
    )


def test_text_and_fields(harness: Harness) -> None:
    state = harness.add(seed=5)
    ids = harness.ids(" quick brown fox")
    harness.feed(ids[:1], num_cached_tokens=2)
    harness.feed(ids[1:], finish_reason="length")
    output = output_of(state)
    completion = output.outputs[0]
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "The", harness.ids("The"))
    assert (output.finished, output.fingerprint, output.num_cached_tokens) == (True, "fingerprint", 2)
    assert (completion.index, completion.text, completion.token_ids) == (0, " quick brown fox", ids)
    assert (completion.finish_reason, completion.stop_reason, completion.seed) == ("length", None, 5)
    assert (completion.logprobs, completion.cumulative_logprob, completion.error) == (None, None, None)
    assert completion.finished()
    assert output.metrics is not None
    assert output.metrics.first_token_time is not None
    assert output.metrics.finished_time is not None


def test_cumulative_outputs_hold_everything(harness: Harness) -> None:
    state = harness.add()
    seen = []
    for token_id in harness.ids(" quick brown"):
        harness.feed([token_id])
        seen.append(output_of(state).outputs[0].text)
    assert all(later.startswith(earlier) for earlier, later in pairwise(seen))
    assert seen[-1] == " quick brown"
    assert state.take_output() is None


def test_delta_outputs_hold_what_is_new(harness: Harness) -> None:
    state = harness.add(output_kind=DELTA, prompt_logprobs=0, logprobs=0)
    ids = harness.ids(" quick brown fox")
    prompt_length = len(harness.ids("The"))
    prompt_rows = (
        rows(*[[(7, -0.5)]] * (prompt_length - 1), ranks=[3] * (prompt_length - 1)) if prompt_length > 1 else None
    )
    outputs = []
    for i, token_id in enumerate(ids):
        harness.feed(
            [token_id],
            logprobs=rows([(token_id, -1.0)], ranks=[1]),
            prompt_logprobs=prompt_rows if i == 0 else None,
            finish_reason="length" if i == len(ids) - 1 else None,
        )
        outputs.append(output_of(state))
    assert "".join(output.outputs[0].text for output in outputs) == " quick brown fox"
    assert [token_id for output in outputs for token_id in output.outputs[0].token_ids] == ids
    assert [len(output.outputs[0].logprobs or []) for output in outputs] == [1] * len(ids)
    assert outputs[-1].outputs[0].cumulative_logprob == -float(len(ids))
    assert outputs[0].prompt_logprobs is not None
    assert len(outputs[0].prompt_logprobs) == prompt_length
    assert [output.prompt_logprobs for output in outputs[1:]] == [None] * (len(ids) - 1)


def test_a_slow_reader_gets_larger_deltas(harness: Harness) -> None:
    state = harness.add(output_kind=DELTA)
    ids = harness.ids(" quick brown fox")
    for token_id in ids:
        harness.feed([token_id])
    assert output_of(state).outputs[0].token_ids == ids
    assert state.take_output() is None


def test_final_only(harness: Harness) -> None:
    state = harness.add(output_kind=FINAL_ONLY)
    harness.feed(harness.ids(" quick"))
    assert state.take_output() is None
    harness.feed([], finish_reason="length")
    assert output_of(state).outputs[0].text == " quick"


@pytest.mark.parametrize("grouping", [1, 2, 100])
@pytest.mark.parametrize(("include", "text"), [(False, " quick"), (True, " quick brown")])
def test_stop_string(harness: Harness, grouping: int, include: bool, text: str) -> None:
    state = harness.add(stop=[" brown", "zzz"], include_stop_str_in_output=include)
    ids = harness.ids(" quick brown fox jumps over")
    stopped: list[str] = []
    for start in range(0, len(ids), grouping):
        stopped += harness.feed(ids[start : start + grouping]).stopped_ids
    output = output_of(state)
    completion = output.outputs[0]
    assert stopped == ["r"]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", " brown")
    # The token that completed the stop string is the last one, however the tokens came.
    assert harness.tokenizer.decode(completion.token_ids) == " quick brown"
    assert output.finished
    assert harness.processor.num_unfinished == 0


def test_stop_string_in_the_last_delta_needs_no_abort(harness: Harness) -> None:
    state = harness.add(stop=" brown")
    processed = harness.feed(harness.ids(" quick brown fox"), finish_reason="length")
    assert processed.stopped_ids == []
    assert output_of(state).outputs[0].finish_reason == "stop"


def test_log_probabilities_after_a_stop_string_are_dropped(harness: Harness) -> None:
    state = harness.add(stop=" brown", logprobs=0)
    ids = harness.ids(" quick brown fox")
    harness.feed(ids, logprobs=rows(*[[(token_id, -1.0)] for token_id in ids], ranks=[1] * len(ids)))
    completion = output_of(state).outputs[0]
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids) < len(ids)
    assert completion.cumulative_logprob == -float(len(completion.token_ids))


def test_end_token_leaves_no_text(harness: Harness) -> None:
    state = harness.add(skip_special_tokens=False)
    harness.feed([*harness.ids(" fox"), 1], finish_reason="stop")
    completion = output_of(state).outputs[0]
    assert (completion.text, completion.token_ids[-1], completion.stop_reason) == (" fox", 1, None)


def test_stop_token_id(harness: Harness) -> None:
    (dot,) = harness.ids(".")
    state = harness.add(stop_token_ids=[dot])
    harness.feed([*harness.ids(" fox"), dot], finish_reason="stop", stop_reason=dot)
    completion = output_of(state).outputs[0]
    assert (completion.text, completion.stop_reason) == (" fox", dot)


def test_without_detokenization(harness: Harness) -> None:
    state = harness.add(detokenize=False, logprobs=0)
    harness.feed([5, 6], logprobs=rows([(5, -1.0)], [(6, -2.0)], ranks=[1, 2]), finish_reason="length")
    completion = output_of(state).outputs[0]
    assert (completion.text, completion.token_ids) == ("", [5, 6])
    assert completion.logprobs == [{5: Logprob(-1.0, 1, None)}, {6: Logprob(-2.0, 2, None)}]


def test_log_probabilities(harness: Harness) -> None:
    state = harness.add(logprobs=2)
    (a, b, c) = (harness.ids(text)[0] for text in (" ", "f", "x"))
    exact = struct.unpack("<f", struct.pack("<f", -0.1))[0]
    harness.feed(
        [c, a],
        logprobs=rows([(c, -9.5), (a, exact), (b, -2.0)], [(a, exact), (a, exact), (b, -2.0)], ranks=[44, 1]),
        finish_reason="length",
    )
    completion = output_of(state).outputs[0]
    assert completion.logprobs is not None
    first, second = completion.logprobs
    # k + 1 entries with the sampled token first; k when it is among the best.
    assert list(first) == [c, a, b]
    assert list(second) == [a, b]
    assert [entry.rank for entry in first.values()] == [44, 1, 2]
    assert [entry.rank for entry in second.values()] == [1, 2]
    assert first[a].logprob == exact
    assert first[c].decoded_token == "x"
    assert completion.cumulative_logprob == -9.5 + exact


def test_prompt_log_probabilities_come_in_pieces(harness: Harness) -> None:
    state = harness.add(prompt=[5, 6, 7, 8], prompt_logprobs=1)
    harness.feed([], prompt_logprobs=rows([(6, -1.0), (9, -0.5)], ranks=[2]))
    harness.feed([3], prompt_logprobs=rows([(7, -0.1), (7, -0.1)], [(8, -3.0), (9, -0.5)], ranks=[1, 5]))
    found = output_of(state).prompt_logprobs
    assert found is not None
    assert found[0] is None
    assert [list(row) for row in found[1:] if row is not None] == [[6, 9], [7], [8, 9]]


@pytest.mark.parametrize("kind", [DELTA, RequestOutputKind.CUMULATIVE])
def test_the_matrix_of_candidates_is_told_once_it_is_complete(harness: Harness, kind: RequestOutputKind) -> None:
    rows_of_ids = [[4], [4, 5]]
    state = harness.add(
        prompt=[5, 6, 7, 8], prompt_logprob_token_ids=rows_of_ids, prompt_logprob_start=1, output_kind=kind
    )
    part = replace(rows([(7, -0.1)], ranks=[1]), candidates=struct.pack("<2f", -1.0, -math.inf))
    harness.feed([], prompt_logprobs=part)
    assert state.take_output() is None
    harness.feed([3], prompt_logprobs=replace(part, candidates=struct.pack("<2f", -2.0, -3.0)))
    output = output_of(state)
    assert output.prompt_logprobs is None
    assert output.prompt_token_id_logprobs is not None
    assert output.prompt_token_id_logprobs.tolist() == [[-1.0, -math.inf], [-2.0, -3.0]]
    assert state.num_held == (0 if kind is DELTA else 4)
    harness.feed([3])
    assert (output_of(state).prompt_token_id_logprobs is None) is (kind is DELTA)


@pytest.mark.parametrize("kind", [DELTA, RequestOutputKind.CUMULATIVE])
def test_siblings_wait_for_the_prompt_of_the_first_one(harness: Harness, kind: RequestOutputKind) -> None:
    """The second one may be ahead, with a prefix cache or on another replica."""
    state = harness.add(prompt=[5, 6, 7], prompt_logprobs=0, n=2, output_kind=kind)
    harness.feed([9], "r_1")
    assert state.take_output() is None
    harness.feed([], "r_0", prompt_logprobs=rows([(6, -1.0)], ranks=[1]))
    harness.feed([10], "r_1")
    assert state.take_output() is None
    harness.feed([8], "r_0", prompt_logprobs=rows([(7, -2.0)], ranks=[1]))
    first = output_of(state)
    assert first.prompt_logprobs is not None
    assert len(first.prompt_logprobs) == 3
    assert [completion.token_ids for completion in first.outputs] == [[8], [9, 10]]
    harness.feed([11], "r_1")
    assert output_of(state).prompt_logprobs == (None if kind is DELTA else first.prompt_logprobs)


def test_siblings_do_not_wait_for_the_prompt_of_one_that_has_ended(harness: Harness) -> None:
    state = harness.add(prompt=[5, 6, 7], prompt_logprobs=0, n=2, output_kind=DELTA)
    harness.feed([9], "r_1")
    harness.feed([], "r_0", finish_reason="abort")
    assert [completion.index for completion in output_of(state).outputs] == [0, 1]


def test_malformed_rows(harness: Harness) -> None:
    harness.add(logprobs=0)
    broken = LogprobRows(num_rows=1, width=1, token_ids=b"123", logprobs=b"1234", ranks=b"1234")
    with pytest.raises(MessageMalformed, match=r"LogprobRows.token_ids: expected 4 bytes, found 3") as caught:
        harness.feed([5], logprobs=broken)
    assert caught.value.field == "token_ids"


def test_missing_rows(harness: Harness) -> None:
    harness.add(logprobs=0)
    with pytest.raises(RequestError, match="log-probabilities of 0 tokens, and 1 were sampled"):
        harness.feed([5])


def test_siblings(harness: Harness) -> None:
    state = harness.add(n=2, seed=9, output_kind=DELTA)
    harness.feed(harness.ids(" quick"), "r_1")
    output = output_of(state)
    assert [completion.index for completion in output.outputs] == [1]
    assert not output.finished
    harness.feed(harness.ids(" fox"), "r_0", finish_reason="length")
    assert [completion.index for completion in output_of(state).outputs] == [0]
    harness.feed([], "r_1", finish_reason="length")
    last = output_of(state)
    assert last.finished
    assert [(completion.index, completion.seed) for completion in last.outputs] == [(1, 10)]


def test_the_first_sibling_reports_the_cache_and_the_first_delta_the_time(harness: Harness) -> None:
    """A sibling finds in the cache what the first one has just put there."""
    state = harness.add(n=2, seed=9)
    harness.feed([], "r_1", num_cached_tokens=16, time_in_queue=0.25)
    assert state.metrics.first_token_time is None
    harness.feed(harness.ids(" quick"), "r_0", time_in_queue=0.75)
    first_token_time = state.metrics.first_token_time
    harness.feed(harness.ids(" quick"), "r_1", finish_reason="length")
    harness.feed(harness.ids(" fox"), "r_0", finish_reason="length")
    output = output_of(state)
    assert output.num_cached_tokens == 0
    assert output.metrics is not None
    assert output.metrics.time_in_queue == 0.25
    assert first_token_time is not None
    assert output.metrics.first_token_time == first_token_time


@pytest.mark.parametrize("stop", [None, "END"])
def test_an_end_without_tokens_lets_out_what_is_unfinished(harness: Harness, stop: str | None) -> None:
    state = harness.add(stop=stop)
    first, *_ = harness.ids("ß")
    harness.feed([first])
    assert output_of(state).outputs[0].text == ""
    harness.feed([], finish_reason="abort")
    assert output_of(state).outputs[0].text == harness.tokenizer.decode([first]) == "\N{REPLACEMENT CHARACTER}"


def test_siblings_final_only(harness: Harness) -> None:
    state = harness.add(n=2, seed=9)
    harness.feed(harness.ids(" quick"), "r_1", finish_reason="length")
    assert state.take_output(FINAL_ONLY) is None
    harness.feed(harness.ids(" fox"), "r_0", finish_reason="length")
    output = output_of(state, FINAL_ONLY)
    assert [(completion.index, completion.text) for completion in output.outputs] == [(0, " fox"), (1, " quick")]


def test_a_stop_string_ends_each_sibling_where_it_comes(harness: Harness) -> None:
    """It ends that one alone; the others go on to their own."""
    state = harness.add(n=3, seed=9, stop=[" brown"])
    assert harness.feed(harness.ids(" quick brown fox"), "r_1").stopped_ids == ["r_1"]
    assert harness.feed(harness.ids(" lazy"), "r_0").stopped_ids == []
    assert harness.feed(harness.ids(" dog brown"), "r_2").stopped_ids == ["r_2"]
    assert not state.finished
    assert harness.feed(harness.ids(" brown"), "r_0").stopped_ids == ["r_0"]
    found = [(c.text, c.finish_reason, c.stop_reason) for c in output_of(state, FINAL_ONLY).outputs]
    assert found == [(text, "stop", " brown") for text in (" lazy", " quick", " dog")]
    assert harness.processor.num_unfinished == 0


def test_error(harness: Harness) -> None:
    state = harness.add()
    error = ErrorInfo(type="RequestError", message="too long")
    harness.feed([], finish_reason="error", error=error)
    completion = output_of(state).outputs[0]
    assert (completion.finish_reason, completion.error) == ("error", "RequestError: too long")
    assert state.error == error


def test_id_in_use(harness: Harness) -> None:
    harness.add(n=2)
    for request_id in ("r", "r_1"):
        with pytest.raises(RequestError, match=f"request_id '{request_id}' is in use by an unfinished request"):
            harness.add(request_id=request_id)
    harness.feed([3], "r_0", finish_reason="length")
    harness.feed([3], "r_1", finish_reason="length")
    harness.add(request_id="r")


def test_forget(harness: Harness) -> None:
    harness.add(n=2)
    harness.feed([3], "r_0", finish_reason="length")
    assert harness.processor.forget(["r", "unknown"]) == ["r_1"]
    assert harness.processor.num_unfinished == 0
    # The coordinator's late news of a forgotten sequence are dropped.
    assert harness.feed([4], "r_1") == Processed()


def test_end_aborted(harness: Harness) -> None:
    state = harness.add(n=2)
    harness.feed(harness.ids(" fox"), "r_0", finish_reason="length")
    harness.feed(harness.ids(" quick"), "r_1")
    ended, sequence_ids = harness.processor.end_aborted("r")
    assert ended is state
    assert sequence_ids == ["r_1"]
    output = output_of(state, FINAL_ONLY)
    assert [completion.finish_reason for completion in output.outputs] == ["length", "abort"]
    assert output.outputs[1].text == " quick"
    assert harness.processor.end_aborted("r") == (None, [])


def test_nothing_is_kept_of_finished_requests(harness: Harness) -> None:
    for i in range(100):
        harness.add(request_id=f"{i}", n=2)
        harness.feed([3, 4], f"{i}_0", finish_reason="length")
        harness.feed([3, 4], f"{i}_1", finish_reason="stop")
    assert harness.processor.num_unfinished == 0
    held = [value for value in vars(harness.processor).values() if isinstance(value, dict)]
    assert held == [{}, {}]


def test_a_request_that_crashed_its_worker_is_told_apart(harness: Harness) -> None:
    facts: dict[str, str | int | None] = {"num_crashes": 3, "request_id": "r"}
    for kind in (RequestCrashed, RequestError):
        state = harness.add(request_id=kind.__name__)
        harness.feed(
            [], kind.__name__, finish_reason="error", error=ErrorInfo(type=kind.__name__, message="m", facts=facts)
        )
        with pytest.raises(RequestError, match=f"request {kind.__name__} failed: {kind.__name__}: m") as error:
            raise_failure(state)
        assert type(error.value) is kind


def test_texts_alone_are_those_of_the_outputs(harness: Harness) -> None:
    states = [harness.add(request_id=name, output_kind=DELTA, n=2, seed=3) for name in "ab"]
    told: tuple[list[Any], list[Any]] = ([], [])
    parts = [harness.ids(text) for text in (" quick", " brown fox", " é", " jumps")]
    for number, part in enumerate(parts):
        for name in ("a_0", "b_0", *(("a_1", "b_1") if number % 2 else ())):
            harness.feed(part, name)
        texts = states[0].take_texts()
        assert texts is not None
        told[0].append([(new.index, new.seed, new.text, new.num_tokens) for new in texts])
        told[1].append([(c.index, c.seed, c.text, len(c.token_ids)) for c in output_of(states[1]).outputs])
    assert told[0] == told[1]
    assert [len(news) for news in told[0]] == [1, 2, 1, 2]
    assert states[0].take_texts() == []


def test_texts_alone_are_not_all_of_other_outputs(harness: Harness) -> None:
    for name, params in {"whole": {}, "rows": {"output_kind": DELTA, "logprobs": 0}}.items():
        state = harness.add(request_id=name, **params)
        harness.feed([7], name, logprobs=rows([(7, -0.5)], ranks=[1]))
        assert state.take_texts() is None
        assert output_of(state).outputs[0].token_ids == [7]
    ended = harness.add(request_id="ended", output_kind=DELTA)
    harness.feed([7], "ended", finish_reason="length")
    assert ended.take_texts() is None, "it has a finish reason to tell"
    assert output_of(ended).outputs[0].finish_reason == "length"
