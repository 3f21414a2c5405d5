"""The ordinary matmul of the library, which does not keep the guarantee.

It exists so that invariance tests can show that they are able to fail.
"""

from __future__ import annotations

import torch

from sempre.kernels.fp8 import Fp8Scheme, quantize_rows
from sempre.kernels.linear.weights import ControlLinearWeight

MOST_PARTS = 4


def control_pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> ControlLinearWeight:
    if weight.is_cuda:
        return ControlLinearWeight(weight, bias)
    return ControlLinearWeight(weight.float(), bias.float() if bias is not None else None)


def control_pack_fp8(
    weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scheme: Fp8Scheme
) -> ControlLinearWeight:
    return ControlLinearWeight(weight.float() * scale[:, None], bias.float() if bias is not None else None, scheme)


def control_linear(x: torch.Tensor, w: ControlLinearWeight, out: torch.Tensor) -> torch.Tensor:
    """Like `linear`, by the library; on a CPU with K in a number of parts that depends on the number of rows.

    The libraries of many processors do this, each at different shapes; here it always happens.
    """
    if w.scheme is Fp8Scheme.WEIGHTS_AND_ACTIVATIONS:
        values, scales = quantize_rows(x)
        x = values.float() * scales[:, None]
    x = x.to(w.weight.dtype)
    if x.is_cuda:
        out.copy_(torch.nn.functional.linear(x, w.weight, w.bias))
        return out
    parts = 1 + x.shape[0] % MOST_PARTS
    terms = [torch.mm(a, b.t()) for a, b in zip(x.chunk(parts, 1), w.weight.chunk(parts, 1), strict=True)]
    out.copy_(sum(terms[1:], terms[0]) if w.bias is None else sum(terms, w.bias))
    return out
