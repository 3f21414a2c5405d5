"""What a step of the model reads: the contract between runners and models.

# T tokens in the step, R requests, S rows that are read
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sempre.kernels.attention import PagedBatch


@dataclass(frozen=True)
class OutputRows:
    """The rows whose final hidden states are wanted: S of a step's T, the last ones of each request, in order."""

    rows: torch.Tensor
    """int64 [S]"""
    starts: torch.Tensor
    """int32 [R + 1]: entries [starts[r], starts[r + 1]) belong to request r, which may have none"""
    max_per_request: int


@dataclass(frozen=True)
class StepInput:
    """The arrays of one step; rows of one request are neighbours, requests in the order of the step."""

    token_ids: torch.Tensor
    """int64 [T]"""
    positions: torch.Tensor
    """int64 [T], absolute in the sequence"""
    slot_mapping: torch.Tensor
    """int64 [T]: block id * block_size + offset, where the token's keys and values are written"""
    batch: PagedBatch
    """the requests"""
    outputs: OutputRows | None = None
    """None: all rows"""
