"""How the byte-level vocabularies of GGUF split a text before merging: the names that `tokenizer.ggml.pre` may have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+"


def _cased_words(end: str) -> str:
    """Words that a capital letter begins."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{end}|{start}{_UPPER}+{_LOWER}*{end}"


@dataclass(frozen=True)
class PreTokenizer:
    """One way to split."""

    pattern: str | None = None
    """None: GPT-2's"""
    single_digits: bool = False
    """whether digits are split off one by one, before GPT-2's pattern"""
    whole_words: bool = False
    """whether a word that is a token is not merged from parts"""
    begins: bool = False
    """whether a text begins with the bos token where the file does not say"""
    composes: bool = False
    """whether texts are normalised to NFC"""

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's form."""
        if self.pattern is not None:
            split = pre_tokenizers.Split(Regex(self.pattern), behavior="isolated")
            return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        if not self.single_digits:
            return byte_level
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])


_GPT_2 = PreTokenizer()
_DIGITS = PreTokenizer(single_digits=True)
_LLAMA_3 = PreTokenizer(rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}[\r\n]*|{_SPACES}", whole_words=True, begins=True)

PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": _GPT_2,
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "refact": _DIGITS,
        "llama-bpe": _LLAMA_3,
        "llama3": _LLAMA_3,
        "qwen2": PreTokenizer(rf"{_WORDS}|\p{{N}}|{_OTHERS}[\r\n]*|{_SPACES}", composes=True),
        "gpt-4o": PreTokenizer(rf"{_cased_words(_CONTRACTION + '?')}|\p{{N}}{{1,3}}|{_OTHERS}[\r\n/]*|{_SPACES}"),
        "tekken": PreTokenizer(
            rf"{_cased_words('')}|\p{{N}}|{_OTHERS}[\r\n/]*|{_SPACES}", whole_words=True, begins=True
        ),
    }
)
"""By name."""
