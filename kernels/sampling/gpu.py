"""The GPU's sampling kernels, in order: scratch memory, and launches that a CUDA graph can capture.

No call synchronises with the host or allocates. Each slot's parameters are in a device table (`gpu_table.py`);
`row_slots` says which slot each row of logits belongs to, so that one captured sequence serves every batch. Which
stages run is the caller's choice (`Stages`); a row that uses none of a stage has the same bits with it.
"""

# R rows, V vocabulary, N tiles of a row

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sempre.kernels.gpu_jit import CHAINED, EXACT
from sempre.kernels.sampling import (
    RAW_LOGPROBS,
    Reports,
    gpu_estimate,
    gpu_logprobs,
    gpu_noise,
    gpu_penalties,
    gpu_processed,
    gpu_search,
    gpu_truncation,
    gpu_verify,
)
from sempre.kernels.sampling.gpu_verify import DraftedRows

# the most best log-probabilities that the kernels report per row
MAX_BEST = 20


@dataclass(frozen=True)
class Tiles:
    """How the work is divided; none of it affects the result."""

    noise: int = 2048
    """ids per program of the noisy argmax, a multiple of rng.TILE"""
    logprobs: int = 4096
    """ids per program"""
    edits: int = 4096
    """ids per program"""
    phrases: int = 128
    """phrases compared at a time"""
    cut: int = 1024
    """ids per step of the threshold search"""
    cut_piece: int = 8192
    """ids per program of its first pass"""
    cut_sample: int = 128
    """groups of ids that estimate where the threshold is"""
    cut_list: int = 4096
    """tokens in whose list the threshold search ends"""


@dataclass(frozen=True)
class Stages:
    """Which stages a sequence of launches contains."""

    edits: bool
    """masks, bias, penalties"""
    truncates: bool
    """top_k, top_p, min_p"""
    num_best: int
    """best log-probabilities, at most MAX_BEST; -1: no log-probabilities"""


TILES = Tiles()


def _divided_up(number: int, size: int) -> int:
    return -(-number // size)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


class SamplingBuffers:
    """Scratch and results for up to `max_rows` rows; about max_rows * V * 4 bytes of device memory."""

    def __init__(
        self,
        device: torch.device,
        vocab_size: int,
        max_rows: int,
        tiles: Tiles = TILES,
        reports: Reports = RAW_LOGPROBS,
    ) -> None:
        self.reports = reports
        self.vocab_size = vocab_size
        self.max_rows = max_rows
        self.tiles = tiles

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.num_tiles = _divided_up(vocab_size, tiles.noise)
        self.num_logprob_tiles = _divided_up(vocab_size, tiles.logprobs)
        # results
        self.token_ids = empty(torch.int64, max_rows)
        report = empty(torch.int32, max_rows * (gpu_noise.HEAD + 2 * MAX_BEST))
        self.report = report
        """all heads, then all best, in one block for one copy to the host"""
        self.head = report[: max_rows * gpu_noise.HEAD].view(max_rows, gpu_noise.HEAD)
        """int32 [R, HEAD]: token id, flags, rank, bits of the log-probability"""
        self.best = report[max_rows * gpu_noise.HEAD :].view(max_rows, MAX_BEST, 2)
        """int32 [R, MAX_BEST, 2]: id, bits of the log-probability"""
        # scratch
        self.edited = empty(torch.float32, max_rows, vocab_size)
        self.row_errors = empty(torch.int32, max_rows)
        self.tile_values = empty(torch.float32, max_rows * self.num_tiles)
        self.tile_ids = empty(torch.int32, max_rows * self.num_tiles)
        self.cut_keys = empty(torch.int32, max_rows)
        self.cut_ids = empty(torch.int32, max_rows)
        self.group_maxima = empty(torch.float32, max_rows * _divided_up(vocab_size, gpu_estimate.GROUP))
        self.row_maxima = empty(torch.float32, max_rows)
        self.cut_pivots = empty(torch.int32, max_rows, gpu_search.PIVOTS)
        self.cut_sums = empty(torch.int64, max_rows, 2 * gpu_search.PIVOTS)
        self.list_keys = empty(torch.int32, max_rows, tiles.cut_list)
        self.list_counters = empty(torch.int32, max_rows)
        self.tile_maxima = empty(torch.float32, max_rows * self.num_logprob_tiles)
        self.tile_best = empty(torch.int64, max_rows * self.num_logprob_tiles * MAX_BEST)
        self.totals = empty(torch.int64, max_rows)
        self.ranks = empty(torch.int32, max_rows)

    def check(self, logits: torch.Tensor) -> None:
        """Raises ValueError unless logits are contiguous [R <= max_rows, V]."""
        if (
            logits.dim() != 2
            or logits.shape[1] != self.vocab_size
            or not 0 < logits.shape[0] <= self.max_rows
            or not logits.is_contiguous()
        ):
            raise ValueError(
                f"logits: expected a contiguous tensor [1 … {self.max_rows} rows, {self.vocab_size}], "
                f"found {list(logits.shape)}, strides {logits.stride()}"
            )


def sample(
    logits: torch.Tensor,
    positions: torch.Tensor,
    row_slots: torch.Tensor,
    table: torch.Tensor,
    buffers: SamplingBuffers,
    stages: Stages,
    drafts: DraftedRows | None = None,
) -> torch.Tensor:
    """Sample one token per row of logits (float32 or 16 bit [R, V], not changed): int64 [R], a view of the buffers.

    With `drafts`, a slot may have several rows, and only the accepted tokens are added to its counts and history.

    positions (int32 or int64 [R]) are the indices of the sampled tokens in their sequences, row_slots (int32 [R]) point
    into table (int32 [slots, gpu_table.WORDS]); -1 marks an unused row. Heads and, for the rows that request them,
    log-probabilities are in the buffers. Raises ValueError for logits of another shape.
    """
    buffers.check(logits)
    batch = _Batch(logits, positions, row_slots, table)
    if stages.edits:
        _edit(batch, buffers, drafts)
    if stages.truncates:
        _find_cuts(batch, buffers, stages.edits)
    _choose(batch, buffers, stages, advances=stages.edits and drafts is None)
    num_rows = logits.shape[0]
    if drafts is not None:
        gpu_verify.keep_tokens[(num_rows,)](
            row_slots,
            *drafts[:2],
            positions,
            batch.addresses,
            buffers.token_ids,
            buffers.head,
            drafts.last_tokens,
            num_rows,
            EDITS=stages.edits,
            num_warps=1,
            **EXACT,
        )
    if stages.num_best >= 0:
        reported = _processed(batch, buffers, stages) if buffers.reports.processed else logits
        report_logprobs(reported, buffers.token_ids, row_slots, table, buffers, stages.num_best)
    return buffers.token_ids[:num_rows]


class _Batch(NamedTuple):
    """The arguments of `sample`."""

    logits: torch.Tensor
    positions: torch.Tensor
    row_slots: torch.Tensor
    table: torch.Tensor

    @property
    def addresses(self) -> torch.Tensor:
        return self.table.view(torch.int64)


def _edit(batch: _Batch, b: SamplingBuffers, drafts: DraftedRows | None) -> None:
    """Masks, bias, penalties."""
    rows, vocabulary = batch.logits.shape
    slots = (batch.row_slots, batch.positions, batch.table, batch.addresses)
    # not read without drafts
    drafted = (b.row_errors, b.token_ids) if drafts is None else drafts[:2]
    gpu_penalties.edit[(_divided_up(vocabulary, b.tiles.edits), rows)](
        batch.logits,
        b.edited,
        *slots,
        b.row_errors,
        *drafted,
        vocabulary,
        BLOCK=b.tiles.edits,
        VERIFIES=drafts is not None,
        num_warps=8,
        **EXACT,
    )
    gpu_penalties.forbid_phrases[(rows,)](
        b.edited,
        *slots,
        *drafted,
        vocabulary,
        BLOCK=b.tiles.phrases,
        VERIFIES=drafts is not None,
        num_warps=4,
        **EXACT,
    )


def _choose(batch: _Batch, b: SamplingBuffers, stages: Stages, *, advances: bool) -> None:
    """The largest noisy logit of each row; `advances`: its token is added to the slot's counts and history at once."""
    rows, vocabulary = batch.logits.shape
    gpu_noise.best_of_tiles[(b.num_tiles, rows)](
        batch.logits,
        b.edited,
        batch.row_slots,
        batch.positions,
        batch.table,
        b.cut_keys,
        b.cut_ids,
        b.tile_values,
        b.tile_ids,
        vocabulary,
        EDITS=stages.edits,
        TRUNCATES=stages.truncates,
        BLOCK=b.tiles.noise,
        num_warps=4,
        **CHAINED,
    )
    gpu_noise.publish[(rows,)](
        batch.row_slots,
        batch.positions,
        batch.table,
        batch.addresses,
        b.row_errors,
        b.tile_values,
        b.tile_ids,
        b.token_ids,
        b.head,
        b.num_tiles,
        EDITS=stages.edits,
        ADVANCES=advances,
        TILES=_power_of_2(b.num_tiles),
        num_warps=4,
        **CHAINED,
    )


def _processed(batch: _Batch, b: SamplingBuffers, stages: Stages) -> torch.Tensor:
    """The logits that the tokens were drawn from, without the noise: float32 [R, V], of the rows that report them."""
    rows, vocabulary = batch.logits.shape
    gpu_processed.keep_processed[(_divided_up(vocabulary, b.tiles.edits), rows)](
        batch.logits,
        b.edited,
        batch.row_slots,
        batch.table,
        b.cut_keys,
        b.cut_ids,
        vocabulary,
        EDITS=stages.edits,
        TRUNCATES=stages.truncates,
        BLOCK=b.tiles.edits,
        num_warps=8,
        **EXACT,
    )
    return b.edited[:rows]


def _find_cuts(batch: _Batch, b: SamplingBuffers, edits: bool) -> None:
    """Thresholds of top_k, top_p and min_p."""
    rows, vocabulary = batch.logits.shape
    tiles = b.tiles
    source = (batch.logits, b.edited, batch.row_slots, batch.table, batch.addresses)
    search = (b.row_maxima, b.cut_pivots, b.cut_sums)
    pieces = (_divided_up(vocabulary, tiles.cut_piece), rows)
    gpu_estimate.group_maxima[pieces](
        *source, b.group_maxima, vocabulary, EDITS=edits, BLOCK=tiles.cut_piece, num_warps=8, **EXACT
    )
    gpu_estimate.place_pivots[(rows,)](
        *source,
        b.group_maxima,
        *search,
        b.list_counters,
        vocabulary,
        EDITS=edits,
        GROUPS=_power_of_2(_divided_up(vocabulary, gpu_estimate.GROUP)),
        SAMPLE=tiles.cut_sample,
        num_warps=8,
        **EXACT,
    )
    gpu_truncation.weigh_pivots[pieces](
        *source, *search, vocabulary, EDITS=edits, PIECE=tiles.cut_piece, BLOCK=tiles.cut // 2, num_warps=4, **EXACT
    )
    gpu_truncation.collect_pieces[pieces](
        *source,
        *search,
        b.list_keys,
        b.list_counters,
        vocabulary,
        EDITS=edits,
        PIECE=tiles.cut_piece,
        BLOCK=tiles.cut,
        LIST=tiles.cut_list,
        num_warps=4,
        **EXACT,
    )
    gpu_truncation.cut_rows[(rows,)](
        *source,
        *search,
        b.cut_keys,
        b.cut_ids,
        b.list_keys,
        b.list_counters,
        vocabulary,
        EDITS=edits,
        BLOCK=tiles.cut,
        LIST=tiles.cut_list,
        num_warps=16,
        **EXACT,
    )


def report_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    row_slots: torch.Tensor,
    table: torch.Tensor,
    buffers: SamplingBuffers,
    num_best: int,
) -> None:
    """Fill the heads' rank and log-probability of targets (int64 [R]), and the num_best (<= MAX_BEST) best tokens.

    For the rows whose slot's NUM_BEST is not -1. A row without a distribution has rank 0.
    """
    buffers.check(logits)
    rows, vocabulary = logits.shape
    b, width, source = buffers, min(num_best, vocabulary), (logits, row_slots, table)
    grid, num_tiles = (b.num_logprob_tiles, rows), _power_of_2(b.num_logprob_tiles)
    sums = (b.totals, b.ranks)
    gpu_logprobs.best_logits_of_tiles[grid](
        *source, b.tile_maxima, b.tile_best, *sums, vocabulary, width, BLOCK=b.tiles.logprobs, num_warps=4, **EXACT
    )
    gpu_logprobs.sum_of_tiles[grid](
        *source,
        targets,
        b.tile_maxima,
        *sums,
        vocabulary,
        BLOCK=b.tiles.logprobs,
        TILES=num_tiles,
        num_warps=4,
        **EXACT,
    )
    gpu_logprobs.report[(rows,)](
        *source,
        targets,
        b.tile_maxima,
        b.tile_best,
        *sums,
        b.head,
        b.best,
        vocabulary,
        b.num_logprob_tiles,
        width,
        MAX_BEST,
        TILES=num_tiles,
        CANDIDATES=_power_of_2(max(1, b.num_logprob_tiles * width)),
        LOGITS=b.reports.logits,
        num_warps=4,
        **EXACT,
    )


__all__ = ["MAX_BEST", "DraftedRows", "SamplingBuffers", "Stages", "Tiles", "report_logprobs", "sample"]
