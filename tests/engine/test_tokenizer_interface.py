"""The tokenizer answers as that of transformers does, made from the same folder."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import byte_fallback_backend, byte_level_backend
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sempre.engine.arguments import parse_arguments
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError

TEXTS = ["The quick fox", "naïve 日本 😀", "", " a\n<s>b</s>"]
CHAT = [{"role": "user", "content": "Who is there?"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tiny() -> Path:
    return Path(parse_arguments("tiny", {})[0].model_path)


def saved(folder: Path, kind: str) -> Path:
    """A folder as transformers writes it."""
    backend = byte_level_backend() if kind == "bytes" else byte_fallback_backend()
    tokens: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    if kind == "fallback":
        tokens |= {"unk_token": "<unk>", "pad_token": "</s>"}
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    else:
        tokens["additional_special_tokens"] = ["<|im_end|>", "<|日本|>"]
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, model_max_length=77, **tokens)
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["tiny", "bytes", "fallback"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = tiny() if request.param == "tiny" else saved(tmp_path_factory.mktemp(request.param), request.param)
    return Tokenizer.from_folder(folder), PreTrainedTokenizerFast.from_pretrained(folder)


ATTRIBUTES = ["bos_token", "eos_token", "pad_token", "unk_token"]
ATTRIBUTES += [name + "_id" for name in ATTRIBUTES]
ATTRIBUTES += ["vocab_size", "all_special_tokens", "all_special_ids", "special_tokens_map", "is_fast", "name_or_path"]
ATTRIBUTES += ["model_max_length", "padding_side", "chat_template"]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(pair: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = pair
    assert getattr(ours, name) == getattr(theirs, name)


def test_the_vocabulary(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    ids = list(range(len(ours) + 3))
    tokens = ours.convert_ids_to_tokens(ids)
    assert tokens == theirs.convert_ids_to_tokens(ids)
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == theirs.convert_ids_to_tokens(
        ids, skip_special_tokens=True
    )
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)
    assert ours.convert_tokens_to_ids(tokens[:-3]) == theirs.convert_tokens_to_ids(tokens[:-3]) == ids[:-3]
    for token in (tokens[7], "no such token"):
        assert ours.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_texts(pair: tuple[Tokenizer, Any], text: str, special: bool) -> None:
    ours, theirs = pair
    ids = theirs.encode(text, add_special_tokens=special)
    assert ours.encode(text, add_special_tokens=special) == ids
    encoded = ours(text, add_special_tokens=special)
    assert encoded == dict(theirs(text, add_special_tokens=special))
    assert (encoded.input_ids, encoded.attention_mask) == (ids, [1] * len(ids))
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.convert_tokens_to_string(ours.tokenize(text)) == theirs.convert_tokens_to_string(theirs.tokenize(text))
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.batch_decode([ids, ids[:1]]) == theirs.batch_decode([ids, ids[:1]])
    assert ours.decode(7) == theirs.decode(7)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"padding": True},
        {"padding": "longest"},
        {"padding": "max_length", "max_length": 40},
        {"truncation": True, "max_length": 4},
        {"truncation": True, "max_length": 4, "padding": "max_length"},
    ],
)
def test_batches(pair: tuple[Tokenizer, Any], keywords: dict[str, Any]) -> None:
    ours, theirs = pair
    if "padding" in keywords and theirs.pad_token is None:
        with pytest.raises(ConfigError, match="padding needs a pad_token"):
            ours(TEXTS, **keywords)
    else:
        assert ours(TEXTS, **keywords) == dict(theirs(TEXTS, **keywords))


def test_conversations(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for keywords in ({}, {"add_generation_prompt": True}, {"chat_template": "{{ messages[0].content }}!"}):
        text = ours.apply_chat_template(CHAT, tokenize=False, **keywords)
        assert text == theirs.apply_chat_template(CHAT, tokenize=False, **keywords)
        encoded = ours.apply_chat_template(CHAT, return_dict=True, **keywords)
        assert encoded == dict(theirs.apply_chat_template(CHAT, return_dict=True, **keywords))
        assert ours.apply_chat_template(CHAT, **keywords) == encoded["input_ids"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize("method", ["encode", "decode", "batch_decode", "convert_ids_to_tokens", "get_vocab"])
def test_keywords_have_the_same_names(pair: tuple[Tokenizer, Any], method: str) -> None:
    ours, theirs = (inspect.signature(getattr(each, method)).parameters for each in pair)
    taken = {"ids_or_tokens": "ids"}
    assert set(ours) <= {taken.get(name, name) for name in theirs}


def test_what_it_does_not_do_is_said(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    with pytest.raises(ConfigError, match="return_tensors must be None"):
        ours("a", return_tensors="pt")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="padding must be"):
        ours("a", padding="some")  # type: ignore[arg-type]
