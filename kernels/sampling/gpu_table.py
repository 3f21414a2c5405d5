"""The device's table of sampling parameters: one row of 32-bit words per slot, read by the kernels by column.

word:    0     1           2 3    4     5      6 7    8 9 10     11            12 … 14   15        16 …
         flags temperature seed   top_k lowest top_p  penalties  min position  phrases   logprobs  addresses
"""

from __future__ import annotations

import torch

WORDS = 32

# 32-bit words
FLAGS = 0
TEMPERATURE = 1  # float32
SEED_LOW = 2
SEED_HIGH = 3
TOP_K = 4  # 0: off
LOWEST = 5  # float32: log(min_p), -inf: off
REPETITION = 8  # float32
FREQUENCY = 9  # float32
PRESENCE = 10  # float32
MIN_POSITION = 11  # below it the end tokens are forbidden
NUM_PHRASES = 12
PHRASE_WIDTH = 13  # the length of the longest phrase
OUTPUT_START = 14  # the position of the first generated token
NUM_BEST = 15  # best log-probabilities requested; -1: no log-probabilities

# 64-bit words
TOP_P = 3  # float64, 1: off
# addresses of device arrays, 0: none
MASK = 8  # int32 [V / 32]: bits of the tokens that are always forbidden
END_MASK = 9  # int32 [V / 32]: bits of the tokens that are forbidden before MIN_POSITION
BIAS = 10  # float32 [V]
COUNTS = 11  # int32 [V]: times generated, + 2**30 for a token of the prompt
HISTORY = 12  # int32 [max position]: token ids by position, for phrases
PHRASES = 13  # int32 [NUM_PHRASES, 1 + PHRASE_WIDTH]: length, then the ids
GRAMMAR = 14  # int32 [V / 32]: bits of the tokens that the grammar forbids now, rewritten for each token

# flags
EDITS = 1
TRUNCATES = 2
KEEPS_PROCESSED = 4  # its processed logits are reported

IN_PROMPT = 1 << 30


def empty_table(num_slots: int, device: torch.device) -> torch.Tensor:
    """A table of slots that are greedy, without edits and reports."""
    table: torch.Tensor = torch.zeros(num_slots, WORDS, dtype=torch.int32, device=device)
    table[:, NUM_BEST] = -1
    return table
