"""The inputs of a decode step on the GPU."""

from __future__ import annotations

import pytest
import torch
from decode_input_cases import check_decode_inputs, check_next_draft_rows, check_record_tokens

pytestmark = pytest.mark.gpu


def test_decode_inputs() -> None:
    check_decode_inputs(torch.device("cuda"))


def test_next_draft_rows() -> None:
    check_next_draft_rows(torch.device("cuda"))


def test_record_tokens() -> None:
    check_record_tokens(torch.device("cuda"))
