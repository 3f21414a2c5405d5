"""Operations with a gradient: the engine's kernel forwards, a formula backwards.

# T tokens, H hidden size, K in, N out, V vocabulary
Each takes tensors that may have a gradient; the kernels see them without, in the dtype that the engine has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd import Function

from sempre.kernels.activation import Activation
from sempre.kernels.embedding import embed
from sempre.kernels.norms import add_rms_norm, rms_norm
from sempre.workers.layers.linear_kernel import LinearWeight
from sempre.workers.trainer.formulas import and_mul_backward, rms_norm_backward


@dataclass(frozen=True)
class TrainedWeight:
    """A weight of a linear layer as the engine has it, and the tensors that it was made of."""

    packed: LinearWeight
    values: torch.Tensor
    """float32 [N, K], the values that the engine has, with a gradient"""
    bias: torch.Tensor | None
    """float32 [N]"""
    input_dtype: torch.dtype
    """what the kernel rounds its inputs to"""

    @property
    def in_features(self) -> int:
        return self.packed.in_features

    @property
    def out_features(self) -> int:
        return self.packed.out_features

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def scheme(self) -> None:
        """Floats."""

    @property
    def leaves(self) -> int:
        return self.packed.leaves


def applied(function: type[Function], *values: object) -> object:
    """`function.apply(*values)`, which torch leaves without types."""
    return function.apply(*values)  # type: ignore[no-untyped-call]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values rounded to a dtype, still as float32; the gradient passes unchanged."""
    return values if dtype is torch.float32 else cast(torch.Tensor, applied(_Rounded, values, dtype))


def linear(
    x: torch.Tensor,
    weight: TrainedWeight,
    kernel: Callable[[torch.Tensor, LinearWeight, torch.Tensor], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [T, K] → [T, N] of this dtype, by the engine's kernel."""
    return cast(torch.Tensor, applied(_Linear, x, weight.values, weight.bias, weight, kernel, dtype))


def and_mul(rows: torch.Tensor, activation: Activation) -> torch.Tensor:
    """rows [T, 2 I] → [T, I]"""
    return cast(torch.Tensor, applied(_AndMul, rows, activation))


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H], weight [H] → [T, H]"""
    return cast(torch.Tensor, applied(_Norm, x, weight, eps))


def norm_of_sum(branch: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `branch` to `residual` [T, H] in place; the norm of the sum."""
    return cast(tuple[torch.Tensor, torch.Tensor], applied(_NormOfSum, branch, residual, weight, eps))[1]


def embedded(
    token_ids: torch.Tensor, table: torch.Tensor, stored: torch.dtype, activations: torch.dtype
) -> torch.Tensor:
    """token_ids int64 [T], float32 table [V, H], which the engine has in the dtype `stored` → [T, H]"""
    return cast(torch.Tensor, applied(_Embedded, token_ids, table, stored, activations))


class _Rounded(Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return values.to(dtype).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        weight: TrainedWeight,
        kernel: Callable[[torch.Tensor, LinearWeight, torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, values)
        ctx.input_dtype = weight.input_dtype
        out = torch.empty((x.shape[0], weight.out_features), dtype=dtype, device=x.device)
        return kernel(x.contiguous(), weight.packed, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, values = ctx.saved_tensors
        grad = grads[0].float()
        needs_x, needs_values, needs_bias = ctx.needs_input_grad[:3]
        of_x = (grad @ values).to(x.dtype) if needs_x else None
        of_values = grad.mT @ x.to(ctx.input_dtype).float() if needs_values else None
        return of_x, of_values, grad.sum(0) if needs_bias else None, None, None, None


class _AndMul(Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.activation = activation
        out = torch.empty((rows.shape[0], rows.shape[1] // 2), dtype=rows.dtype, device=rows.device)
        return activation.and_mul(rows, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (rows,) = ctx.saved_tensors
        return and_mul_backward(ctx.activation, grads[0].float(), rows.float()).to(rows.dtype), None


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        # a copy: the residual stream goes on in place
        ctx.save_for_backward(x.clone(), weight)
        ctx.eps = eps
        return rms_norm(x, weight.to(x.dtype), eps, torch.empty_like(x))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight = ctx.saved_tensors
        of_x, of_weight = rms_norm_backward(grads[0].float(), x.float(), weight, ctx.eps)
        return of_x.to(x.dtype), of_weight, None


class _NormOfSum(Function):
    @staticmethod
    def forward(
        ctx: Any, branch: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = add_rms_norm(branch, residual, weight.to(residual.dtype), eps, torch.empty_like(residual))
        ctx.mark_dirty(residual)
        ctx.save_for_backward(residual.clone(), weight)
        ctx.eps = eps
        return residual, normed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        total, weight = ctx.saved_tensors
        of_total, of_weight = rms_norm_backward(grads[1].float(), total.float(), weight, ctx.eps)
        of_total = grads[0] + of_total.to(total.dtype)
        return of_total, of_total, of_weight, None


class _Embedded(Function):
    @staticmethod
    def forward(
        ctx: Any, token_ids: torch.Tensor, table: torch.Tensor, stored: torch.dtype, activations: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(token_ids)
        ctx.shape = table.shape
        out = torch.empty((token_ids.shape[0], table.shape[1]), dtype=activations, device=table.device)
        return embed(token_ids, table.to(stored), out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (token_ids,) = ctx.saved_tensors
        grad = grads[0].float()
        return None, grad.new_zeros(ctx.shape).index_add_(0, token_ids, grad), None, None
