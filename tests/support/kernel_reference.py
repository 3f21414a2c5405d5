"""Float64 versions of every operation, written for clarity: what tests of accuracy compare with.

# T tokens, K in, N out, H width, I intermediate, Hq query heads, Hkv key heads, D head dim
"""

from __future__ import annotations

import torch

from sempre.kernels.attention import ScoreParams


def linear(x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    out = x_TK.double() @ weight_NK.double().T
    return out if bias_N is None else out + bias_N.double()


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    x = x_TH.double()
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight_H.double()


def silu_and_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2I.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def clamped_and_mul(gate_up_T2I: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up_T2I.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def rope(x_THD: torch.Tensor, positions_T: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, D] by positions times `frequencies` [D/2]."""
    angles = positions_T.double()[:, None, None] * frequencies.double()
    cos, sin = torch.cos(angles), torch.sin(angles)
    low, high = x_THD.double().chunk(2, dim=-1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attention(
    q_THD: torch.Tensor,
    k_SHD: torch.Tensor,
    v_SHD: torch.Tensor,
    positions_T: torch.Tensor,
    params: ScoreParams,
) -> torch.Tensor:
    """Queries at `positions` over keys 0…S-1 of one sequence; [T, Hq, D]."""
    group = q_THD.shape[1] // k_SHD.shape[1]
    k = k_SHD.double().repeat_interleave(group, dim=1)
    v = v_SHD.double().repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k) * params.scale
    if params.soft_cap is not None:
        scores = params.soft_cap * torch.tanh(scores / params.soft_cap)
    keys = torch.arange(k.shape[0], dtype=torch.int64, device=k.device)
    seen = keys[None, :] <= positions_T[:, None]
    if params.window is not None:
        seen &= keys[None, :] > positions_T[:, None] - params.window
    scores = scores.masked_fill(~seen, float("-inf"))
    if params.sinks is not None:
        beside = params.sinks.double().to(scores.device)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, beside], dim=-1)
    return torch.einsum("hts,shd->thd", torch.softmax(scores, dim=-1)[..., : k.shape[0]], v)
