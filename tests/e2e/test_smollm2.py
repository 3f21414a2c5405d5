"""The catalogue's smollm2-135m, fetched for real when the cache does not hold it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gguf_files import transformers_llama

from sempre.engine.models import resolve_model
from sempre.engine.text.chat_template import load_chat_template, render_chat
from sempre.engine.text.detokenizer import IncrementalDetokenizer
from sempre.engine.text.tokenizer import Tokenizer
from sempre.workers.gguf_source import open_gguf

PARAGRAPH = (
    "The sun rises in the east and sets in the west. In the morning, people wake up, eat breakfast and go to work "
    "or to school. The library of the town was built in the nineteenth century and holds many old books about the "
    "history of the region."
)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model("smollm2-135m").path


def test_tensors(folder: Path) -> None:
    with open_gguf(folder) as source:
        assert len(source.names()) == 272
        assert "lm_head.weight" not in source.names()
        assert source.shape("model.embed_tokens.weight") == (49152, 576)
        assert source.shape("model.layers.29.self_attn.k_proj.weight") == (192, 576)


def test_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    assert len(tokenizer) == 49152
    assert sorted(tokenizer.all_special_ids) == list(range(17))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2,))
    ids = tokenizer.encode("In 2024 there were 12 items.")
    assert [tokenizer.token_text(token_id) for token_id in ids] == [
        *("In", " ", "2", "0", "2", "4", " there", " were", " ", "1", "2", " items", ".")
    ]
    for text in (PARAGRAPH, "def f(x):\n    return x  # naïve 日本語 😀\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_answers_and_reads_english(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    model = transformers_llama(folder)
    prompt = render_chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        load_chat_template(folder),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
    )
    prompt_ids = tokenizer.encode(prompt)
    output = model.generate(torch.tensor([prompt_ids]), max_new_tokens=16, do_sample=False)[0, len(prompt_ids) :]
    detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=prompt_ids)
    assert detokenizer.update(output.tolist(), finished=True).delta == "The capital of France is Paris."

    ids = torch.tensor([tokenizer.encode(PARAGRAPH)])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    bits_per_byte = loss / math.log(2) * (ids.shape[1] - 1) / len(PARAGRAPH.encode())
    assert bits_per_byte < 0.9
