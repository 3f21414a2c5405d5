"""The synchronous interface on the embedded model, in real processes."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from sempre.engine import (
    LLM,
    ConfigError,
    Counter,
    EngineDeadError,
    Gauge,
    Histogram,
    Logprob,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    WorkerDied,
)

PROMPTS = ["It is a truth", "The whale", "She was"]
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "num_threads": 1}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", seed=3, **SETTINGS) as engine:
        yield engine


def short(**keywords: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "seed": 5, "ignore_eos": True, **keywords})


def only(outputs: list[RequestOutput]) -> RequestOutput:
    (output,) = outputs
    return output


def rank_of(entry: Logprob) -> int:
    assert entry.rank is not None
    return entry.rank


def metric_values(llm: LLM, name: str) -> list[float]:
    return [
        metric.value
        for metric in llm.get_metrics()
        if metric.name == f"sempre:{name}" and isinstance(metric, Counter | Gauge)
    ]


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    # The first one finishes last.
    params = [short(max_tokens=20), short(max_tokens=1), short(max_tokens=4)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == [20, 1, 4]
    for output in outputs:
        completion = output.outputs[0]
        assert output.finished
        assert output.fingerprint == llm.fingerprint
        assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt or "")
        assert (completion.seed, completion.finish_reason) == (5, "length")
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids, skip_special_tokens=True)


def test_every_prompt_form_gives_the_same(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    forms: list[Any] = [PROMPTS[0], {"prompt": PROMPTS[0]}, {"prompt": PROMPTS[0], "cache_salt": "s"}]
    forms += [{"prompt_token_ids": ids}, ids]
    alone = [only(llm.generate(form, short(), use_tqdm=False)).outputs[0].token_ids for form in forms]
    together = [output.outputs[0].token_ids for output in llm.generate(forms, short(), use_tqdm=False)]
    assert alone == together == [alone[0]] * len(forms)


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_default_parameters(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    output = only(llm.generate(PROMPTS[0], use_tqdm=False))
    assert len(output.outputs[0].token_ids) <= 16


def test_an_unseeded_sample_can_be_replayed(llm: LLM) -> None:
    first, second = llm.generate([PROMPTS[0]] * 2, short(seed=None, max_tokens=12), use_tqdm=False)
    assert first.outputs[0].seed != second.outputs[0].seed
    for output in (first, second):
        again = only(llm.generate(PROMPTS[0], short(seed=output.outputs[0].seed, max_tokens=12), use_tqdm=False))
        assert again.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_sibling_equals_a_lone_request(llm: LLM) -> None:
    output = only(llm.generate(PROMPTS[0], short(n=3, logprobs=2), use_tqdm=False))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    for completion in output.outputs:
        lone = only(llm.generate(PROMPTS[0], short(seed=5 + completion.index, logprobs=2), use_tqdm=False)).outputs[0]
        assert replace(completion, index=0) == lone
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3


def test_log_probabilities(llm: LLM) -> None:
    completion = only(llm.generate(PROMPTS[0], short(logprobs=3), use_tqdm=False)).outputs[0]
    assert completion.logprobs is not None
    total = 0.0
    for token_id, row in zip(completion.token_ids, completion.logprobs, strict=True):
        assert next(iter(row)) == token_id
        assert row[token_id].decoded_token == llm.get_tokenizer().token_text(token_id)
        best = sorted((entry for entry in row.values() if entry.rank is not None and entry.rank <= 3), key=rank_of)
        assert [entry.rank for entry in best] == [1, 2, 3]
        assert [entry.logprob for entry in best] == sorted((entry.logprob for entry in best), reverse=True)
        assert len(row) == 3 + (row[token_id].rank not in (1, 2, 3))
        total += row[token_id].logprob
    assert completion.cumulative_logprob == total


def test_score_equals_the_log_probabilities_of_generation(llm: LLM) -> None:
    output = only(llm.generate(PROMPTS[0], short(logprobs=0), use_tqdm=False))
    completion = output.outputs[0]
    assert completion.logprobs is not None
    (scored,) = llm.score([output.prompt_token_ids + completion.token_ids])
    generated = [row[token_id].logprob for token_id, row in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert scored.logprobs[0] is None
    assert scored.logprobs[len(output.prompt_token_ids) :] == generated
    assert scored.token_ids == output.prompt_token_ids + completion.token_ids
    assert scored.fingerprint == llm.fingerprint
    total = 0.0
    for logprob in scored.logprobs[1:]:
        assert logprob is not None
        total += logprob
    assert scored.total == total


def test_prompt_log_probabilities(llm: LLM) -> None:
    output = only(llm.generate(PROMPTS[0], short(prompt_logprobs=2), use_tqdm=False))
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    assert all(row is not None and next(iter(row)) == token_id for token_id, row in rows)


def test_stop_string(llm: LLM) -> None:
    text = only(llm.generate(PROMPTS[0], short(max_tokens=30), use_tqdm=False)).outputs[0].text
    stop = text[len(text) // 2 :][:4]
    stopped, aborted = num_ended(llm, "stop"), num_aborted(llm)
    completion = only(llm.generate(PROMPTS[0], short(max_tokens=None, stop=stop), use_tqdm=False)).outputs[0]
    assert completion.text == text[: text.index(stop)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    # The coordinator was told: nothing runs on until it ends by itself.
    assert wait_for_idle(llm)
    assert (num_ended(llm, "stop"), num_aborted(llm)) == (stopped + 1, aborted)


def num_ended(llm: LLM, reason: str) -> int:
    (count,) = (metric.value for metric in llm.get_metrics() if metric.labels.get("finished_reason") == reason)  # type: ignore[attr-defined]
    return int(count)


def num_aborted(llm: LLM) -> int:
    return num_ended(llm, "abort")


def wait_for_idle(llm: LLM) -> bool:
    for _ in range(200):
        if metric_values(llm, "num_requests_running") == [0.0] and metric_values(llm, "num_requests_waiting") == [0.0]:
            return True
        time.sleep(0.01)
    return False


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "Hello"}]
    output = only(llm.chat(conversation, short(), use_tqdm=False))
    assert output.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids == llm.get_tokenizer().encode(output.prompt, add_special_tokens=False)
    several = llm.chat([conversation, conversation], short(), use_tqdm=False)
    assert [other.outputs for other in several] == [output.outputs] * 2
    assert llm.render_chat(conversation) == {"prompt": output.prompt, "prompt_token_ids": output.prompt_token_ids}


def test_chat_with_another_template(llm: LLM, tmp_path: Any) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!")
    conversation = [{"role": "user", "content": "Hello"}]
    for template in (str(path), "{{ messages[0].content }}!"):
        assert only(llm.chat(conversation, short(), use_tqdm=False, chat_template=template)).prompt == "Hello!"
    with pytest.raises(ConfigError, match=r"chat_template 'nowhere.jinja' is neither a file nor a Jinja template"):
        llm.chat(conversation, short(), chat_template="nowhere.jinja")


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_stream(llm: LLM, kind: RequestOutputKind) -> None:
    whole = only(llm.generate(PROMPTS[0], short(logprobs=1), use_tqdm=False)).outputs[0]
    outputs = list(llm.stream(PROMPTS[0], short(logprobs=1, output_kind=kind)))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    if kind is RequestOutputKind.DELTA:
        assert "".join(output.outputs[0].text for output in outputs) == whole.text
        assert [row for output in outputs for row in output.outputs[0].logprobs or []] == whole.logprobs
    else:
        assert outputs[-1].outputs[0] == whole
    if kind is RequestOutputKind.FINAL_ONLY:
        assert len(outputs) == 1


def test_a_stream_goes_on_after_another_call(llm: LLM) -> None:
    params = short(max_tokens=24, output_kind=RequestOutputKind.DELTA)
    stream = llm.stream(PROMPTS[0], params)
    text = next(stream).outputs[0].text
    other = only(llm.generate(PROMPTS[1], short(), use_tqdm=False))
    text += "".join(output.outputs[0].text for output in stream)
    assert text == only(llm.generate(PROMPTS[0], short(max_tokens=24), use_tqdm=False)).outputs[0].text
    assert other.outputs == only(llm.generate(PROMPTS[1], short(), use_tqdm=False)).outputs


def test_closing_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream(PROMPTS[0], short(max_tokens=None))
    next(stream)
    before = num_aborted(llm)
    assert llm.reset_prefix_cache() is False
    stream.close()  # type: ignore[attr-defined]
    assert wait_for_idle(llm)
    assert num_aborted(llm) == before + 1
    assert llm.reset_prefix_cache() is True


class RecordingBar:
    """A progress bar that notes how it was used; `fail_at` raises as Ctrl-C would."""

    def __init__(self, fail_at: int | None = None, **keywords: Any) -> None:
        self.keywords = keywords
        self.postfix = keywords["postfix"]
        self.format_dict = {"elapsed": 2.0}
        self.num_done = 0
        self.drawn: list[str] = []
        self.closed = False
        self._fail_at = fail_at

    def update(self, count: int) -> None:
        self.num_done += count
        if self._fail_at is not None and self.num_done >= self._fail_at:
            raise KeyboardInterrupt

    def refresh(self) -> None:
        self.drawn.append(self.postfix)

    def close(self) -> None:
        self.closed = True


def test_progress_bar(llm: LLM) -> None:
    bars: list[RecordingBar] = []

    def make(**keywords: Any) -> RecordingBar:
        bars.append(RecordingBar(**keywords))
        return bars[-1]

    outputs = llm.generate(PROMPTS, short(n=2), use_tqdm=make)
    (bar,) = bars
    assert (bar.keywords["total"], bar.keywords["desc"], bar.num_done, bar.closed) == (6, "Processed prompts", 6, True)
    assert bar.keywords["postfix"] == "0 tokens, est. speed input: 0.00 toks/s, output: 0.00 toks/s"
    num_input = sum(2 * len(output.prompt_token_ids) for output in outputs)
    speeds = f"est. speed input: {num_input / 2:.2f} toks/s, output: {6 * 8 / 2:.2f} toks/s"
    assert bar.postfix == f"{6 * 8} tokens, {speeds}"


def test_a_bar_counts_tokens_while_a_request_goes_on(llm: LLM) -> None:
    bars: list[RecordingBar] = []

    def make(**keywords: Any) -> RecordingBar:
        bars.append(RecordingBar(**keywords))
        return bars[-1]

    llm.generate(PROMPTS[0], short(max_tokens=400, ignore_eos=True), use_tqdm=make)
    counted = [int(text.split()[0]) for text in bars[0].drawn]
    assert len(counted) >= 2, "drawn before the end"
    assert counted == sorted(set(counted))
    assert 0 < counted[0] < counted[-1] < 400


def test_tqdm_is_the_default_bar(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(PROMPTS, short())
    written = capsys.readouterr()
    assert "Processed prompts: 100%" in written.err
    assert "est. speed input: " in written.err
    assert written.out == ""


def test_an_interrupt_aborts_what_runs(llm: LLM) -> None:
    expected = llm.generate(PROMPTS, short(), use_tqdm=False)
    before = num_aborted(llm)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(
            PROMPTS * 8,
            [short(max_tokens=2), *[short(max_tokens=None)] * 23],
            use_tqdm=lambda **keywords: RecordingBar(fail_at=1, **keywords),
        )
    assert wait_for_idle(llm)
    assert num_aborted(llm) == before + 23
    again = llm.generate(PROMPTS, short(), use_tqdm=False)
    assert [output.outputs for output in again] == [output.outputs for output in expected]


def test_one_refused_prompt_stops_all_before_they_start(llm: LLM) -> None:
    before = metric_values(llm, "prompt_tokens")
    with pytest.raises(RequestError, match=r"^prompts\[1\]: Token id 99999 is out of vocabulary"):
        llm.generate([PROMPTS[0], [99999]], short())
    with pytest.raises(RequestError, match="The lengths of prompts and sampling_params must be the same, got 2 and 1"):
        llm.generate(PROMPTS[:2], [short()])
    with pytest.raises(RequestError, match="is longer than the maximum model length of 256"):
        llm.generate([[5] * 256], short())
    assert metric_values(llm, "prompt_tokens") == before


def test_collective_rpc(llm: LLM) -> None:
    (result,) = llm.collective_rpc("rng_digests")
    assert isinstance(result, dict)
    assert set(result) >= {"python_random", "numpy_random", "torch_cpu"}
    with pytest.raises(ConfigError, match="method"):
        llm.collective_rpc("no_such_method")
    with pytest.raises(RequestError, match="method must be the name of a worker method, got function"):
        llm.collective_rpc(lambda worker: None)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError, match=r"no answer to CallWorkers within 0.0 s"):
        llm.collective_rpc("rng_digests", timeout=0.0)
    # The late reply of the call that was given up is not taken for this one's.
    assert llm.collective_rpc("rng_digests") == [result]


def test_metrics(llm: LLM) -> None:
    before = metric_values(llm, "generation_tokens")[0]
    llm.generate(PROMPTS, short(), use_tqdm=False)
    assert metric_values(llm, "generation_tokens")[0] - before == 24
    assert {metric.labels["model_name"] for metric in llm.get_metrics()} == {"tiny"}


def test_sizes_of_requests_are_counted(llm: LLM) -> None:
    """As vLLM's offline engine does; an output counts when it ends."""

    def counted() -> dict[str, Histogram]:
        return {metric.name: metric for metric in llm.get_metrics() if isinstance(metric, Histogram)}

    before = counted()
    llm.generate([[5, 6, 7], [8] * 11], short(max_tokens=4, n=2, ignore_eos=True), use_tqdm=False)
    after = counted()
    grown = {
        name: (after[name].count - before[name].count, after[name].sum - before[name].sum)
        for name in after
        if name.startswith("sempre:request_p") or name == "sempre:request_generation_tokens"
    }
    assert grown == {
        "sempre:request_prompt_tokens": (2, 14),
        "sempre:request_generation_tokens": (4, 16),
        "sempre:request_params_n": (2, 4),
        "sempre:request_params_max_tokens": (2, 8),
    }
    name = "sempre:request_prompt_tokens"
    per_bound = {bound: after[name].buckets[bound] - before[name].buckets[bound] for bound in after[name].buckets}
    assert [per_bound[bound] for bound in ("2.0", "5.0", "10.0", "20.0", "+Inf")] == [0, 1, 1, 2, 2]


def test_fingerprint(llm: LLM) -> None:
    assert len(llm.fingerprint) == 16
    assert set(llm.fingerprint_parts) >= {"weights", "dtype", "numerics", "architecture", "torch"}
    assert set(llm.fingerprint_environment) == {"engine", "threads", "python"}


def test_request_metrics_are_in_order(llm: LLM) -> None:
    metrics = only(llm.generate(PROMPTS[0], short(), use_tqdm=False)).metrics
    assert metrics is not None
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time <= metrics.first_token_time <= metrics.finished_time


def generator_states() -> tuple[object, ...]:
    """The whole states: a draw of NumPy's moves its position, and its words only now and then."""
    name, words, *rest = np.random.get_state(legacy=True)
    return random.getstate(), name, words.tobytes(), *rest, torch.get_rng_state().numpy().tobytes()


def num_children() -> int:
    return len(psutil.Process().children(recursive=True))


def test_shutdown_and_the_user_s_generators() -> None:
    """They are left alone from the start to the end, which leaves no process."""
    before, states = num_children(), generator_states()
    llm = LLM("tiny", seed=11, **SETTINGS)
    assert num_children() > before
    assert generator_states() == states
    llm.generate(PROMPTS, short(seed=None, temperature=1.0, logprobs=1, n=2), use_tqdm=False)
    assert generator_states() == states
    llm.chat([{"role": "user", "content": "Hello"}], short(), use_tqdm=False)
    llm.score(PROMPTS)
    dropped, stream = (llm.stream(PROMPTS[0], short(max_tokens=None)) for _ in range(2))
    next(dropped)
    next(stream)
    assert generator_states() == states
    llm.shutdown()
    llm.shutdown()
    dropped.close()  # type: ignore[attr-defined]
    assert num_children() == before
    assert generator_states() == states
    for use in (lambda: llm.generate("a"), llm.get_metrics, llm.reset_prefix_cache, lambda: llm.score("a")):
        with pytest.raises(EngineDeadError, match="this LLM was shut down; make a new one"):
            use()
    with pytest.raises(EngineDeadError):
        next(stream)


def test_the_check_of_the_generators_notices_a_single_draw() -> None:
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    states = [generator_states()]
    for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
        draw()
        states.append(generator_states())
    random.setstate(kept[0])
    np.random.set_state(kept[1])
    torch.set_rng_state(kept[2])
    assert all(one != other for one, other in pairwise(states))
    assert generator_states() == states[0]


def test_losing_the_object_ends_the_processes() -> None:
    before = num_children()
    llm = LLM("tiny", **SETTINGS)
    assert num_children() > before
    del llm
    gc.collect()
    assert num_children() == before


def test_priority_has_no_effect_first_come_first_served(llm: LLM) -> None:
    params = short(seed=5)
    plain = llm.generate(["a", "b"], params)
    ranked = llm.generate(["a", "b"], params, priority=[1, 0])
    assert [o.outputs[0].token_ids for o in ranked] == [o.outputs[0].token_ids for o in plain]


def test_death_of_the_worker_without_restarts() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    with LLM("tiny", max_restarts=0, **SETTINGS) as llm:
        new = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
        (worker,) = [process for process in new if "sempre.workers" in process.cmdline()]
        stream = llm.stream(PROMPTS[0], short(max_tokens=None))
        next(stream)
        worker.kill()
        for use in (lambda: list(stream), lambda: llm.generate(PROMPTS, use_tqdm=False), llm.get_metrics):
            with pytest.raises(WorkerDied) as caught:
                use()
            assert (caught.value.rank, caught.value.exitcode) == (0, -9)
        assert llm._frontend.processor.num_unfinished == 0


def test_a_second_thread_is_refused_and_the_first_goes_on(llm: LLM) -> None:
    refusals: list[BaseException] = []

    def try_all() -> None:
        for use in (lambda: llm.generate("a"), lambda: llm.stream("a"), llm.get_metrics, llm.reset_prefix_cache):
            try:
                use()
            except RuntimeError as error:
                refusals.append(error)

    stream = llm.stream(PROMPTS[0], short())
    first = next(stream)
    with llm._session.exclusive():
        thread = threading.Thread(target=try_all)
        thread.start()
        thread.join()
        last = [first, *stream][-1]
    assert [str(error).partition(",")[0] for error in refusals] == ["another thread is using this LLM"] * 4
    assert last.outputs[0].token_ids == only(llm.generate(PROMPTS[0], short(), use_tqdm=False)).outputs[0].token_ids


def test_a_chat_template_that_is_not_there_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="chat_template '/nowhere' is neither a file nor a Jinja template"):
        LLM("tiny", chat_template="/nowhere")


def nested(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800", nested(500)])
def test_arguments_of_a_worker_call_that_cannot_cross_a_process(llm: LLM, value: object) -> None:
    with pytest.raises(RequestError, match="args and kwargs of ping must be numbers, strings") as refusal:
        llm.collective_rpc("ping", args=[value])
    assert refusal.value.parameter == "args"
    assert llm.collective_rpc("ping") == ["pong"]
