"""What runs a draft model on one device.

A sequence stays with it from one proposal to the next. It assumes its draft tokens are right; the next proposal tells
it from which token on they were wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sempre.ipc.errors import MessageMalformed
from sempre.ipc.messages import ExecuteStep, NewRequest
from sempre.workers.kv_cache import PagedKvCache
from sempre.workers.step_validation import StepLimits

# for one sequence in one proposal
MAX_DRAFT_TOKENS = 32


@dataclass(frozen=True)
class DraftTask:
    """What to draft for one sequence.

    token_ids   | known ……………………………………………………… | drafts …  |
                0        num_computed          len(token_ids)   len(token_ids) + count
    """

    request_id: str
    token_ids: list[int]
    """all known ones; do not modify"""
    num_unchanged: int
    """the runner knows this many of them, as admitted or as drafted by it"""
    num_computed: int
    """keys and values of this many are in the cache; at least one fewer than are known. Where layers keep states, the
    runner has those after this many tokens: all that it was told last time, or none"""
    block_ids: list[int]
    """all blocks, enough for every token but the last draft"""
    count: int
    """in [1, MAX_DRAFT_TOKENS]; no draft is past the last token that the request may have"""


class DraftModelRunner(Protocol):
    """Samples like the target, with the request's noise and parameters."""

    cache: PagedKvCache
    limits: StepLimits

    def admit(self, new: NewRequest) -> bool:
        """Add a sequence in its current state; False, with nothing added, when its parameters cannot be used."""

    def release(self, request_id: str) -> None:
        """Forget a sequence that was admitted."""

    def draft(self, tasks: Sequence[DraftTask]) -> list[list[int]]:
        """`count` tokens for each; fewer where a token cannot be sampled: such a sequence must be released.

        At most as many sequences as fit in one step, all of them admitted.
        """

    def prepare(self) -> None:
        """Called before the first request: does what speeds up proposals."""


def check_drafts(step: ExecuteStep, role: str, *, drafts: bool) -> None:
    """Raises MessageMalformed for a step that asks for something a worker of this role, with or without a draft model,
    does not do."""
    if role == "draft" and step.scheduled:
        text = f"expected nothing for a worker of role 'draft', found {len(step.scheduled)} requests"
        raise MessageMalformed(f"ExecuteStep: scheduled: {text}", field="scheduled")
    sampling = {item.request_id for item in step.scheduled} if step.drafts else ()
    for item in step.drafts:
        if not drafts:
            text = f"expected none without a draft model, found {item}"
        elif role == "target" and (item.token_ids or item.request_id not in sampling):
            text = f"expected scheduled requests without token_ids, found {item}"
        else:
            continue
        raise MessageMalformed(f"ExecuteStep: drafts: {text}", field="drafts")
