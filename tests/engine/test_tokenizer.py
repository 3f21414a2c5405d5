"""Encoding, decoding, special ids, and what a model folder says about them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError, ModelError


def save(folder: Path, backend: Backend, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def small_backend() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<s>"), AddedToken("</s>"), AddedToken("<end>")])  # 256, 257, 258
    return backend


@given(text=st.text())
def test_text_survives_the_round_trip(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    assert byte_level.decode(ids, skip_special_tokens=False) == text


@given(texts=st.lists(st.text(), max_size=5))
def test_a_batch_equals_its_texts_one_by_one(byte_level: Tokenizer, texts: list[str]) -> None:
    assert byte_level.encode_batch(texts) == [byte_level.encode(text) for text in texts]


def test_special_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("<s>fox</s>")
    assert (ids[0], ids[-1]) == (byte_level.bos_token_id, byte_level.eos_token_id)
    assert {ids[0], ids[-1]} < set(byte_level.all_special_ids)
    assert byte_level.decode(ids, skip_special_tokens=True) == "fox"
    assert byte_level.decode(ids, skip_special_tokens=False) == "<s>fox</s>"
    tool_id = byte_level.encode("<tool_call>")
    assert byte_level.decode(tool_id) == "<tool_call>"  # added, yet not special


def test_token_text(byte_level: Tokenizer, byte_fallback: Tokenizer) -> None:
    ids = byte_level.encode("a fox é")
    assert "".join(byte_level.token_text(token_id) for token_id in ids) == "a fox é"
    assert byte_level.token_text(byte_level.eos_token_id or 0) == "</s>"
    assert byte_level.token_text(len(byte_level)) == ""
    half = byte_level.encode("\U0001f680")[0]
    assert byte_level.token_text(half) == "\ufffd"
    assert byte_fallback.token_text(byte_fallback.encode("fox", add_special_tokens=False)[0]) == " "
    newline = byte_fallback.encode("\n", add_special_tokens=False)[-1]
    assert byte_fallback.token_text(newline) == "\n"


@given(data=st.data())
def test_joined_token_bytes_are_the_text(byte_level: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(byte_level) + 2)))
    joined = b"".join(byte_level.token_bytes(token_id) for token_id in ids)
    assert joined.decode("utf-8", errors="replace") == byte_level.decode(ids, skip_special_tokens=False)


def test_a_post_processor_adds_bos(tmp_path: Path) -> None:
    backend = small_backend()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = Tokenizer.from_folder(save(tmp_path, backend))
    assert tokenizer.encode("a")[0] == 256
    assert tokenizer.encode_batch(["a", "b"])[1][0] == 256
    assert tokenizer.encode("a", add_special_tokens=False) == tokenizer.encode("a")[1:]


def test_padding_and_truncation_in_the_file_do_not_apply(tmp_path: Path) -> None:
    backend = small_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=16, pad_token="<end>", pad_id=258)
    tokenizer = Tokenizer.from_folder(save(tmp_path, backend))
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert [len(ids) for ids in tokenizer.encode_batch(["a", "abcdef"])] == [1, 6]


@pytest.mark.parametrize(
    ("files", "bos", "eos", "eos_ids"),
    [
        ({}, None, None, ()),
        ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, 256, 257, (257,)),
        (
            {"tokenizer_config": {"eos_token": "<end>"}, "generation_config": {"eos_token_id": [257, 258]}},
            None,
            258,
            (258, 257),
        ),
        ({"generation_config": {"eos_token_id": 258}, "config": {"eos_token_id": 257}}, None, 258, (258,)),
        ({"generation_config": {}, "config": {"eos_token_id": 257}}, None, 257, (257,)),
        ({"tokenizer_config": {"bos_token": None, "eos_token": None}}, None, None, ()),
    ],
)
def test_bos_and_eos(
    tmp_path: Path, files: dict[str, object], bos: int | None, eos: int | None, eos_ids: tuple[int, ...]
) -> None:
    tokenizer = Tokenizer.from_folder(save(tmp_path, small_backend(), **files))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (bos, eos, eos_ids)
    assert len(tokenizer) == 259
    assert set(tokenizer.all_special_ids) == {256, 257, 258}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_config": {"eos_token": "<nope>"}}, "eos_token '<nope>' is not in the tokenizer's vocabulary"),
        ({"tokenizer_config": {"bos_token": 3}}, "bos_token must be a string, found 3"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id must be a token id or a list of them, found '2'"),
        ({"config": {"eos_token_id": [True]}}, "eos_token_id must be a token id"),
        ({"config": []}, "expected a JSON object, found list"),
    ],
)
def test_folders_that_contradict_themselves(tmp_path: Path, files: dict[str, object], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        Tokenizer.from_folder(save(tmp_path, small_backend(), **files))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing.*save_pretrained"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    save(tmp_path, small_backend())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_importing_it_brings_in_no_heavy_library() -> None:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; import sempre.engine.text.tokenizer, sempre.engine.text.detokenizer; "
        "print([name for name in ('torch', 'transformers', 'numpy', 'jinja2') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_conversation_by_the_models_own_template(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ mark }}{% endfor %}{{ ':' * add_generation_prompt }}"
    )
    save(tmp_path, small_backend(), tokenizer_config={"bos_token": "<s>", "chat_template": template})
    tokenizer = Tokenizer.from_folder(tmp_path)
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == "<s>ab"
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, mark=".")
    assert ids == tokenizer.encode("<s>a.b.:")
    assert tokenizer.apply_chat_template(conversation, chat_template="{{ messages | length }}", tokenize=False) == "2"
    assert (len(tokenizer), tokenizer.vocab_size) == (259, 256)
    with pytest.raises(ConfigError, match="chat_template must be given"):
        Tokenizer(small_backend()).apply_chat_template(conversation)
