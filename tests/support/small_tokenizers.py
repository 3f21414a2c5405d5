"""Small tokenizers: byte-level BPE, and BPE with byte fallback as Llama 2 has it."""

from __future__ import annotations

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

TEXT = "The quick brown fox jumps over the lazy dog. It's a naïve café — 日本語のテキスト 😀😀 1234 END STOP\n\n"


def byte_level_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("日本 x", special=False)])
    backend.add_special_tokens([AddedToken("<|日本|>", special=True)])
    return backend


def byte_fallback_backend() -> Backend:
    words = ["▁the", "▁fox", "▁", "fox", "END", "▁END", "é", "a", "▁a", "s", "."]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = Backend(
        models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def gemma4_backend() -> Backend:
    """Byte-level, with the special tokens of Gemma 4; the first ends a sequence."""
    backend = byte_level_backend()
    pairs = ("turn", "channel", "tool_call", "tool_response", "tool")
    texts = ["<turn|>", *(f"<|{name}>" for name in pairs), *(f"<{name}|>" for name in pairs[1:]), '<|"|>', "<|think|>"]
    backend.add_special_tokens([AddedToken(text, special=True) for text in texts])
    return backend


def harmony_backend() -> Backend:
    """Byte-level, with the special tokens of gpt-oss; the first ends a sequence."""
    backend = byte_level_backend()
    names = ("return", "start", "end", "message", "channel", "constrain", "call")
    backend.add_special_tokens([AddedToken(f"<|{name}|>", special=True) for name in names])
    return backend
