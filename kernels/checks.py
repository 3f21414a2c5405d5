"""Refuses tensors that a kernel, which reads and writes through raw addresses, would misread."""

from __future__ import annotations

from typing import NoReturn

import torch

FLOAT32 = torch.float32


def check_rows(operation: str, x: torch.Tensor, out: torch.Tensor) -> None:
    """Both contiguous and on one device; float32 on the CPU. ValueError or TypeError otherwise.

    Called for every kernel of a step: the common case is as cheap as Python allows.
    """
    if not (x.is_contiguous() and out.is_contiguous()):
        _refuse(operation, x, out)
    if x.is_cuda:
        if not out.is_cuda:
            _refuse(operation, x, out)
    elif not (x.is_cpu and out.is_cpu and x.dtype is FLOAT32 and out.dtype is FLOAT32):
        _refuse(operation, x, out)


def _refuse(operation: str, x: torch.Tensor, out: torch.Tensor) -> NoReturn:
    found = " and ".join(
        f"{t.dtype} {list(t.shape)} on {t.device}, strides {t.stride()}" for t in (x, out)
    )  # fmt: skip
    raise ValueError(
        f"{operation}: expected contiguous tensors on one device, float32 on the CPU, found {found}"
    )  # fmt: skip


def check_index(operation: str, name: str, array: torch.Tensor, dtype: torch.dtype) -> None:
    """A contiguous array of numbers of `dtype`. ValueError otherwise."""
    if array.dtype is not dtype or not array.is_contiguous():
        raise ValueError(
            f"{operation}: expected {name} as contiguous {dtype}, found {array.dtype} {list(array.shape)},"
            f" strides {array.stride()}"
        )
