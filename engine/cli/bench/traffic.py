"""Requests of a load test and their times, which depend on the seed alone."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sempre.engine.models.resolve import resolve_model
from sempre.engine.text.tokenizer import Tokenizer
from sempre.ipc.errors import ConfigError, ModelError
from sempre.ipc.model_files import read_json_object

# vLLM's length limits of usable conversations, in tokens
_SHORTEST = 4
_LONGEST_PROMPT = 1024
_LONGEST_IN_ALL = 2048


class Sample(NamedTuple):
    """A prompt, as text or token ids, and the maximum number of tokens to generate."""

    prompt: str | list[int]
    output_len: int


def load_tokenizer(name: str) -> Tokenizer:
    """Return a model's tokenizer; offline, only models on this machine or in the catalogue work."""
    return Tokenizer.from_folder(resolve_model(name).path)


def vocab_size_of(name: str) -> int:
    """Return a model's vocabulary size; without a tokenizer, from config.json."""
    folder = resolve_model(name).path
    if (folder / "tokenizer.json").is_file():
        return len(Tokenizer.from_folder(folder))
    size = read_json_object(folder / "config.json").get("vocab_size")
    if not isinstance(size, int):
        raise ModelError(f"{folder} has neither tokenizer.json nor a vocab_size in config.json")
    return size


def random_samples(
    count: int,
    *,
    vocab_size: int,
    input_len: int,
    output_len: int,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
    seed: int = 0,
) -> list[Sample]:
    """Return prompts of random token ids: `prefix_len` shared ids, then `input_len` of their own.

    Input and output lengths are uniform within ± `range_ratio`. Ids instead of text make lengths exact.
    """
    generator = random.Random(seed)
    prefix = generator.choices(range(vocab_size), k=prefix_len)

    def length(around: int) -> int:
        spread = int(around * range_ratio)
        return max(1, generator.randint(around - spread, around + spread))

    return [
        Sample(prefix + generator.choices(range(vocab_size), k=length(input_len)), length(output_len))
        for _ in range(count)
    ]


def sharegpt_samples(
    path: str, count: int, *, tokenizer: Tokenizer, output_len: int | None, seed: int = 0
) -> list[Sample]:
    """Return first messages of a ShareGPT file, with the length of their answers or `output_len`.

    The file is a JSON list of {"conversations": [{"value": …}, {"value": …}, …]}. Conversations are shuffled,
    very short and very long ones left out, and reused if there are fewer than `count`. Raises ConfigError.
    """
    usable = []
    for conversation in _conversations(path):
        question, reply = conversation[0]["value"], conversation[1]["value"]
        num_prompt = len(tokenizer.encode(question))
        length = output_len or len(tokenizer.encode(reply))
        too_short = num_prompt < _SHORTEST or (output_len is None and length < _SHORTEST)
        if not too_short and num_prompt <= _LONGEST_PROMPT and num_prompt + length <= _LONGEST_IN_ALL:
            usable.append(Sample(question, length))
    if not usable:
        raise ConfigError(f"{path} holds no conversation of a usable length.", parameter="dataset_path", value=path)
    random.Random(seed).shuffle(usable)
    return [usable[i % len(usable)] for i in range(count)]


def _conversations(path: str) -> list[list[dict[str, Any]]]:
    try:
        rows = json.loads(Path(path).read_bytes())
        found = [row["conversations"] for row in rows if len(row.get("conversations") or ()) >= 2]
        for turns in found:
            if not all(isinstance(turn["value"], str) for turn in turns[:2]):
                raise TypeError("`value` is not text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{path} must be a JSON list of {{"conversations": [{{"value": …}}, …]}}: {error!r}',
            parameter="dataset_path",
            value=path,
        ) from None
    return found


def as_text(samples: Sequence[Sample], tokenizer: Tokenizer) -> list[Sample]:
    """Return the samples as text; encoded again, it may be a few tokens longer or shorter."""
    return [
        sample
        if isinstance(sample.prompt, str)
        else Sample(tokenizer.decode(sample.prompt, skip_special_tokens=True), sample.output_len)
        for sample in samples
    ]


def arrival_times(count: int, *, rate: float, burstiness: float, seed: int = 0) -> list[float]:
    """Return when each request is due, in seconds: at once for an infinite rate, else `rate` per second on average.

    Gaps follow a gamma distribution of shape `burstiness`: 1 is a Poisson process, less is bursty, more is even.
    They are scaled so that the last request is due at count / rate.
    """
    if np.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(shape=burstiness, scale=1.0 / (rate * burstiness), size=count)
    times = np.cumsum(gaps)
    return [float(time) for time in times * (count / rate / times[-1])]
