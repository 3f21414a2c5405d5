"""One sequence and its progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isqrt

from sempre.engine.scheduling.limits import Limits
from sempre.engine.scheduling.prefix_cache import BlockKey
from sempre.engine.speculation import Speculation
from sempre.ipc.messages import NewRequest, RequestSpec

OrderKey = tuple[int, int, str]
# Scoring a prompt token, with a row of logits of its own, takes about as long as computing it, or half of that.
_SCORED_COST = 2


@dataclass(slots=True)
class HeldSlots:
    """Slots of states that a running request holds, see `StateSlots`; each is held once for each time it is named.

    The next step reads `snapshot`, or `own` where that is -1. `undecided` and `new_snapshots` are pairs of a number of
    tokens and the slot of the state after them.
    """

    own: int = -1
    snapshot: int = -1
    undecided: list[tuple[int, int]] = field(default_factory=list)
    """written by the step in flight"""
    new_snapshots: list[tuple[int, int]] = field(default_factory=list)
    """written by steps in flight, ascending"""

    def all(self) -> Iterator[int]:
        yield from self.writable()
        if self.snapshot >= 0:
            yield self.snapshot

    def writable(self) -> Iterator[int]:
        """Slots that nobody else reads."""
        yield self.own
        yield from (slot for _, slot in self.undecided if slot != self.own)
        yield from (slot for _, slot in self.new_snapshots)


class Request:
    """A request inside the scheduler.

        token_ids   | prompt ……………………… | output …………… |
                    0              num_prompt_tokens     len(token_ids)
        num_tokens  = len(token_ids) + sampled tokens still in flight, one for each step
        KV cache    [0, num_computed_tokens) is written by the steps scheduled so far
                    [0, num_slots) has blocks, num_slots = len(block_ids) * block_size

    There is no prefill or decode phase: `num_computed_tokens` catches up with `num_tokens`, up to `compute_limit`.
    Nothing is computed beyond it: the last token a request may have never needs keys and values.
    """

    __slots__ = (
        "adapter",
        "admitted_at_step",
        "attention_parity",
        "block_ids",
        "block_keys",
        "cached_tokens_to_report",
        "compute_limit",
        "drafts_in_flight",
        "finish_reason",
        "is_known_to_worker",
        "is_paused",
        "is_plain",
        "is_running",
        "max_total_tokens",
        "min_total_tokens",
        "next_commit_at",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_matching_tokens",
        "num_overtaken",
        "num_preemptions",
        "num_prompt_logprobs_delivered",
        "num_prompt_tokens",
        "num_prompt_tokens_counted",
        "num_slots",
        "num_tokens",
        "order_key",
        "passing_snapshot",
        "prompt_logprobs_start",
        "reads_prefix_cache",
        "request_id",
        "slots",
        "spec",
        "speculation",
        "stop_reason",
        "stop_reasons",
        "token_ids",
        "waits_for_tokens",
        "wants_prompt_logprobs",
        "was_admitted",
    )

    def __init__(
        self, spec: RequestSpec, priority: int, limits: Limits, speculation: Speculation | None = None
    ) -> None:
        """`priority` is the spec's, or 0 under a policy that ignores it."""
        params = spec.params
        self.spec = spec
        self.request_id = spec.request_id
        self.order_key: OrderKey = (priority, spec.ordinal, spec.request_id)
        self.adapter = None if spec.adapter is None else spec.adapter.digest
        self.num_overtaken = 0  # by later requests, while it waited for a slot of its adapter

        self.token_ids = [*spec.prompt_token_ids, *spec.output_token_ids]
        self.num_prompt_tokens = len(spec.prompt_token_ids)
        self.num_tokens = len(self.token_ids)
        self.num_computed_tokens = 0
        self.min_total_tokens = self.num_prompt_tokens + params.min_tokens
        self.max_total_tokens = min(self.num_prompt_tokens + params.max_tokens, limits.max_model_len)
        if spec.pooling is not None:
            self.max_total_tokens = self.num_prompt_tokens + 1  # the prompt may be as long as the context
        self.compute_limit = min(self.max_total_tokens - 1, limits.max_kv_tokens)

        # a token that is both ends the request as end-of-sequence
        stop_ids: dict[int, int | None] = dict(zip(params.stop_token_ids, params.stop_token_ids, strict=True))
        self.stop_reasons = stop_ids | dict.fromkeys(params.eos_token_ids)
        self.finish_reason: str | None = None
        self.stop_reason: int | None = None
        self.is_running = False
        self.is_paused = False
        # begun by another engine, which counted its prompt and reported its cached tokens
        self.was_admitted = bool(spec.output_token_ids or spec.num_prompt_logprobs_delivered)
        self.num_prompt_tokens_counted = self.num_prompt_tokens if self.was_admitted else 0
        self.num_preemptions = 0
        self.is_known_to_worker = False
        self.cached_tokens_to_report = 0
        # the grammar's next tokens depend on the previous token, which must be known
        self.waits_for_tokens = params.depends_on_output
        self.wants_prompt_logprobs = params.first_scored_token is not None
        self.num_prompt_logprobs_delivered = spec.num_prompt_logprobs_delivered
        self.prompt_logprobs_start = (params.first_scored_token or 1) + spec.num_prompt_logprobs_delivered

        self.attention_parity = limits.attention_parity
        self.speculation = speculation
        self.is_plain = speculation is None and _is_plain(spec)
        # while they are verified, the step's number of tokens is unknown
        self.drafts_in_flight: list[int] = []

        # owned by KVCacheManager
        self.block_ids: list[int] = []
        self.num_slots = 0
        self.block_keys: list[BlockKey] = []
        self.num_committed_blocks = 0
        self.next_commit_at = 0
        # owned by StateSlots
        self.slots: HeldSlots | None = None
        self.num_matching_tokens = 0  # of cached blocks, when it was admitted; snapshots may not reach as far
        self.passing_snapshot: BlockKey | None = None  # worth keeping until the next one
        # results of earlier steps say nothing about `block_ids`: they wrote to blocks that were freed
        self.admitted_at_step = 0
        # a hit would skip positions whose log-probabilities are requested, or that are pooled
        self.reads_prefix_cache = not (self.wants_prompt_logprobs or limits.pools_every_token)

    @property
    def is_held_back(self) -> bool:
        """Whether nothing more may be planned before the token in flight is known."""
        return self.waits_for_tokens and self.num_tokens > len(self.token_ids)

    @property
    def awaits_result(self) -> bool:
        """Whether the result of a step in flight decides whether and how the request continues."""
        return self.num_tokens > self.compute_limit or self.is_held_back or bool(self.drafts_in_flight)

    def prompt_cost(self, start: int, num_tokens: int) -> int:
        """What its tokens from `start` on take of a step's room for prompts: one each, more where attention reads a
        long context or the tokens are scored."""
        cost = num_tokens * self._token_cost
        if self.attention_parity is not None:
            cost += num_tokens * (2 * start + num_tokens) // (2 * self.attention_parity)
        return cost

    def prompt_room(self, start: int, budget: int) -> int:
        """How many of its tokens from `start` on fit into a step's room for prompts; at least one if there is any."""
        cost, parity = self._token_cost, self.attention_parity
        if parity is None:
            return -(-budget // cost)
        first = cost * parity + start  # the cost of the first of them, times the parity
        return max(min(budget, 1), isqrt(first * first + 2 * parity * budget) - first)

    @property
    def _token_cost(self) -> int:
        scores = self.wants_prompt_logprobs and self.prompt_logprobs_start < self.num_prompt_tokens
        return _SCORED_COST if scores else 1

    def as_new(self) -> NewRequest:
        """Everything that a worker needs to start this request."""
        return NewRequest(
            request_id=self.request_id,
            token_ids=self.token_ids.copy(),
            num_prompt_tokens=self.num_prompt_tokens,
            seed=self.spec.seed,
            params=self.spec.params,
            pooling=self.spec.pooling,
            adapter=self.spec.adapter,
        )

    def count_prompt_tokens(self, num_written: int) -> int:
        """How many prompt tokens among the first `num_written` are new."""
        num_counted = self.num_prompt_tokens_counted
        self.num_prompt_tokens_counted = max(num_counted, min(num_written, self.num_prompt_tokens))
        return self.num_prompt_tokens_counted - num_counted

    def append(self, token_id: int) -> bool:
        """Append a sampled token; True if it ends the request, setting `finish_reason` and `stop_reason`."""
        token_ids = self.token_ids
        token_ids.append(token_id)
        num_tokens = len(token_ids)
        if token_id in self.stop_reasons and (num_tokens >= self.min_total_tokens or self._completes_form(token_id)):
            self.finish_reason = "stop"
            self.stop_reason = self.stop_reasons[token_id]
            return True
        if num_tokens > self.compute_limit:
            # its keys and values never fit, even alone: the same token ends it in every batch
            self.finish_reason = "length" if num_tokens >= self.max_total_tokens else "error"
            return True
        return False

    def append_all(self, token_ids: list[int]) -> int | None:
        """Append sampled tokens up to the first that ends the request; return how many that are, None if none does."""
        return next((count for count, token_id in enumerate(token_ids, 1) if self.append(token_id)), None)

    def _completes_form(self, token_id: int) -> bool:
        """With a grammar, an end-of-sequence token before `min_tokens` means that nothing else can follow."""
        params = self.spec.params
        return params.grammar is not None and token_id in params.eos_token_ids

    def lose_worker(self) -> None:
        """Forget the worker's state and pending results; tokens received so far are kept."""
        self.num_tokens = len(self.token_ids)
        self.drafts_in_flight = []
        self.is_known_to_worker = False
        first = self.spec.params.first_scored_token or 1
        self.prompt_logprobs_start = first + self.num_prompt_logprobs_delivered


def _is_plain(spec: RequestSpec) -> bool:
    """Whether, once the prompt is computed, a step without drafts is one token more and nothing else."""
    params = spec.params
    return not params.depends_on_output and params.first_scored_token is None and spec.pooling is None
