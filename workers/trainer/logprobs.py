"""Log-probabilities of tokens from final hidden states, with a gradient.

# R rows, H hidden size, V vocabulary
Logits exist for some rows at a time, and are computed again for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch.autograd import Function

from sempre.ipc.errors import ModelError
from sempre.kernels import sampling
from sempre.workers.models.base import CausalLM
from sempre.workers.tensor_source import CPU
from sempre.workers.trainer.formulas import logprobs_backward
from sempre.workers.trainer.operations import TrainedWeight, applied
from sempre.workers.trainer.tree import logit_slope

# rows of logits at a time: bounds the memory, does not affect the result
_ROWS = 64


def target_logprobs(model: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [R] of hidden [R, H] and token ids int64 [R]. Raises ModelError for a row without a distribution."""
    weight = model.lm_head.weight
    assert isinstance(weight, TrainedWeight)
    return cast(torch.Tensor, applied(_TargetLogprobs, hidden, weight.values, weight.bias, targets, model))


class _TargetLogprobs(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        model: CausalLM,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, values, targets)
        ctx.model = model
        found = np.empty(len(targets), np.float32)
        for rows in _pieces(len(targets)):
            # the sampler's kernel of the CPU, whose sums are of integers: a GPU's has the same bits
            logits = _logits(model, hidden[rows]).to(CPU)
            every = np.arange(len(logits), dtype=np.int64)
            logprobs = sampling.logprobs(logits, every, targets[rows].cpu().numpy(), 0)
            if not logprobs.valid.all():
                raise ModelError(f"log-probabilities: row {rows.start + int(logprobs.valid.argmin())} has NaN or +inf.")
            found[rows] = logprobs.logprobs[:, 0]
        return torch.from_numpy(found).to(hidden.device)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, values, targets = ctx.saved_tensors
        model, grad = ctx.model, grads[0]
        input_dtype = model.lm_head.weight.input_dtype
        of_hidden, of_values = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(values)
        of_bias = torch.zeros_like(values[:, 0]) if ctx.needs_input_grad[2] else None
        for rows in _pieces(len(targets)):
            logits = _logits(model, hidden[rows])
            of_logits = logprobs_backward(grad[rows], logits, targets[rows]) * logit_slope(model, logits)
            of_hidden[rows] = of_logits @ values
            of_values += of_logits.mT @ hidden[rows].to(input_dtype).float()
            if of_bias is not None:
                of_bias += of_logits.sum(0)
        return of_hidden.to(hidden.dtype), of_values, of_bias, None, None


def _logits(model: CausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [R, V]"""
    row = torch.empty((1, model.spec.vocab_size), dtype=torch.float32, device=hidden.device)
    return model.logits(hidden, row.expand(len(hidden), -1))


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS))
