"""Endpoints of models that pool, against real server processes: what clients of OpenAI, Jina and vLLM see."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pooling_checkpoints import classifier, embedder, reranker
from server_process import ServerProcess

from sempre.engine import LLM, PoolingParams

FLAGS = ("--max-model-len", "256", "--max-num-seqs", "8", "--num-threads", "1")
SETTINGS: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 8, "num_threads": 1, "multiprocessing": False}
TEXTS = ["It is a truth", "universally acknowledged", "a single man", "It is a truth"]
# knows the roles of a pair
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'query' %}Q {{ m.content }}"
    "{% elif m.role == 'document' %} D {{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pooling")
    made = {
        "embed": embedder(root / "embed", is_matryoshka=True),
        "classify": classifier(root / "classify"),
        "rank": reranker(root / "rank"),
    }
    stored = {"prompts": {"query": "It is asked: ", "document": ""}, "default_prompt_name": None}
    (made["embed"] / "config_sentence_transformers.json").write_text(json.dumps(stored))
    return made


def served(folder: Path, *flags: str) -> Iterator[ServerProcess]:
    with ServerProcess(folder.parent / f"log-{folder.name}", *FLAGS, *flags, model=str(folder)) as process:
        yield process


@pytest.fixture(scope="module")
def embeds(folders: dict[str, Path]) -> Iterator[ServerProcess]:
    yield from served(folders["embed"], "--served-model-name", "e")


@pytest.fixture(scope="module")
def classifies(folders: dict[str, Path]) -> Iterator[ServerProcess]:
    yield from served(folders["classify"])


@pytest.fixture(scope="module")
def ranks(folders: dict[str, Path]) -> Iterator[ServerProcess]:
    yield from served(folders["rank"], "--chat-template", TEMPLATE)


@pytest.fixture(scope="module")
def vectors(folders: dict[str, Path]) -> dict[int | None, list[list[float]]]:
    """Of TEXTS, whole and cut."""
    with LLM(folders["embed"], **SETTINGS) as llm:
        return {
            size: [o.outputs.embedding for o in llm.embed(TEXTS, pooling_params=PoolingParams(dimensions=size))]
            for size in (None, 16)
        }


def posted(server: ServerProcess, path: str, **body: Any) -> Any:
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def error(server: ServerProcess, path: str, **body: Any) -> tuple[int, str, str | None]:
    response = server.http.post(path, json=body)
    found = response.json()["error"]
    return response.status_code, found["message"], found["param"]


def test_the_openai_client_gets_the_bits_of_the_python_interface(
    embeds: ServerProcess, vectors: dict[int | None, list[list[float]]]
) -> None:
    """Axis A12. The client asks for base64 by itself, and for floats when told."""
    with openai.OpenAI(base_url=embeds.url + "/v1", api_key="none", max_retries=0) as client:
        packed = client.embeddings.create(model="e", input=TEXTS)
        plain = client.embeddings.create(model="e", input=TEXTS, encoding_format="float")
        cut = client.embeddings.create(model="e", input=TEXTS, dimensions=16)
    for found, size in ((packed, None), (plain, None), (cut, 16)):
        assert [item.embedding for item in found.data] == vectors[size]
        assert [item.index for item in found.data] == [0, 1, 2, 3]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    assert (packed.model, packed.object) == ("e", "list")


def test_forms_of_the_input(embeds: ServerProcess, vectors: dict[int | None, list[list[float]]]) -> None:
    [alone] = posted(embeds, "/v1/embeddings", input=TEXTS[0])["data"]
    ids = posted(embeds, "/tokenize", prompt=TEXTS[0])["tokens"]
    [as_ids] = posted(embeds, "/v1/embeddings", input=ids)["data"]
    lists = posted(embeds, "/v1/embeddings", input=[ids, ids[:2]])["data"]
    [packed] = posted(embeds, "/v1/embeddings", input=ids, encoding_format="base64")["data"]
    assert alone["embedding"] == as_ids["embedding"] == lists[0]["embedding"] == vectors[None][0]
    assert list(struct.unpack("<384f", base64.b64decode(packed["embedding"]))) == vectors[None][0]
    pooled = posted(embeds, "/pooling", input=TEXTS[0], task="embed")
    assert (pooled["data"][0]["data"], pooled["data"][0]["object"]) == (vectors[None][0], "pooling")
    raw = posted(embeds, "/v1/embeddings", input=TEXTS[0], use_activation=False)["data"][0]["embedding"]
    assert raw != vectors[None][0]


def test_stored_prompts(embeds: ServerProcess, vectors: dict[int | None, list[list[float]]]) -> None:
    def of(**body: Any) -> list[list[float]]:
        return [item["embedding"] for item in posted(embeds, "/v1/embeddings", **body)["data"]]

    asked = of(input=["It is asked: " + text for text in TEXTS])
    assert asked != vectors[None]
    assert of(input=TEXTS, prompt_name="query") == asked
    assert of(input=TEXTS[0], prompt_name="query") == asked[:1]
    assert of(input=TEXTS, prompt_name="document") == of(input=TEXTS, prompt_name="") == vectors[None]
    pooled = posted(embeds, "/pooling", input=TEXTS, prompt_name="query")
    assert [item["data"] for item in pooled["data"]] == asked
    refused = (TEXTS, "x", "prompt_name: expected one of the model's"), ([[5, 6]], "query", "prompt_name is for texts")
    for given, name, text in refused:
        status, message, param = error(embeds, "/v1/embeddings", input=given, prompt_name=name)
        assert (status, param) == (400, "prompt_name")
        assert text in message


def test_as_many_inputs_as_openai_takes(embeds: ServerProcess) -> None:
    many = [f"text {number % 7}" for number in range(2048)]
    found = posted(embeds, "/v1/embeddings", input=many)["data"]
    assert [item["embedding"] for item in found] == [found[number % 7]["embedding"] for number in range(2048)]
    status, message, field = error(embeds, "/v1/embeddings", input=[*many, "one more"])
    assert (status, field) == (400, "input")
    assert "at most 2048 prompts" in message
    embeds.wait_until_idle()


def test_a_prompt_may_fill_the_context(embeds: ServerProcess) -> None:
    assert posted(embeds, "/v1/embeddings", input=[7] * 256)["usage"]["prompt_tokens"] == 256
    status, message, _ = error(embeds, "/v1/embeddings", input=[7] * 257)
    assert status == 400
    assert "The prompt (length 257) is longer than the maximum model length of 256" in message
    cut = posted(embeds, "/v1/embeddings", input=[7] * 300, truncate_prompt_tokens=-1)
    assert cut["usage"]["prompt_tokens"] == 256


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ["a", [1]]}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 385}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "normalize": True}, "normalize"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"input": "a", "model": "f"}, "model"),
        ({"input": [9999999]}, "prompt_token_ids"),
        ({}, "input"),
    ],
)
def test_bad_requests_name_their_field(embeds: ServerProcess, fields: dict[str, Any], param: str) -> None:
    status, message, field = error(embeds, "/v1/embeddings", **fields)
    assert (status, field) == (404 if param == "model" else 400, param), message


def test_other_kinds_of_requests_are_refused(
    embeds: ServerProcess, classifies: ServerProcess, server: ServerProcess
) -> None:
    """A prompt to be continued by a model that pools, the reverse, and what another kind of model pools."""
    chat = [{"role": "user", "content": "a"}]
    cases = [
        (embeds, "/v1/completions", {"prompt": "a"}, "This model embeds and does not generate text"),
        (embeds, "/v1/chat/completions", {"messages": chat}, "This model embeds and does not generate text"),
        (embeds, "/classify", {"input": "a"}, "This model embeds; it cannot classify"),
        (classifies, "/v1/embeddings", {"input": "a"}, "This model classifies; it cannot embed"),
        (classifies, "/pooling", {"input": "a", "task": "embed"}, "This model classifies; it cannot embed"),
        (classifies, "/rerank", {"query": "a", "documents": ["b"]}, "classifies with 3 labels; scores need"),
        (server, "/v1/embeddings", {"input": "a"}, "This model generates text"),
        (server, "/classify", {"input": "a"}, "This model generates text"),
        (server, "/score", {"queries": "a", "documents": "b"}, "This model generates text"),
        (server, "/rerank", {"query": "a", "documents": ["b"]}, "This model generates text"),
    ]
    for process, path, body, text in cases:
        status, message, _ = error(process, path, **body)
        assert status == 400, path
        assert text in message


def test_classes(classifies: ServerProcess, folders: dict[str, Path]) -> None:
    with LLM(folders["classify"], **SETTINGS) as llm:
        expected = [output.outputs for output in llm.classify(TEXTS, use_tqdm=False)]
    found = posted(classifies, "/classify", input=TEXTS)
    assert [(i["probs"], i["label"], i["num_classes"]) for i in found["data"]] == [
        (each.probs, each.label, 3) for each in expected
    ]
    assert found["id"].startswith("classify-")
    raw = posted(classifies, "/classify", input=TEXTS, use_activation=False)["data"]
    assert [max(range(3), key=i["probs"].__getitem__) for i in raw] == [
        ["no", "maybe", "yes"].index(i["label"]) for i in found["data"]
    ]


def test_scores_and_ranks(ranks: ServerProcess, folders: dict[str, Path]) -> None:
    """By the chat template, which knows the roles of a pair; under any of the names that vLLM has for them."""
    with LLM(folders["rank"], chat_template=TEMPLATE, **SETTINGS) as llm:
        scores = [output.outputs.score for output in llm.score("a question", TEXTS)]
        [prompt] = {output.prompt_token_ids[0] for output in llm.score("a question", TEXTS)}
        assert prompt == llm.get_tokenizer().encode("Q a question D")[0]
    for names in (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2")):
        for path in ("/score", "/v1/score"):
            found = posted(ranks, path, **dict(zip(names, ("a question", TEXTS), strict=True)))
            assert [item["score"] for item in found["data"]] == scores
    pairs = posted(ranks, "/score", queries=["a question"] * 4, documents=TEXTS)["data"]
    assert [item["score"] for item in pairs] == scores
    order = sorted(range(4), key=lambda index: -scores[index])
    # equal documents, in the order in which they were given
    assert order.index(0) < order.index(3)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        found = posted(ranks, path, query="a question", documents=TEXTS, top_n=3)
        assert [item["index"] for item in found["results"]] == order[:3]
        assert [item["relevance_score"] for item in found["results"]] == [scores[index] for index in order[:3]]
        assert [item["document"]["text"] for item in found["results"]] == [TEXTS[index] for index in order[:3]]
        assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] > 0


def test_bad_pairs(ranks: ServerProcess) -> None:
    for body in ({"queries": "a"}, {"queries": "a", "text_2": "b"}, {}):
        status, message, field = error(ranks, "/score", **body)
        assert (status, field) == (400, "queries"), message
        assert "give queries and documents, or" in message
    status, message, _ = error(ranks, "/score", queries=["a", "b"], documents=["a", "b", "c"])
    assert status == 400
    assert "got 2 queries and 3 documents" in message
    assert error(ranks, "/rerank", query="a", documents=[])[0] == 400
    assert error(ranks, "/rerank", query="a", documents=["b"], top_n=-1)[2] == "top_n"


def test_scores_of_embeddings_are_their_cosine(embeds: ServerProcess) -> None:
    found = posted(embeds, "/score", queries=TEXTS[0], documents=TEXTS)["data"]
    assert found[0]["score"] == found[3]["score"] == pytest.approx(1.0)
    assert posted(embeds, "/rerank", query=TEXTS[0], documents=TEXTS)["results"][0]["index"] == 0


def test_metrics_count_pooled_requests(embeds: ServerProcess) -> None:
    posted(embeds, "/v1/embeddings", input=TEXTS)
    lines = embeds.http.get("/metrics").text.splitlines()

    def total(name: str) -> float:
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"sempre:{name}"))

    assert total("request_success_total") >= 4
    assert total("e2e_request_latency_seconds_count") >= 1
    assert total("prompt_tokens_total") >= 4
    assert total("generation_tokens_total") == 0


def test_the_description_has_the_endpoints(embeds: ServerProcess) -> None:
    found = embeds.http.get("/openapi.json").json()
    assert {"/v1/embeddings", "/pooling", "/classify", "/score", "/v2/rerank"} <= set(found["paths"])
