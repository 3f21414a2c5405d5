"""The arrays of one request that change its logits, on the device: masks, bias, counts, history, phrases.

Built from the sequence known at admission; afterwards the sampling kernels update counts and history. Only what the
request uses is allocated, and freed with it.
"""

# V vocabulary

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from sempre.kernels.sampling import gpu_table
from sempre.workers.sampling.row_error import RowError
from sempre.workers.sampling.state import SamplingState

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PerRequestTensors:
    """Device arrays by the column of `gpu_table` that holds their address."""

    tensors: dict[int, torch.Tensor] = field(default_factory=dict)
    num_phrases: int = 0
    phrase_width: int = 0

    @classmethod
    def of(cls, state: SamplingState, vocab_size: int, device: torch.device) -> PerRequestTensors:
        """Raises RowError when a parameter or the sequence names a token outside the vocabulary."""
        state.check_ids(vocab_size)
        params = state.params
        tensors: dict[int, npt.NDArray[np.generic]] = {}
        single = [word[0] for word in params.bad_words_token_ids if len(word) == 1]
        if params.allowed_token_ids is not None or single:
            tensors[gpu_table.MASK] = _forbidden_bits(params.allowed_token_ids, single, vocab_size)
        ends = state.end_token_ids[state.end_token_ids < vocab_size]
        if params.min_tokens and ends.size and state.grammar is None:
            tensors[gpu_table.END_MASK] = _forbidden_bits(None, ends.tolist(), vocab_size)
        if params.logit_bias:
            bias = np.full(vocab_size, -0.0, np.float32)  # x + -0.0 is x for every x
            bias[list(params.logit_bias)] = list(params.logit_bias.values())
            tensors[gpu_table.BIAS] = bias
        if state.grammar is not None:
            tensors[gpu_table.GRAMMAR] = np.zeros(-(-vocab_size // 32), np.int32)
        if state.penalises:
            tensors[gpu_table.COUNTS] = _counts(state, vocab_size)
        phrases = [word for word in params.bad_words_token_ids if len(word) > 1]
        width = max(map(len, phrases), default=0)
        if phrases:
            tensors[gpu_table.PHRASES] = np.asarray(
                [[len(phrase), *phrase, *[0] * (width - len(phrase))] for phrase in phrases], np.int32
            )
            history = np.zeros(state.num_prompt_tokens + params.max_tokens, np.int32)
            history[: len(state.token_ids)] = state.token_ids
            tensors[gpu_table.HISTORY] = history
        return cls({column: _upload(tensor, device) for column, tensor in tensors.items()}, len(phrases), width)


def _forbidden_bits(allowed: list[int] | None, forbidden: list[int], vocab_size: int) -> Int32:
    bits = np.full(-(-vocab_size // 32) * 32, allowed is not None, np.bool_)
    if allowed is not None:
        bits[allowed] = False
    bits[forbidden] = True
    return np.packbits(bits, bitorder="little").view("<i4")


def _counts(state: SamplingState, vocab_size: int) -> Int32:
    tokens = np.asarray(state.token_ids, np.int64)
    if tokens.max(initial=0) >= vocab_size:
        raise RowError("penalties", f"expected token ids below {vocab_size}, found {tokens.max()} in the sequence")
    counts = np.bincount(tokens[state.num_prompt_tokens :], minlength=vocab_size).astype(np.int32)
    counts[np.unique(tokens[: state.num_prompt_tokens])] += np.int32(gpu_table.IN_PROMPT)
    return counts


def _upload(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        # the pinned-memory allocator keeps the block until the copy is done
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
