"""The inputs of a decode step in Triton's interpreter."""

from __future__ import annotations

import torch
from decode_input_cases import check_decode_inputs, check_next_draft_rows, check_record_tokens

CPU = torch.device("cpu")


def test_decode_inputs() -> None:
    check_decode_inputs(CPU)


def test_next_draft_rows() -> None:
    check_next_draft_rows(CPU)


def test_record_tokens() -> None:
    check_record_tokens(CPU)
