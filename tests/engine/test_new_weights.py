"""Weights of a running engine are replaced: by all workers or none, with the bits of an engine that loaded them."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from sempre.engine import LLM, AsyncLLM, RequestError, RequestOutput, RequestOutputKind, SamplingParams
from sempre.engine.frontend.new_weights import weights_of_tensors
from sempre.engine.proof.dsse import payload_of
from sempre.engine.proof.statement import decode
from sempre.ipc.errors import TensorMismatch
from sempre.workers.trainer import Trainer

SETTINGS: dict[str, Any] = {"max_model_len": 256, "num_threads": 1, "heartbeat_interval_s": 0.1}
PROMPTS = [
    "It is a truth universally acknowledged, that a man in possession of a fortune, " * 2,
    "The whale",
    "And God said",
]
PARAMS = SamplingParams(max_tokens=24, logprobs=2, prompt_logprobs=0, seed=5, ignore_eos=True)
FOLDER = Path(__file__).parents[2] / "engine" / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Those of the embedded model, changed a little."""
    random = torch.Generator().manual_seed(11)
    found = load_file(FOLDER / "model.safetensors")
    return {name: value + 0.01 * torch.randn(value.shape, generator=random).to(value.dtype)
            for name, value in found.items()}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tensors: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of them."""
    made = shutil.copytree(FOLDER, tmp_path_factory.mktemp("new") / "model")
    save_file(tensors, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", **SETTINGS, multiprocessing=False) as engine:
        yield engine


@pytest.fixture(autouse=True)
def old_weights(request: pytest.FixtureRequest) -> Iterator[None]:
    """The shared engine begins each test with its own weights."""
    yield
    if "llm" in request.fixturenames:
        engine: LLM = request.getfixturevalue("llm")
        engine.load_weights(FOLDER)


@pytest.fixture(scope="module")
def fresh(folder: Path) -> tuple[str, list[Any]]:
    """Fingerprint and bits of an engine that has loaded the new weights."""
    with LLM(folder, **SETTINGS, multiprocessing=False) as engine:
        return engine.fingerprint, run(engine)


def bits(outputs: list[RequestOutput]) -> list[Any]:
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs, output.prompt_logprobs) for output in outputs]


def run(engine: LLM) -> list[Any]:
    return bits(engine.generate(PROMPTS, PARAMS, use_tqdm=False))


@pytest.mark.parametrize(
    "settings",
    [
        {"multiprocessing": False},
        {"data_parallel_size": 2},
        {"speculative_config": {"method": "draft_model", "model": "tiny-draft", "placement": "worker"}},
        {"speculative_config": {"method": "draft_model", "model": "tiny-draft"}, "multiprocessing": False},
        {"speculative_config": {"method": "suffix"}, "multiprocessing": False},
        {"enable_lora": True, "multiprocessing": False},
    ],
)
def test_bits_are_those_of_an_engine_that_loaded_them(
    settings: dict[str, Any], folder: Path, tensors: dict[str, torch.Tensor], fresh: tuple[str, list[Any]]
) -> None:
    with LLM("tiny", **SETTINGS, **settings) as engine:
        before, own = run(engine), engine.fingerprint
        engine.load_weights(folder)
        assert (engine.fingerprint, run(engine)) == fresh
        engine.load_weights(FOLDER)
        assert (engine.fingerprint, run(engine)) == (own, before)
        engine.update_weights(tensors)
        assert (engine.fingerprint, run(engine)) == fresh
    assert before != fresh[1]


def test_ranks_that_share_a_model(folder: Path) -> None:
    with LLM(folder, **SETTINGS, multiprocessing=False, numerics_profile="tree8") as engine:
        expected = run(engine)
    with LLM("tiny", **SETTINGS, tensor_parallel_size=2) as engine:
        engine.load_weights(folder)
        assert run(engine) == expected


def test_a_set_that_does_not_fit_leaves_the_old_weights(llm: LLM, tensors: dict[str, torch.Tensor]) -> None:
    before, fingerprint = run(llm), llm.fingerprint
    name = "model.layers.3.mlp.up_proj.weight"
    missing = {key: value for key, value in tensors.items() if key != name}
    faulty: list[tuple[Any, type[Exception], str]] = [
        (missing, TensorMismatch, f"tensor '{name}': expected a tensor of shape .*found nothing"),
        ({**tensors, "more": tensors[name]}, TensorMismatch, "tensor 'more': expected no such tensor"),
        ({**tensors, name: tensors[name].T}, TensorMismatch, f"tensor '{name}': expected shape"),
        ({**tensors, name: tensors[name].to(torch.float64)}, TensorMismatch, f"tensor '{name}': expected dtype"),
        ([*tensors.items(), (name, tensors[name])], RequestError, f"named_tensors has '{name}' twice"),
        ([(name, [1.0])], RequestError, "named_tensors must be pairs of a name and a torch.Tensor"),
        ({}, RequestError, "must be all of the model's tensors, got none"),
    ]
    for given, kind, text in faulty:
        with pytest.raises(kind, match=text):
            llm.update_weights(given)
        assert (llm.fingerprint, run(llm)) == (fingerprint, before)
    with pytest.raises(RequestError, match="path must be a folder with safetensors, found none at /nowhere"):
        llm.load_weights("/nowhere")
    with pytest.raises(RequestError, match="running must be 'finish' or 'restart', got 'now'"):
        llm.load_weights(FOLDER, running="now")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="method must be a public method of a worker"):
        llm.collective_rpc("_commit_weights")


def test_nothing_cached_remains(llm: LLM, folder: Path, fresh: tuple[str, list[Any]]) -> None:
    run(llm)
    cached = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    llm.load_weights(folder)
    after = llm.generate(PROMPTS[0], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    assert (cached.num_cached_tokens > 0, after.num_cached_tokens) == (True, 0)
    assert run(llm) == fresh[1]


def test_unfinished_requests_finish_or_begin_again(llm: LLM, folder: Path, fresh: tuple[str, list[Any]]) -> None:
    before, own = run(llm), llm.fingerprint
    llm.enqueue(PROMPTS, PARAMS)
    llm.load_weights(folder)
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert (bits(outputs), {output.fingerprint for output in outputs}) == (before, {own})
    llm.load_weights(FOLDER)
    llm.enqueue(PROMPTS, PARAMS)
    llm.load_weights(folder, running="restart")
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert ({output.fingerprint for output in outputs}, bits(outputs)) == ({fresh[0]}, fresh[1])


def test_requests_go_on_if_the_weights_to_restart_with_do_not_fit(llm: LLM, tensors: dict[str, torch.Tensor]) -> None:
    before, own = run(llm), llm.fingerprint
    llm.enqueue(PROMPTS, PARAMS)
    with pytest.raises(TensorMismatch):
        llm.update_weights({**tensors, "more": torch.zeros(1)}, running="restart")
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert (bits(outputs), {output.fingerprint for output in outputs}) == (before, {own})


def test_a_stream_of_deltas_is_not_taken_back(llm: LLM, folder: Path) -> None:
    delta = SamplingParams(max_tokens=8, output_kind=RequestOutputKind.DELTA, seed=1)
    whole = llm.generate(PROMPTS[0], SamplingParams(max_tokens=8, seed=1), use_tqdm=False)[0].outputs[0]
    stream = llm.stream(PROMPTS[0], delta)
    first = next(stream)
    with pytest.raises(RequestError, match="is a stream of deltas, which cannot be taken back"):
        llm.load_weights(folder, running="restart")
    rest = [token for output in stream for token in output.outputs[0].token_ids]
    assert [*first.outputs[0].token_ids, *rest] == list(whole.token_ids)


@pytest.mark.parametrize("victim", ["worker", "coordinator"])
def test_a_successor_has_the_new_weights(
    victim: str, tensors: dict[str, torch.Tensor], fresh: tuple[str, list[Any]]
) -> None:
    with LLM("tiny", **SETTINGS) as engine:
        engine.update_weights(tensors)
        pids = engine.llm_engine.parallel_config.worker_pids
        os.kill(pids[0] if victim == "worker" else psutil.Process(pids[0]).ppid(), signal.SIGKILL)
        assert (engine.fingerprint, run(engine)) == fresh


def test_receipts_name_the_new_weights(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with LLM("tiny", **SETTINGS, multiprocessing=False, record=str(tmp_path / "receipts")) as engine:
        receipts = [engine.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].outputs[0].receipt]
        engine.update_weights(tensors)
        receipts.append(engine.generate(PROMPTS[0], PARAMS, use_tqdm=False)[0].outputs[0].receipt)
    weights = [opened_weights(receipt) for receipt in receipts]
    assert weights[0] != weights[1]


def opened_weights(receipt: str | None) -> tuple[str, str]:
    """Digest of the weights' files, and of the weights in the fingerprint."""
    assert receipt is not None
    statement = decode(payload_of(json.loads(receipt)))
    definition = statement.predicate.build_definition
    [weights] = [found for found in definition.resolved_dependencies if found.name == "weights"]
    return weights.digest.sha256, definition.internal_parameters.bits_by_name["weights"]


def test_trainer_and_engine_report_the_same_after_a_step(llm: LLM) -> None:
    trainer = Trainer(llm.model_folder, max_model_len=256)
    optimizer = torch.optim.SGD(trainer.parameters(), lr=1e-3)
    # the log-probabilities of a prompt need all of its rows
    params = SamplingParams(max_tokens=24, logprobs=2, seed=5, ignore_eos=True)
    for _ in range(2):
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        again = llm.generate(PROMPTS, params, use_tqdm=False)
        assert again[0].num_cached_tokens > 0, "a prefix comes from the cache"
        assert [bits(again)[row][:2] for row in range(3)] == [bits(outputs)[row][:2] for row in range(3)]
        sequences = [[*output.prompt_token_ids, *output.outputs[0].token_ids] for output in again]
        lengths = [len(sequence) for sequence in sequences]
        found = trainer.packed(torch.tensor([token for each in sequences for token in each]), lengths)
        for output, own in zip(again, found.detach().split(lengths), strict=True):
            completion = output.outputs[0]
            assert completion.logprobs is not None
            reported = [
                row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids, strict=True)
            ]
            assert own[len(output.prompt_token_ids) :].tolist() == reported
        optimizer.zero_grad()
        found.sum().backward()
        optimizer.step()
        llm.update_weights(trainer.named_tensors())


@pytest.fixture(scope="module")
def loop() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


def test_requests_that_come_meanwhile_get_the_new_weights(
    loop: Any, folder: Path, llm: LLM, fresh: tuple[str, list[Any]]
) -> None:
    old, own = run(llm), llm.fingerprint

    async def together() -> None:
        async with AsyncLLM("tiny", **SETTINGS) as engine:
            first = engine.stream(PROMPTS, PARAMS)
            update = asyncio.create_task(engine.load_weights(folder))
            # until the update has been sent
            while not engine._replies:
                await asyncio.sleep(0)
            second = engine.stream(PROMPTS, PARAMS)
            await update
            finished, begun = await first.finished(), await second.finished()
            assert (bits(finished), {output.fingerprint for output in finished}) == (old, {own})
            assert ({output.fingerprint for output in begun}, bits(begun)) == ({fresh[0]}, fresh[1])
            third = engine.stream(PROMPTS, PARAMS)
            await engine.load_weights(FOLDER, running="restart")
            again = await third.finished()
            assert (bits(again), {output.fingerprint for output in again}) == (old, {own})

    loop(together())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (None, "must be pairs of a name and a torch.Tensor, got None"),
        ("abc", "must be pairs of a name and a torch.Tensor, got 'abc'"),
        ([("a", 1, 2)], "must be pairs of a name and a torch.Tensor"),
        (["ab"], "must be pairs of a name and a torch.Tensor, got 'ab'"),
        ({"a": torch.ones(2, 2, device="meta")}, "must have their values in memory, 'a' is on the meta device"),
        (
            {"a": torch.ones(2, 2).to_sparse()},
            "must have their values in memory, 'a' is of the layout",
        ),
    ],
)
def test_what_holds_no_values_is_refused_by_name(given: Any, text: str) -> None:
    with pytest.raises(RequestError, match=text):
        weights_of_tensors(given)
