"""Hidden states and samples from stage to stage, through memory that the processes of one host share.

A ring for each direction and pair of ranks has one writer and one reader. Both count the bytes that they have written
or read, each on a line of its own, and wait for the other's count.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

import torch

from sempre.ipc.errors import EngineUnhealthy, ProtocolError, StartupError
from sempre.kernels.exchange import LINE, await_change, enter, publish

_RING_BYTES = 8 << 20
# as much is moved at a time, so that both ends work at once
_PIECE_BYTES = 1 << 20
_HEADER_BYTES = mmap.PAGESIZE
RING_MEMORY_BYTES = _HEADER_BYTES + _RING_BYTES
_COUNTS = 1 << 32
_WAIT_S = 0.2


class Ring:
    """Bytes in order, from one process to another; this one writes or reads."""

    def __init__(self, memory: torch.Tensor, *, writes: bool, ranks: tuple[int, int], spins: int, patience_s: float):
        """`memory`: int8 [RING_MEMORY_BYTES], zeros at first. `ranks`: this one, and the other, which has failed if it
        is waited for longer than `patience_s`. Raises StartupError if another process has this end."""
        lines = memory[: 2 * LINE].chunk(2)
        self._own, self._other = lines if writes else lines[::-1]
        self._data = memory[_HEADER_BYTES:].view(torch.uint8)
        self._writes = writes
        self._rank, self._peer = ranks
        self._spins = spins
        self._patience_s = patience_s
        self._count = 0
        self._seen = 0
        """the other's count, as last seen"""
        if not enter(self._own, 0):
            text = f"rank {self._rank}: expected one worker of each rank, found one that has joined the replica already"
            raise StartupError(text, rank=self._rank)

    @property
    def _room(self) -> int:
        """Bytes that can be written, or read, now."""
        return _RING_BYTES - (self._count - self._seen) if self._writes else self._seen - self._count

    def move(self, data: torch.Tensor) -> None:
        """Write or fill all of `data`, contiguous. Raises EngineUnhealthy."""
        flat = data.view(-1).view(torch.uint8)
        start, end = 0, flat.shape[0]
        while start < end:
            if not self._room:
                self._wait()
            at = self._count % _RING_BYTES
            count = min(self._room, end - start, _RING_BYTES - at, _PIECE_BYTES)
            ring, part = self._data[at : at + count], flat[start : start + count]
            if self._writes:
                ring.copy_(part)
            else:
                part.copy_(ring)
            start += count
            self._count += count
            publish(self._own, self._count)

    def is_ready(self, wait_s: float) -> bool:
        """Whether there is something to read, or room to write; waits for up to `wait_s`."""
        if not self._room:
            self._look(0, wait_s)
        return self._room > 0

    def _look(self, spins: int, wait_s: float) -> None:
        now = await_change(self._other, self._seen, spins=spins, wait_s=wait_s)
        self._seen += (now - self._seen) % _COUNTS

    def _wait(self) -> None:
        self._look(self._spins, _WAIT_S)
        deadline = time.monotonic() + self._patience_s
        while not self._room:
            if time.monotonic() > deadline:
                text = (
                    f"rank {self._rank}: expected rank {self._peer} to {'read' if self._writes else 'write'} within"
                    f" {self._patience_s:g} s, found it missing"
                )
                raise EngineUnhealthy(text, rank=self._peer, cause="missing")
            self._look(0, _WAIT_S)


class SharedMemoryLink:
    """`stages.StageLink` between processes of one host."""

    def __init__(
        self, rank: int, previous: Ring | None, following: Ring | None, reports: Sequence[Ring], *, is_last: bool
    ) -> None:
        """`previous` and `following` are rings from and to the stages beside this one; `reports` are those to all
        earlier stages, or that from the last one."""
        self._rank = rank
        self._previous = previous
        self._following = following
        self._reports = list(reports)
        self._is_last = is_last
        self._num_passed = self._num_taken = self._num_reports = 0

    def pass_on(self, branch: torch.Tensor | None, residual: torch.Tensor) -> None:
        """See `StageLink`."""
        assert self._following is not None
        rows, width = residual.shape
        self._following.move(_header(self._num_passed, rows, width, branch is not None))
        self._num_passed += 1
        self._following.move(residual.contiguous())
        if branch is not None:
            self._following.move(branch.contiguous())

    def take_over(self, branch: torch.Tensor, residual: torch.Tensor) -> bool:
        """See `StageLink`."""
        assert self._previous is not None
        header = _header(0, 0, 0, False)
        self._previous.move(header)
        number, rows, width, has_branch = header.tolist()
        expected = (self._num_taken, *residual.shape)
        if (number, rows, width) != expected:
            raise ProtocolError(
                f"rank {self._rank}: expected hidden states {expected[0]} of {expected[1]} rows and width"
                f" {expected[2]} from the stage before, found {number} of {rows} and {width}."
            )
        self._num_taken += 1
        self._previous.move(residual)
        if has_branch:
            self._previous.move(branch)
        return bool(has_branch)

    def report(self, outcome: bytes) -> None:
        """See `StageLink`."""
        assert self._is_last
        header, data = (
            _header(self._num_reports, len(outcome), 0, False),
            torch.frombuffer(bytearray(outcome), dtype=torch.uint8),
        )
        self._num_reports += 1
        for ring in self._reports:
            ring.move(header)
            ring.move(data)

    def has_report(self, wait_s: float) -> bool:
        """See `StageLink`."""
        assert not self._is_last
        return self._reports[0].is_ready(wait_s)

    def next_report(self) -> bytes:
        """See `StageLink`."""
        assert not self._is_last
        header = _header(0, 0, 0, False)
        self._reports[0].move(header)
        number, size, _, _ = header.tolist()
        if number != self._num_reports:
            raise ProtocolError(
                f"rank {self._rank}: expected report {self._num_reports} of the last stage, found {number}."
            )
        self._num_reports += 1
        outcome = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._reports[0].move(outcome)
        return outcome.numpy().tobytes()


def _header(number: int, rows: int, width: int, has_branch: bool) -> torch.Tensor:
    return torch.tensor([number, rows, width, has_branch], dtype=torch.int64, device="cpu")
