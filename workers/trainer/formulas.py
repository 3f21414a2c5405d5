"""The derivatives of the operations, in the dtype of their arguments.

They are those of exact arithmetic: rounding, which the forward pass does in places, has the derivative 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import one_hot

from sempre.kernels.activation import Activation
from sempre.kernels.attention import ScoreParams

_GELU_SCALE, _GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


class Gradients(NamedTuple):
    """Of queries, keys and values."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def rms_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x / sqrt(mean(x^2) + eps) * weight, x [..., H], weight [H]: the gradients of both."""
    factor = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed, weighted = x * factor, grad * weight
    of_x = factor * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return of_x, (grad * normed).flatten(0, -2).sum(0)


def and_mul_backward(kind: Activation, grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Of `Activation.and_mul`, rows [T, 2 I], grad [T, I]: the gradient of the rows. ValueError for another kind than
    SILU and GELU."""
    gate, up = rows.chunk(2, dim=-1)
    match kind:
        case Activation.SILU:
            sigmoid = torch.sigmoid(gate)
            value, slope = gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
        case Activation.GELU:
            tanh = torch.tanh(_GELU_SCALE * (gate + _GELU_CUBE * gate**3))
            inner = _GELU_SCALE * (1 + 3 * _GELU_CUBE * gate.square())
            value, slope = gate / 2 * (1 + tanh), (1 + tanh) / 2 + gate / 2 * (1 - tanh.square()) * inner
        case _:
            raise ValueError(f"and_mul_backward: no derivative of {kind.value}")
    return torch.cat([grad * up * slope, grad * value], dim=-1)


def rope_backward(grad: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Of the rotation of heads [T, heads, D] by angles [T, D / 2]: the gradient of what was rotated."""
    first, second = grad.chunk(2, dim=-1)
    cosines, sines = cosines[:, None], sines[:, None]
    return torch.cat([first * cosines + second * sines, second * cosines - first * sines], dim=-1)


def attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, params: ScoreParams
) -> Gradients:
    """Of causal attention within one sequence: grad and q [T, Hq, D], k and v [T, Hkv, D]; without sinks."""
    length, num_heads, head_dim = q.shape
    group = num_heads // k.shape[1]
    # [Hkv, group, T, D], and keys and values beside the heads that share them
    queries, grads = (rows.view(length, -1, group, head_dim).permute(1, 2, 0, 3) for rows in (q, grad))
    keys, values = k.transpose(0, 1)[:, None], v.transpose(0, 1)[:, None]
    scores, slope = params.scale * queries @ keys.mT, None
    if params.soft_cap is not None:
        bent = torch.tanh(scores / params.soft_cap)
        scores, slope = params.soft_cap * bent, 1 - bent.square()
    weights = torch.softmax(scores.masked_fill(_unseen(length, params.window, q.device), -math.inf), dim=-1)
    of_weights = grads @ values.mT
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
    if slope is not None:
        of_scores = of_scores * slope
    of_q = params.scale * of_scores @ keys
    of_k = params.scale * (of_scores.mT @ queries).sum(1)
    of_v = (weights.mT @ grads).sum(1)
    return Gradients(of_q.permute(2, 0, 1, 3).reshape(q.shape), of_k.transpose(0, 1), of_v.transpose(0, 1))


def logprobs_backward(grad: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of the log-probabilities of targets [R], grad [R], logits [R, V]: the gradient of the logits."""
    chosen = one_hot(targets, logits.shape[-1]).to(logits.dtype)
    return grad[:, None] * (chosen - torch.softmax(logits, dim=-1))


def _unseen(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [T, T]: which keys a row does not see."""
    rows = torch.arange(length, dtype=torch.int64, device=device)
    ago = rows[:, None] - rows
    return (ago < 0) if window is None else (ago < 0) | (ago >= window)
