"""Tokenizers of GGUF files: splits by their names, and SentencePiece's merges against a plain account of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf_files import finish

from sempre.engine.models.gguf_metadata import GgufMetadata
from sempre.engine.models.gguf_pre_tokenizers import PRE_TOKENIZERS
from sempre.engine.models.gguf_tokenizer import TokenizerFacts, write_tokenizer
from sempre.engine.text.chat_template import load_chat_template
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPLITS = {
    "gpt-2": ["Don", "'t", " HELLO", "'", "S", " 12345", " x", "  ", "\n", "é", "!?", "\n"],
    "smollm": ["Don", "'t", " HELLO", "'", "S", " ", "1", "2", "3", "4", "5", " x", "  ", "\n", "é", "!?", "\n"],
    "llama-bpe": ["Don", "'t", " HELLO", "'S", " ", "123", "45", " x", "  \n", "é", "!?\n"],
    "qwen2": ["Don", "'t", " HELLO", "'S", " ", "1", "2", "3", "4", "5", " x", "  \n", "é", "!?\n"],
    "gpt-4o": ["Don't", " HELLO'S", " ", "123", "45", " x", "  \n", "é", "!?\n"],
    "tekken": ["Don", "'t", " HELLO", "'S", " ", "1", "2", "3", "4", "5", " x", "  \n", "é", "!?\n"],
}
SPLITS |= {"llama3": SPLITS["llama-bpe"], "starcoder": SPLITS["smollm"], "refact": SPLITS["smollm"]}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_splits(name: str) -> None:
    text = "Don't HELLO'S 12345 x  \né!?\n"
    pieces = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == SPLITS[name]


def read(folder: Path, **fields: Any) -> tuple[Tokenizer, TokenizerFacts]:
    """The tokenizer of a file with these fields."""
    writer = GGUFWriter(folder / "t.gguf", "llama")
    for name, value in fields.items():
        {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_uint32,
            list: writer.add_array,
        }[type(value)]((f"tokenizer.{name}" if name.startswith("chat") else f"tokenizer.ggml.{name}"), value)
    finish(writer)
    (folder / "out").mkdir(exist_ok=True)
    metadata = GgufMetadata(GGUFReader(folder / "t.gguf"), folder / "t.gguf")
    facts = write_tokenizer(metadata, folder / "out", context_length=64)
    metadata.refuse_unread()
    return Tokenizer.from_folder(folder / "out"), facts


WORDS = ["the", "fox", "jump", "jumps", "over", "lazy", "naïve", "▁the", "▁fox", "▁▁", "ing", "▁jumping"]


def pieces_fields(**changes: Any) -> dict[str, Any]:
    """A vocabulary whose words can all be merged, with scores that differ from the order of ids."""
    parts = {word[start:end] for word in WORDS for start in range(len(word)) for end in range(start + 1, len(word) + 1)}
    words = sorted({*parts, *"abcdefghijklmnopqrstuvwxyz.", "▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "\n\n"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words), USER]
    drawn = np.random.default_rng(1).permutation(len(words)).tolist()
    scores = [0.0] * 259 + [-float(rank) for rank in drawn] + [0.0]
    return {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "unknown_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip


def merged(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """SentencePiece's account: the pair whose union scores best, the leftmost of equals, until none is a token."""
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    parts = list(text)
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


TEXTS = ["the fox jumps over the lazy fox", "jumping  naïve.", "日本 the 😀", "x", " the", "thejumping over"]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_pieces_are_merged_by_score(tmp_path: Path, prefix: bool | None) -> None:
    fields = pieces_fields() if prefix is None else pieces_fields(add_space_prefix=prefix)
    tokenizer, _ = read(tmp_path, **fields)
    for text in TEXTS:
        escaped = ("" if prefix is False else "▁") + text.replace(" ", "▁")
        assert tokenizer.encode(text) == [1, *merged(escaped, fields["tokens"], fields["scores"])], text
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    reversed_scores = [-score for score in fields["scores"]]
    assert any(tokenizer.encode(t)[1:] != merged("▁" + t, fields["tokens"], reversed_scores) for t in TEXTS)


def test_special_and_user_defined_pieces(tmp_path: Path) -> None:
    fields = pieces_fields(add_bos_token=False, add_eos_token=True)
    tokenizer, facts = read(tmp_path, **fields)
    double = fields["tokens"].index("\n\n")
    ids = tokenizer.encode("x</s>x\n\nx")
    assert ids.count(2) == 2
    assert ids[-1] == 2
    assert double in ids
    assert tokenizer.special_texts == {0: "<unk>", 1: "<s>", 2: "</s>"}
    assert tokenizer.has_byte_fallback
    assert facts.eos_ids == [2]


def test_user_defined_spaces_are_found_in_texts(tmp_path: Path) -> None:
    fields = pieces_fields(add_space_prefix=False, add_bos_token=False)
    fields["token_type"][fields["tokens"].index("▁▁")] = USER
    tokenizer, _ = read(tmp_path, **fields)
    assert tokenizer.encode("x  x") == [fields["tokens"].index(piece) for piece in ("x", "▁▁", "x")]


def byte_level_fields(**changes: Any) -> dict[str, Any]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "th", "the", "Ġthe", "<|end|>", "<|eot|>", "<|eom|>", "ab", "abc"]
    kinds = [NORMAL] * 259 + [CONTROL] * 3 + [NORMAL] * 2
    return {
        "model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": kinds,
        "merges": ["t h", "th e", "Ġ the"], "bos_token_id": 259, "eos_token_id": 259, "eot_token_id": 260,
        "eom_token_id": 261, **changes,
    }  # fmt: skip


def test_all_ends_of_a_message_end_an_output(tmp_path: Path) -> None:
    _, facts = read(tmp_path, **byte_level_fields())
    assert facts.eos_ids == [259, 260, 261]
    assert facts.special_ids == {"bos_token_id": 259, "eos_token_id": 259}
    _, facts = read(tmp_path, **byte_level_fields(eos_token_id=260, padding_token_id=2**32 - 1))
    assert facts.eos_ids == [260, 261]
    assert "pad_token_id" not in facts.special_ids


def test_whole_words_and_beginnings_are_of_the_split(tmp_path: Path) -> None:
    whole, _ = read(tmp_path, **byte_level_fields())
    fields = byte_level_fields()
    assert whole.encode("abc") == [259, fields["tokens"].index("abc")]
    merged_only, _ = read(tmp_path, **byte_level_fields(pre="gpt-4o"))
    assert merged_only.encode("abc") == [fields["tokens"].index(letter) for letter in "abc"]
    without, _ = read(tmp_path, **byte_level_fields(add_bos_token=False))
    assert without.encode("abc") == [fields["tokens"].index("abc")]


def test_texts_of_qwen_are_composed(tmp_path: Path) -> None:
    composed, _ = read(tmp_path, **byte_level_fields(pre="qwen2"))
    assert composed.encode("e\u0301") == composed.encode("é")
    other, _ = read(tmp_path, **byte_level_fields(pre="gpt-4o"))
    assert other.encode("e\u0301") != other.encode("é")


def test_named_chat_templates(tmp_path: Path) -> None:
    named = {"chat_templates": ["tool_use"], "chat_template.tool_use": "with tools", "chat_template": "plain"}
    read(tmp_path, **byte_level_fields(**named))
    assert load_chat_template(tmp_path / "out") == "plain"
    assert load_chat_template(tmp_path / "out", tools=[{}]) == "with tools"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (pieces_fields(scores=[0.5]), r"tokenizer\.ggml\.scores': expected \d+ numbers, found 1"),
        (pieces_fields(precompiled_charsmap=[1]), "precompiled_charsmap"),
        (pieces_fields(model="t5"), r"'gpt2' \(byte-level BPE\) or 'llama' \(SentencePiece\), found 't5'"),
        (pieces_fields(tokens=["a", "a", "b"]), "each token once"),
        (pieces_fields(bos_token_id=10**6), "bos_token_id': expected an id below"),
        (byte_level_fields(merges=["t q"]), "merges: item 0': expected two known tokens"),
        (byte_level_fields(pre="poro"), "tokenizer.ggml.pre': expected one of 'gpt-2'"),
        (byte_level_fields(token_type=[9] * 264), "token_type': expected one of"),
        (byte_level_fields(rope="x"), "tokenizer.ggml.rope"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        read(tmp_path, **fields)


def test_bos_that_is_asked_for_must_be_known(tmp_path: Path) -> None:
    fields = pieces_fields()
    del fields["bos_token_id"]
    with pytest.raises(ModelError, match=r"bos_token_id': expected an id, as add_bos_token is true, found None"):
        read(tmp_path, **fields)
