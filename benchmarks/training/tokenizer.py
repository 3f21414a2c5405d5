"""Trains the tokenizer and encodes the corpus: `python tokenizer.py CORPUS OUT`.

Reads `CORPUS/{train,validation}.jsonl` (see corpus.py) and writes to OUT

- `tokenizer.json`, `tokenizer_config.json`: byte-level BPE, exactly `VOCAB_SIZE` tokens, lossless for any UTF-8 text;
- `train.npy`, `validation.npy`: uint16 token ids, each document preceded by `<|endoftext|>`;
- `bytes.json`: the UTF-8 bytes of each split, the denominator of bits per byte.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
CONTEXT = 2048
SEED = 20
CHAT_SHARE = 0.03  # share of paragraphs that are repeated as an exchange in the chat format

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_documents(path: Path) -> list[str]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"vocabulary: expected {VOCAB_SIZE} tokens, found {tokenizer.get_vocab_size()}; add text")
    return tokenizer


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [IM_START, IM_END],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": CHAT_TEMPLATE,
    }


def exchanges(texts: list[str], chooser: random.Random) -> Iterator[str]:
    """Paragraphs as chats: the user gives the first sentence, the assistant continues."""
    for text in texts:
        for paragraph in text.split("\n\n"):
            parts = re.split(r"(?<=[.!?]) ", paragraph, maxsplit=1)
            if len(paragraph) > 300 and len(parts) == 2 and chooser.random() < CHAT_SHARE:
                yield f"{IM_START}user\n{parts[0]}{IM_END}\n{IM_START}assistant\n{parts[1]}{IM_END}\n"


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids of all texts in one row, uint16 [tokens]."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts):
        ids.append(0)
        ids.extend(encoding.ids)
    return np.array(ids, dtype=np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    corpus: Path = arguments.corpus
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    train, validation = read_documents(corpus / "train.jsonl"), read_documents(corpus / "validation.jsonl")
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), indent=2) + "\n")
    sizes = {"train": sum(len(t.encode()) for t in train), "validation": sum(len(t.encode()) for t in validation)}
    (out / "bytes.json").write_text(json.dumps(sizes) + "\n")
    chooser = random.Random(SEED)
    train += list(exchanges(train, chooser))
    chooser.shuffle(train)
    for name, texts in (("train", train), ("validation", validation)):
        ids = encode(tokenizer, texts)
        np.save(out / f"{name}.npy", ids)
        print(f"{name}: {sizes[name]} bytes, {len(ids)} tokens, {len(texts)} documents")


if __name__ == "__main__":
    main()
