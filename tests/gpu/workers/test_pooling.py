"""Models that pool on a GPU: transformers' numbers, and bits of a prompt alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pooling_checkpoints import FLAGS, classifier, embedder, reranker

from sempre.engine import LLM
from sempre.workers.input_batch import StepPlan
from sempre.workers.pooling import Pooler

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.gpu

KINDS = [*FLAGS, "classify", "rank"]
SHARED = [7 + 31 * i % 3000 for i in range(640)]
PROMPTS = [
    [3 + 17 * (i + 5 * n) % 4000 for i in range(n)] if n % 2 else [*SHARED, *(5 + i for i in range(n))]
    for n in (1, 7, 20, 33, 2, 150, 63, 4, 901, 15, 131, 16)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pooling")
    made = {kind: embedder(root / kind, kind) for kind in FLAGS}
    return made | {"classify": classifier(root / "classify"), "rank": reranker(root / "rank")}


def run(model: Path, *prompts: list[list[int]], **changes: Any) -> list[list[list[float]]]:
    settings = {"multiprocessing": False, "device": "cuda", "kv_cache_memory_bytes": 1 << 28, **changes}
    with LLM(model, **settings) as llm:
        return [[output.outputs.data for output in llm.encode(each, use_tqdm=False)] for each in prompts]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_the_prompt_alone(kind: str, dtype: str, folders: dict[str, Path]) -> None:
    lone = run(folders[kind], *([prompt] for prompt in PROMPTS), enable_prefix_caching=False, dtype=dtype)
    alone = [values for [values] in lone]
    assert run(folders[kind], PROMPTS, PROMPTS, dtype=dtype) == [alone, alone]
    for most in (64, 200):
        [found] = run(folders[kind], PROMPTS[::-1], max_num_seqs=5, max_num_batched_tokens=most, dtype=dtype)
        assert found[::-1] == alone


@pytest.mark.parametrize("kind", FLAGS)
def test_the_row_of_a_neighbour_is_noticed(
    kind: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: each request but the first of a step has the row before its own in its sum, too."""
    spans = Pooler._spans

    def shifted(self: Pooler, plan: StepPlan) -> tuple[Any, ...]:
        first, *others = spans(self, plan)
        return first - (first > 0), *others

    monkeypatch.setattr(Pooler, "_spans", shifted)
    changes = {"enable_prefix_caching": False, "dtype": "bfloat16"}
    lone = run(folders[kind], *([prompt] for prompt in PROMPTS), **changes)
    assert run(folders[kind], PROMPTS, **changes) != [[values for [values] in lone]]


@pytest.mark.parametrize("kind", FLAGS)
def test_embeddings_are_those_of_transformers(kind: str, folders: dict[str, Path]) -> None:
    [found] = run(folders[kind], PROMPTS, dtype="float32", max_num_batched_tokens=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32).eval()
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            hidden = model.model(torch.tensor([prompt])).last_hidden_state[0].double()
        pooled = {"LAST": hidden[-1], "MEAN": hidden.mean(0), "CLS": hidden[0]}[kind]
        expected.append(torch.nn.functional.normalize(pooled, dim=0))
    stacked = torch.stack(expected)
    assert (torch.tensor(found, dtype=torch.float64) - stacked).norm() / stacked.norm() < 1e-5


def test_processes(folders: dict[str, Path]) -> None:
    """With two steps in flight, whose results are taken later."""
    for kind in ("MEAN", "rank"):
        here, there = (
            run(folders[kind], PROMPTS * 20, max_num_seqs=7, multiprocessing=multiprocessing)
            for multiprocessing in (False, True)
        )
        assert here == there
