"""Pools prompts: what is returned of the final hidden states, instead of sampled tokens.

# R requests in the step, P requests whose last token it computes, H hidden size, N scores, V a result's elements

Each kind of pooling is a sum over some of a prompt's rows, in the order of positions (`kernels.pooling`), divided by
their number: the last row, the first one, or all. The sum of a prompt in chunks is kept by slot; a preempted request
begins again, as its first chunk starts from 0. What follows, on the host, is exact up to one rounding per element:
no order of additions can be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal

import numpy as np
import numpy.typing as npt
import torch
from msgspec.structs import replace

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import PoolingSpec, SampledTokens
from sempre.kernels.pooling import RowSpans, add_rows
from sempre.workers.input_batch import StepPlan
from sempre.workers.models.base import CausalLM
from sempre.workers.models.pooling import Pooling, ScoreHead
from sempre.workers.sampling import RowError

Floats = npt.NDArray[np.float64]

# a norm below counts as this one, as in sentence-transformers
_LEAST_NORM = 1e-12
# digits of exponentials, beyond those of a float64
_CONTEXT = Context(prec=25)


class Pooler:
    """The sums of one runner's requests, by slot, and what is made of them."""

    def __init__(
        self,
        model: CausalLM,
        activations: torch.dtype,
        *,
        num_slots: int,
        max_num_seqs: int,
        rank: int,
        upload: Callable[[torch.Tensor], torch.Tensor] = lambda values: values,
    ) -> None:
        """`upload` copies what is computed on the host to the device."""
        pooling = model.spec.pooling
        assert pooling is not None, "only models that pool have a pooler"
        self.pooling: Pooling = pooling
        self._model = model
        self._activations = activations
        self._rank = rank
        self._upload = upload
        self._sums_NH = torch.zeros(num_slots, model.spec.hidden_size, dtype=torch.float64, device=model.device)
        # tokens of each slot's prompt that are in its sum
        self._done: npt.NDArray[np.int64] = np.zeros(num_slots, np.int64)
        width = 0 if model.score is None else model.score.out_features
        self._scores_RN = torch.empty(max_num_seqs, width, dtype=torch.float32, device=model.device)

    @property
    def num_slots(self) -> int:
        return len(self._done)

    def grow_slots(self, num_slots: int) -> None:
        """Make room for more known requests."""
        sums, done = self._sums_NH, self._done
        self._sums_NH = torch.zeros(num_slots, sums.shape[1], dtype=torch.float64, device=sums.device)
        self._sums_NH[: len(sums)] = sums
        self._done = np.concatenate([done, np.zeros(num_slots - len(done), np.int64)])

    def pool(self, plan: StepPlan, hidden: torch.Tensor) -> torch.Tensor | None:
        """Add the step's rows, and return what the requests whose last token it computes have: float32 [P, V].

        `hidden` has all rows of the step [T, H], or only those of the last tokens. None for P = 0.
        """
        done = np.flatnonzero(plan.samples)
        arrays = [*self._spans(plan), plan.slots[done], plan.context[done]]
        # together, in one copy
        uploaded = self._upload(torch.from_numpy(np.concatenate(arrays)))
        *spans, slots, counts = torch.split(uploaded, [array.size for array in arrays])
        add_rows(hidden, RowSpans(*spans), self._sums_NH)
        if not done.size:
            return None
        pooled_PH = self._sums_NH.index_select(0, slots)
        if self.pooling.kind == "MEAN":
            pooled_PH = pooled_PH / counts[:, None].to(torch.float64)
        if self._model.score is None:
            return pooled_PH.to(torch.float32)
        rows_PH = pooled_PH.to(self._activations)
        return self._model.scores(rows_PH, self._scores_RN[: len(done)])

    def results(self, plan: StepPlan, values_PV: torch.Tensor | None) -> dict[str, SampledTokens]:
        """The results of the requests that are done, by id, from what `pool` returned, on the host."""
        if values_PV is None:
            return {}
        results = {}
        for index, row in zip(np.flatnonzero(plan.samples).tolist(), values_PV.numpy(), strict=True):
            state = plan.states[index]
            result = SampledTokens(request_id=state.request_id)
            if np.isfinite(row).all():
                assert state.pooling is not None, "every request of a model that pools is pooled"
                values = finished(row.astype(np.float64), state.pooling, self.pooling.head)
                result = replace(result, pooled=values.astype("<f4").tobytes())
            else:
                error = RowError("pooling", "the final hidden states contain NaN or infinity").info()
                result = replace(result, error=replace(error, rank=self._rank))
            results[state.request_id] = result
        return results

    def _spans(self, plan: StepPlan) -> tuple[npt.NDArray[np.int64], ...]:
        """First row, end, slot and whether the sum begins, of each request: see `RowSpans`."""
        begins = (plan.computed == 0).astype(np.int64)
        if self.pooling.kind == "LAST":
            # a sum of one row: nothing of the earlier chunks counts
            end = np.where(plan.samples, plan.ends, 0) if plan.reads_all_rows else np.cumsum(plan.samples)
            first = end - plan.samples
            return first.astype(np.int64), end.astype(np.int64), plan.slots, np.ones_like(begins)
        expected = np.where(begins == 1, 0, self._done[plan.slots])
        if (wrong := np.flatnonzero(plan.computed != expected)).size:
            index = int(wrong[0])
            raise MessageMalformed(
                f"ExecuteStep: scheduled request {plan.scheduled[index].request_id!r}: num_computed_tokens: expected 0"
                f" or {expected[index]}, as every token of its prompt is pooled, found {plan.computed[index]}.",
                field="scheduled.num_computed_tokens",
            )
        self._done[plan.slots] = plan.context
        end = plan.ends if self.pooling.kind == "MEAN" else plan.first_rows + begins
        return plan.first_rows, end, plan.slots, begins


def finished(values: Floats, spec: PoolingSpec, head: ScoreHead | None) -> Floats:
    """One row as the request wants it: cut and of norm 1, or probabilities."""
    if head is None:
        wanted = values[: spec.dimensions]
        return wanted / max(_norm(wanted), _LEAST_NORM) if spec.use_activation else wanted
    if head.tokens is not None:
        values = values[1:] - values[:1]
    if not spec.use_activation or head.activation == "none":
        return values
    if head.activation == "softmax":
        return np.asarray(softmax(values.tolist()))
    return np.asarray([softmax([0.0, value])[1] for value in values.tolist()])


def _norm(values: Floats) -> float:
    """Squares of float32 are exact in float64, and `fsum` rounds once."""
    return math.sqrt(math.fsum((values * values).tolist()))


def softmax(values: Sequence[float]) -> list[float]:
    """Exponentials are rounded correctly, as is their sum: the same on every machine, whatever its math library."""
    most = Decimal(max(values))
    masses = [float(_CONTEXT.exp(_CONTEXT.subtract(Decimal(value), most))) for value in values]
    total = math.fsum(masses)
    return [mass / total for mass in masses]
