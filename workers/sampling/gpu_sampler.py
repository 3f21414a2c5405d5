"""Sampling on a GPU: the steps of `Sampler`, in the same order and with the same bits, without waiting for the device.

    admit(slot, state)   once per request        parameters and per-request tensors go to the device
    prepare(slots)       each step, on the host  which slots the rows belong to; which stages the step needs
    sample(...)          each step, capturable   token ids on the device; counts and history are updated there
    start_copy(...)      each step, on the host  results start copying to pinned memory
    collect(pending)     a step or more later    waits for them

Every call enqueues on the current stream, so that a later step may be launched before an earlier one is collected.
"""

# R rows, V vocabulary, N slots

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sempre.ipc.messages import LogprobRows
from sempre.kernels import sampling as cpu
from sempre.kernels.sampling import RAW_LOGPROBS, Reports, gpu, gpu_table
from sempre.kernels.sampling.coefficients import log32
from sempre.kernels.sampling.gpu import MAX_BEST, TILES, DraftedRows, SamplingBuffers, Stages, Tiles
from sempre.kernels.sampling.gpu_noise import BAD_LOGITS, HEAD
from sempre.workers.sampling.per_request_tensors import PerRequestTensors
from sempre.workers.sampling.row_error import NoDistribution, RowError
from sempre.workers.sampling.sampler import (
    Candidates,
    RowResult,
    check_valid,
    pack_logprobs,
    packed_candidates,
    row_error,
    with_listed,
)
from sempre.workers.sampling.state import SamplingState

# log-probabilities are compiled and captured for these numbers of best tokens only
_WIDTHS = (0, 5, MAX_BEST)
_SMALLEST_NORMAL = np.float32(2.0**-126)
PLAIN = Stages(edits=False, truncates=False, num_best=-1)

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class PendingSample:
    """One step's results being copied to the host."""

    states: list[SamplingState | None]
    report: torch.Tensor
    """pinned int32: heads [R, HEAD], then the best [R, MAX_BEST, 2] if any row reports"""
    errors: dict[int, RowError]
    """rows that could not be prepared"""
    wide_rows: list[int]
    """rows that need log-probabilities the kernels do not report"""
    wide_logits: torch.Tensor | None
    """pinned float32 [len(wide_rows), V]"""
    event: torch.cuda.Event | None
    """None: the copy is done"""

    def done(self) -> bool:
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call, unused-ignore]


class GpuSampler:
    """The sampler of one replica; constructs its scratch memory, about max_num_seqs * V * 4 bytes, at once."""

    def __init__(
        self,
        *,
        device: torch.device,
        vocab_size: int,
        max_num_seqs: int,
        num_slots: int,
        tiles: Tiles = TILES,
        reports: Reports = RAW_LOGPROBS,
    ) -> None:
        self._device = device
        self._vocab_size = vocab_size
        self._reports = reports
        self._buffers = SamplingBuffers(device, vocab_size, max_num_seqs, tiles, reports)
        self._row_slots = torch.full((max_num_seqs,), -1, dtype=torch.int32, device=device)
        self._host_row_slots: list[int] = []
        self._tensors: dict[int, PerRequestTensors] = {}
        self._stages: dict[int, Stages] = {}
        self._with_grammar: dict[int, SamplingState] = {}
        self._unprepared: dict[int, RowError] = {}
        self._set_table(gpu_table.empty_table(num_slots, torch.device("cpu")))

    @property
    def token_ids(self) -> torch.Tensor:
        """int64 [max_num_seqs] on the device: the tokens of the last step, at a fixed address."""
        return self._buffers.token_ids

    @property
    def head(self) -> torch.Tensor:
        """int32 [max_num_seqs, HEAD] on the device: token, flags, … of the last step, at a fixed address."""
        return self._buffers.head

    @property
    def row_slots(self) -> torch.Tensor:
        """int32 [max_num_seqs] on the device: the slots last prepared, at a fixed address."""
        return self._row_slots

    def grow_slots(self, num_slots: int) -> bool:
        """Make room for more slots. True: the table has moved, and graphs must be captured again."""
        old = self._host_table
        if num_slots <= old.shape[0]:
            return False
        table = gpu_table.empty_table(num_slots, torch.device("cpu"))
        table[: old.shape[0]] = old
        self._set_table(table)
        return True

    @np.errstate(all="ignore")
    def admit(self, slot: int, state: SamplingState) -> None:
        """Add a new or resumed request, whose known tokens are all in the state.

        Raises RowError, for this request alone, when its parameters do not fit the vocabulary or the device has no
        memory for them.
        """
        self.release(slot)
        try:
            tensors = PerRequestTensors.of(state, self._vocab_size, self._device)
        except torch.OutOfMemoryError as error:
            raise RowError(
                "sampling",
                "the device has no memory left for the request's penalties, bias or masks; lower the number of "
                "concurrent requests that use them, or the memory given to the KV cache",
            ) from error
        self._tensors[slot] = tensors
        if state.grammar is not None:
            self._with_grammar[slot] = state
        row = self._host_table[slot]
        row.copy_(torch.from_numpy(_table_row(state, tensors, self._vocab_size)))
        flags, num_best = int(row[gpu_table.FLAGS]), int(row[gpu_table.NUM_BEST])
        if self._reports.processed and state.params.logprobs is not None:
            # also for log-probabilities that are computed on the host, from the processed logits
            row[gpu_table.FLAGS], num_best = flags | gpu_table.KEEPS_PROCESSED, max(num_best, 0)
        self._stages[slot] = Stages(
            edits=bool(flags & gpu_table.EDITS), truncates=bool(flags & gpu_table.TRUNCATES), num_best=num_best
        )
        self._table_is_stale = True

    def release(self, slot: int) -> None:
        """Forget a request and free what it used."""
        self._tensors.pop(slot, None)
        self._stages.pop(slot, None)
        self._with_grammar.pop(slot, None)

    def revise(self, slot: int, position: int, old: Sequence[int], new: Sequence[int]) -> None:
        """Replace a slot's tokens from `position` on, which were generated, by `new` instead of `old`."""
        tensors = self._tensors[slot].tensors
        counts, history = tensors.get(gpu_table.COUNTS), tensors.get(gpu_table.HISTORY)
        if counts is not None:
            changes = Counter(new)
            changes.subtract(old)
            changed = {token: change for token, change in changes.items() if change}
            if changed:
                tokens, numbers = (
                    torch.tensor([*part], dtype=torch.int64, device="cpu")
                    for part in (changed.keys(), changed.values())
                )
                counts.index_add_(0, self._send(tokens), self._send(numbers.int()))
        if history is not None and new:
            history[position : position + len(new)] = self._send(torch.tensor(new, dtype=torch.int32, device="cpu"))

    def prepare(self, slots: Sequence[int]) -> Stages:
        """Set the slot of each row of the next step (-1: none); returns the stages that step needs.

        A request with a grammar samples the token after the last one in its state.
        """
        self._unprepared = self._write_grammar_masks(slots) if self._with_grammar else {}
        if self._table_is_stale:
            self._table.copy_(self._pinned(self._host_table), non_blocking=True)
            self._table_is_stale = False
        if list(slots) != self._host_row_slots:
            self._host_row_slots = list(slots)
            row_slots = torch.tensor(self._host_row_slots, dtype=torch.int32, device="cpu")
            self._row_slots[: len(slots)].copy_(self._pinned(row_slots), non_blocking=True)
        used = [self._stages[slot] for slot in slots if slot >= 0]
        widest = max((stages.num_best for stages in used), default=-1)
        return Stages(
            edits=any(stages.edits for stages in used),
            truncates=any(stages.truncates for stages in used),
            num_best=widest if widest < 0 else min(width for width in _WIDTHS if width >= widest),
        )

    def sample(
        self,
        logits: torch.Tensor,
        positions: torch.Tensor,
        stages: Stages,
        drafts: DraftedRows | None = None,
        row_slots: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sample one token per row of logits (float32 or 16 bit [R, V], not changed): int64 [R] on the device.

        `positions` (int32 or int64 [R], on the device) are the indices of these tokens in their sequences. Launches
        kernels only. The token of a row in error, or of no row, is 0. With `drafts`, a slot may have several rows; the
        accepted tokens are recorded in its history and in `drafts.last_tokens`. `row_slots` (int32 [R], on the device)
        replace the prepared ones and may omit some.
        """
        if row_slots is None:
            row_slots = self._row_slots[: logits.shape[0]]
        return gpu.sample(logits, positions, row_slots, self._table, self._buffers, stages, drafts)

    def start_copy(self, logits: torch.Tensor, stages: Stages, states: Sequence[SamplingState | None]) -> PendingSample:
        """Begin to copy the results of the last `sample(logits, …)`; `states` [R], None for a row that is not
        needed."""
        buffers = self._buffers
        rows = buffers.max_rows if stages.num_best > 0 else len(states)
        size = buffers.report.numel() if stages.num_best > 0 else rows * HEAD
        report = self._to_host(buffers.report[:size])
        wide = [row for row, state in enumerate(states) if state is not None and _is_wide(state, self._vocab_size)]
        wide_logits = None
        if wide:
            reported = buffers.edited if self._reports.processed else logits
            wide_logits = self._to_host(torch.stack([reported[row] for row in wide]).float())
        event = None
        if self._device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call, unused-ignore]
            event.record()
        return PendingSample(list(states), report, self._unprepared, wide, wide_logits, event)

    @np.errstate(all="ignore")
    def collect(self, pending: PendingSample) -> list[RowResult]:
        """Wait for a step's results: one per row, in order; an empty one where no state was given."""
        if pending.event is not None:
            pending.event.synchronize()
        report: Int32 = pending.report.numpy()
        rows, split = len(pending.states), self._buffers.max_rows * HEAD
        head = report[: rows * HEAD].reshape(rows, HEAD)
        best = report[split:].reshape(-1, MAX_BEST, 2)
        no_best = np.empty((1, 0, 2), np.int32)
        results = []
        for row, state in enumerate(pending.states):
            token, flags = int(head[row, 0]), int(head[row, 1])
            if state is None:
                results.append(RowResult(None, None, None))
            elif row in pending.errors:
                results.append(RowResult(None, None, pending.errors[row].info()))
            elif flags:
                value = np.inf if flags == BAD_LOGITS else -np.inf
                results.append(RowResult(None, None, row_error(value).info()))
            elif row in pending.wide_rows:
                results.append(RowResult(token, self._wide_logprobs(pending, row, token), None))
            elif state.params.logprobs is None:
                results.append(RowResult(token, None, None))
            else:
                width = min(state.params.logprobs, self._vocab_size)
                results.append(
                    RowResult(
                        token, _pack(head[row : row + 1], best[row : row + 1, :width] if width else no_best), None
                    )
                )
        return results

    @np.errstate(all="ignore")
    def prompt_logprobs(self, logits: torch.Tensor, token_ids: Sequence[int], num_best: int) -> LogprobRows:
        """Log-probabilities of token_ids[m], the prompt token after row m of logits [M, V]; num_best -1: all.

        Waits for the device. At most max_num_seqs rows. Raises NoDistribution naming the first row that has none.
        """
        rows = logits.shape[0]
        if num_best < 0 or num_best > MAX_BEST:
            targets = np.asarray(token_ids, np.int64)
            logprobs = cpu.logprobs(
                logits.float().cpu(), np.arange(rows, dtype=np.int64), targets, num_best, self._reports
            )
            check_valid(logprobs)
            return pack_logprobs(logprobs, slice(None))
        table = gpu_table.empty_table(1, torch.device("cpu"))
        table[0, gpu_table.NUM_BEST] = num_best
        slots = torch.zeros(rows, dtype=torch.int32, device=self._device)
        targets_on_device = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
        gpu.report_logprobs(logits, targets_on_device, slots, table.to(self._device), self._buffers, num_best)
        head: Int32 = self._buffers.head[:rows].cpu().numpy().copy()
        head[:, 0] = token_ids
        for row in np.flatnonzero(head[:, 2] <= 0).tolist():
            raise NoDistribution(row)
        return _pack(head, self._buffers.best[:rows, :num_best].cpu().numpy())

    def candidate_logprobs(self, logits: torch.Tensor, candidates: Candidates) -> bytes:
        """Log-probabilities of candidates [M, K] in the rows of logits [M, V]; packed float32. Waits for the device."""
        return packed_candidates(logits.float().cpu(), candidates, self._reports)

    def _write_grammar_masks(self, slots: Sequence[int]) -> dict[int, RowError]:
        """Returns errors by row; those rows must not sample."""
        errors: dict[int, RowError] = {}
        for row, slot in enumerate(slots):
            state = self._with_grammar.get(slot)
            if state is None or state.grammar is None:
                continue
            mask = self._tensors[slot].tensors[gpu_table.GRAMMAR]
            forbidden = np.full(mask.shape[0], -1, np.int32)
            try:
                allowed = state.allowed_words(state.grammar, len(state.token_ids))
                forbidden[: allowed.size] = ~allowed
            except RowError as error:
                errors[row] = error
            mask.copy_(self._pinned(torch.from_numpy(forbidden)), non_blocking=True)
        return errors

    def _set_table(self, host_table: torch.Tensor) -> None:
        self._host_table = host_table
        self._table = host_table.to(self._device, copy=True)
        self._table_is_stale = False

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor).to(self._device, non_blocking=True)

    def _pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that the device may read later, whatever happens to `tensor`."""
        return tensor.pin_memory() if self._device.type == "cuda" else tensor.clone()

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        pinned = self._device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned).copy_(
            tensor, non_blocking=pinned
        )

    def _wide_logprobs(self, pending: PendingSample, row: int, token: int) -> LogprobRows:
        state = pending.states[row]
        if state is None or state.params.logprobs is None or pending.wide_logits is None:
            raise AssertionError(f"row {row} reports no log-probabilities")
        index = pending.wide_rows.index(row)
        target = np.asarray([token], np.int64)
        logits, num_best = pending.wide_logits, state.params.logprobs
        logprobs = cpu.logprobs(logits, np.asarray([index], np.int64), target, num_best, self._reports)
        packed = pack_logprobs(logprobs, slice(None))
        return with_listed(packed, logits, index, state.params.logprob_token_ids, self._reports)


def _is_wide(state: SamplingState, vocab_size: int) -> bool:
    number = state.params.logprobs
    if number is None:
        return False
    return number < 0 or min(number, vocab_size) > MAX_BEST or bool(state.params.logprob_token_ids)


def _table_row(state: SamplingState, tensors: PerRequestTensors, vocab_size: int) -> Int32:
    """The request's row of the table, int32 [WORDS]."""
    params = state.params
    row = np.zeros(gpu_table.WORDS, np.int32)
    floats, wide, wide_floats = row.view(np.float32), row.view(np.int64), row.view(np.float64)
    temperature, min_p = np.float32(params.temperature), np.float32(params.min_p)
    truncates = temperature > 0 and (params.top_k > 0 or params.top_p < 1.0 or min_p > 0)
    row[gpu_table.FLAGS] = (gpu_table.TRUNCATES if truncates else 0) | (gpu_table.EDITS if tensors.tensors else 0)
    floats[gpu_table.TEMPERATURE] = temperature
    row.view(np.uint32)[gpu_table.SEED_LOW] = state.seed & 0xFFFFFFFF
    row.view(np.uint32)[gpu_table.SEED_HIGH] = state.seed >> 32
    row[gpu_table.TOP_K] = min(params.top_k, 2**31 - 1)
    lowest = log32(np.maximum(min_p, _SMALLEST_NORMAL, dtype=np.float32)[None])[0] if min_p > 0 else -np.inf
    floats[gpu_table.LOWEST] = lowest
    wide_floats[gpu_table.TOP_P] = params.top_p
    floats[gpu_table.REPETITION] = params.repetition_penalty
    floats[gpu_table.FREQUENCY] = params.frequency_penalty
    floats[gpu_table.PRESENCE] = params.presence_penalty
    row[gpu_table.MIN_POSITION] = min(state.num_prompt_tokens + params.min_tokens, 2**31 - 1)
    row[gpu_table.NUM_PHRASES] = tensors.num_phrases
    row[gpu_table.PHRASE_WIDTH] = tensors.phrase_width
    row[gpu_table.OUTPUT_START] = state.num_prompt_tokens
    by_kernels = params.logprobs is not None and not _is_wide(state, vocab_size)
    row[gpu_table.NUM_BEST] = min(params.logprobs or 0, vocab_size) if by_kernels else -1
    for column, tensor in tensors.tensors.items():
        wide[column] = tensor.data_ptr()
    return row


def _pack(head: Int32, best: Int32) -> LogprobRows:
    """The wire form of heads [M, HEAD] and best [M, k, 2]."""
    ids = np.concatenate([head[:, :1], best[:, :, 0]], axis=1)
    logprobs = np.concatenate([head[:, 3:], best[:, :, 1]], axis=1)
    return LogprobRows(
        num_rows=head.shape[0],
        width=ids.shape[1],
        token_ids=ids.astype("<i4").tobytes(),
        logprobs=logprobs.astype("<i4").tobytes(),
        ranks=head[:, 2].astype("<i4").tobytes(),
    )
