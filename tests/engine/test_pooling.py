"""`LLM` and `AsyncLLM` for models that pool: settings, parameters, outputs, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pooling_checkpoints import classifier, embedder, reranker

from sempre.engine import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    ConfigError,
    ModelError,
    PoolingParams,
    RequestError,
    SamplingParams,
)
from sempre.engine.cli.main import main
from sempre.engine.frontend.pooling import SIMILARITIES, cosine

SETTINGS: dict[str, Any] = {"multiprocessing": False, "num_threads": 1, "max_model_len": 128}
TEXTS = ["It is a truth", "universally acknowledged", "It is a truth"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pooling")
    return {
        "embed": embedder(root / "embed", "MEAN", matryoshka_dimensions=[16, 64]),
        "classify": classifier(root / "classify"),
        "rank": reranker(root / "rank"),
    }


@pytest.fixture(scope="module")
def embeds(folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(folders["embed"], **SETTINGS) as llm:
        yield llm


def test_the_asynchronous_interface_gives_the_same(folders: dict[str, Path], embeds: LLM) -> None:
    async def everything() -> tuple[Any, ...]:
        async with AsyncLLM(folders["embed"], **SETTINGS) as engine:
            vectors = [output.outputs.embedding for output in await engine.embed(TEXTS)]
            [pooled] = [output.outputs.data async for output in engine.encode(TEXTS[0], request_id="mine")]
            cosines = [output.outputs.score for output in await engine.score(TEXTS[0], TEXTS)]
        async with AsyncLLM(folders["classify"], **SETTINGS) as engine:
            classes = [output.outputs for output in await engine.classify(TEXTS)]
        async with AsyncLLM(folders["rank"], **SETTINGS) as engine:
            scores = [output.outputs.score for output in await engine.score(TEXTS[0], TEXTS)]
        return vectors, pooled, cosines, classes, scores

    vectors, pooled, cosines, classes, scores = asyncio.run(everything())
    assert vectors == [output.outputs.embedding for output in embeds.embed(TEXTS, use_tqdm=False)]
    assert pooled == vectors[0] == vectors[2]
    assert cosines == [output.outputs.score for output in embeds.score(TEXTS[0], TEXTS)]
    assert cosines[0] == pytest.approx(1.0)
    with LLM(folders["classify"], **SETTINGS) as llm:
        assert classes == [output.outputs for output in llm.classify(TEXTS, use_tqdm=False)]
        assert all(math.fsum(each.probs) == pytest.approx(1.0) and each.num_classes == 3 for each in classes)
    with LLM(folders["rank"], **SETTINGS) as llm:
        assert scores == [output.outputs.score for output in llm.score(TEXTS[0], TEXTS)]
        prompts = [output.prompt_token_ids for output in llm.score(TEXTS[:2], TEXTS[1:])]
        encode = llm.get_tokenizer().encode
        assert prompts == [encode(a) + encode(b) for a, b in pairwise(TEXTS)]


def test_outputs(embeds: LLM) -> None:
    [output] = embeds.embed(TEXTS[0], use_tqdm=False)
    assert output.outputs.hidden_size == len(output.outputs.embedding) == 384
    assert output.to_dict()["outputs"] == {"embedding": output.outputs.embedding}
    assert output.prompt_token_ids == embeds.get_tokenizer().encode(TEXTS[0])
    assert (output.fingerprint, output.finished) == (embeds.fingerprint, True)
    [long] = embeds.embed([[5] * 200], pooling_params=PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)
    assert len(long.prompt_token_ids) == 128


def test_dimensions_are_those_that_the_model_states(embeds: LLM) -> None:
    [cut] = embeds.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=16), use_tqdm=False)
    assert math.sqrt(math.fsum(x * x for x in cut.outputs.embedding)) == pytest.approx(1.0)
    with pytest.raises(RequestError, match="dimensions must be one of 16, 64 for this model, got 32") as caught:
        embeds.embed(TEXTS[0], pooling_params=PoolingParams(dimensions=32), use_tqdm=False)
    assert caught.value.parameter == "dimensions"


def test_what_a_model_cannot_do(embeds: LLM, folders: dict[str, Path]) -> None:
    for call in (
        lambda: embeds.generate(TEXTS),
        lambda: embeds.chat([{"role": "user", "content": "a"}], chat_template="{{ messages[0].content }}"),
        lambda: next(embeds.stream("a")),
        lambda: embeds.score("a"),
        lambda: embeds.beam_search("a", BeamSearchParams(beam_width=2, max_tokens=2)),
        lambda: embeds.enqueue("a", SamplingParams()),
    ):
        with pytest.raises(RequestError, match="This model embeds and does not generate text"):
            call()
    with pytest.raises(RequestError, match="This model embeds; it cannot classify"):
        embeds.classify("a")
    with pytest.raises(RequestError, match="This model embeds; it cannot classify"):
        embeds.encode("a", pooling_task="classify")
    with LLM("tiny", **SETTINGS) as llm:
        for method in (llm.embed, llm.classify, llm.encode):
            with pytest.raises(RequestError, match="This model generates text"):
                method("a")
        with pytest.raises(RequestError, match="This model generates text"):
            llm.score("a", ["b"])
    # without the parameters' own limits
    with LLM(folders["classify"], **SETTINGS) as llm, pytest.raises(RequestError, match="dimensions is for embeddings"):
        llm.classify("a", pooling_params=PoolingParams(dimensions=2))


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "many"}, "dimensions"),
        ({"use_activation": 1}, "use_activation"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"task": "token_embed"}, "task"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        PoolingParams(**parameters)
    assert caught.value.parameter == name


def test_settings() -> None:
    """A model whose files say nothing pools as the settings say, or not at all."""
    with LLM("tiny", runner="pooling", pooler_config={"pooling_type": "MEAN"}, **SETTINGS) as llm:
        mean = llm.embed(TEXTS[0], use_tqdm=False)[0].outputs.embedding
    with LLM("tiny", convert="embed", pooler_config={"pooling_type": "LAST"}, **SETTINGS) as llm:
        assert llm.embed(TEXTS[0], use_tqdm=False)[0].outputs.embedding != mean
    with pytest.raises(ModelError, match="does not state how it pools"):
        LLM("tiny", runner="pooling", **SETTINGS)
    with pytest.raises(ConfigError, match="pooler_config"):
        LLM("tiny", runner="pooling", pooler_config={"pooling_typ": "MEAN"}, **SETTINGS)
    with pytest.raises(ConfigError, match="nothing is drafted for a model that pools"):
        LLM("tiny", convert="embed", pooler_config={"pooling_type": "LAST"}, spec_method="ngram", **SETTINGS)


def test_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--runner", "pooling", "--convert", "embed", "--pooler-config", '{"pooling_type": "MEAN"}']
    assert main(["serve", "tiny", *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "runner: pooling" in printed
    assert "pooling_type: MEAN" in printed


PROMPTS = {"query": "A question: ", "document": None, "long": "Find " * 20}


def stored(folder: Path, default: str | None, similarity: str | None = None) -> Path:
    """An embedder with stored prompts."""
    embedder(folder, "MEAN", normalizes=False)
    config = {"prompts": PROMPTS, "default_prompt_name": default, "similarity_fn_name": similarity}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 96, "do_lower_case": False}))
    return folder


def embedded(llm: LLM, texts: Sequence[Any], name: str | None = None) -> list[list[float]]:
    outputs = llm.embed(texts, pooling_params=PoolingParams(prompt_name=name))
    return [output.outputs.embedding for output in outputs]


def test_stored_prompts_come_before_texts(tmp_path: Path) -> None:
    settings = {name: value for name, value in SETTINGS.items() if name != "max_model_len"}
    with LLM(stored(tmp_path / "plain", None), **settings) as llm:
        written = ["A question: " + text for text in TEXTS]
        plain, asked = embedded(llm, TEXTS), embedded(llm, written)
        assert plain != asked
        assert embedded(llm, TEXTS, "query") == asked
        assert embedded(llm, TEXTS, "document") == embedded(llm, TEXTS, "") == plain
        assert llm.embed(TEXTS[0], pooling_params=PoolingParams(prompt_name="query"))[0].prompt_token_ids == (
            llm.get_tokenizer().encode(written[0])
        )
        ids = llm.get_tokenizer().encode(TEXTS[0])
        assert embedded(llm, [ids]) == plain[:1]
        with pytest.raises(RequestError, match="prompt_name is for texts"):
            embedded(llm, [ids], "query")
        with pytest.raises(RequestError, match=r"prompt_name: expected one of the model's \('query', .*, found 'x'"):
            embedded(llm, TEXTS, "x")
        # the length that it was trained for
        with pytest.raises(RequestError, match="96"):
            embedded(llm, ["word " * 200])
        cosines = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS)]
        assert cosines == [cosine(plain[0], vector) for vector in plain]
    with LLM(stored(tmp_path / "default", "query", "dot"), **settings) as llm:
        assert embedded(llm, TEXTS) == embedded(llm, TEXTS, "query") == asked
        assert embedded(llm, TEXTS, "") == plain
        assert embedded(llm, [ids]) == plain[:1]
        dots = [output.outputs.score for output in llm.score(TEXTS[0], TEXTS)]
        assert dots == [math.fsum(x * y for x, y in zip(asked[0], vector, strict=True)) for vector in asked]
    with pytest.raises(ConfigError, match="prompt_name must be the name of a stored prompt, got 1"):
        PoolingParams(prompt_name=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIMILARITIES)
def test_similarities_are_those_of_their_definitions(name: Any) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((2, 64))
    expected = {
        "cosine": a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        "dot": a @ b,
        "euclidean": -np.linalg.norm(a - b),
        "manhattan": -np.abs(a - b).sum(),
    }
    assert SIMILARITIES[name](a.tolist(), b.tolist()) == pytest.approx(expected[name], rel=1e-12)


def test_cosine() -> None:
    assert cosine([1.0, 0.0], [0.0, 2.0]) == 0.0
    assert cosine([0.0, 0.0], [0.0, 2.0]) == 0.0
    assert cosine([3.0, 4.0], [6.0, 8.0]) == pytest.approx(1.0)
