"""Coordinator ⇄ worker. A worker is one process on one device; it holds a shard of one replica of the model."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sempre.ipc.config import WorkerConfig
from sempre.ipc.messages.common import (
    AdapterSpec,
    Data,
    ErrorInfo,
    Heartbeat,
    LogprobRows,
    Message,
    NonNegative,
    PoolingModel,
    PoolingSpec,
    Positive,
    Refused,
    RngDigests,
    SamplingSpec,
    TokenId,
    Uint64,
)


class LoadModel(Message, frozen=True, kw_only=True):
    """First command: seed the global generators, load the model, run the self-test.

    `addresses`: of all ranks of its replica, where they are on several hosts.
    """

    config: WorkerConfig
    addresses: dict[int, str] = {}


class StartServing(Message, frozen=True, kw_only=True):
    """Second command: allocate the KV cache and the slots of states, warm up, seed again."""

    num_blocks: Positive
    num_state_slots: NonNegative = 0


class NewRequest(Data, frozen=True, kw_only=True):
    """A request the worker has not seen: all tokens known so far, the first `num_prompt_tokens` of them the prompt."""

    request_id: str
    token_ids: list[TokenId]
    num_prompt_tokens: Positive
    seed: Uint64
    params: SamplingSpec
    pooling: PoolingSpec | None = None
    """its prompt is pooled, and nothing sampled"""
    adapter: AdapterSpec | None = None
    """loaded when it is first needed"""


class ScheduledRequest(Data, frozen=True, kw_only=True):
    """What one request computes in one step.

    [0, num_computed_tokens) of its sequence is in the KV cache; [num_computed_tokens, + num_tokens) is computed now.
    `block_ids` are written into its block table from index `block_table_start` on. A token is sampled if, and only
    if, the step computes the last token that the worker knows; the worker appends it to the sequence itself.
    A request computed again from an earlier position keeps its tokens; its block table is rewritten from index 0.

    Row p of the prompt log-probabilities tells token p given the tokens before it, so computing position p - 1 yields
    it; there is no row 0. Computing [a, b) reports the rows p of the prompt (of P tokens) with
    max(a + 1, `prompt_logprobs_start`) ≤ p ≤ min(b, P - 1), if the request asked for any. Rows below
    `prompt_logprobs_start` were reported before the request was preempted.

    `draft_token_ids` are drafts of the tokens after the last known one, and the last of the `num_tokens`. The worker
    samples its own token after the last known one and after each draft token, and keeps them up to and including the
    first that the next draft token does not equal: one token, or several, none of which depends on the drafts.

    Of a model whose layers keep states, `state_read` is the slot of the state before the first of the tokens, -1 where
    there is none before it. `state_writes` are (index of a token among the `num_tokens`, slot for the state after it).
    """

    request_id: str
    num_computed_tokens: NonNegative
    num_tokens: Positive
    block_table_start: NonNegative
    block_ids: list[NonNegative]
    prompt_logprobs_start: NonNegative = 0
    draft_token_ids: list[TokenId] = []
    state_read: Annotated[int, Meta(ge=-1)] = -1
    state_writes: list[tuple[NonNegative, NonNegative]] = []


class DraftRequest(Data, frozen=True, kw_only=True):
    """Draft the next `num_drafts` tokens of a request.

    `token_ids` are those that the worker does not know yet: none where it has sampled them itself.
    """

    request_id: str
    token_ids: list[TokenId] = []
    num_drafts: Positive


class ExecuteStep(Message, frozen=True, kw_only=True):
    """One forward pass over the scheduled requests, then drafts for some. `finished_request_ids` are forgotten first.

    Only a worker with a draft model is asked for drafts: a target for requests that the step samples for; a worker of
    role "draft", which has nothing scheduled, for any that it knows.
    """

    step_id: NonNegative
    finished_request_ids: list[str] = []
    new_requests: list[NewRequest] = []
    scheduled: list[ScheduledRequest] = []
    drafts: list[DraftRequest] = []


class CallMethod(Message, frozen=True, kw_only=True):
    """A call of one of the worker's public methods (a fixed list); arguments are msgpack values."""

    call_id: NonNegative
    method: str
    args: list[object] = []
    kwargs: dict[str, object] = {}


class ShutdownWorker(Message, frozen=True, kw_only=True):
    """Finish and exit with code 0."""


WorkerCommand = LoadModel | StartServing | ExecuteStep | CallMethod | ShutdownWorker | Heartbeat | Refused


class WorkerHello(Message, frozen=True, kw_only=True):
    """First event of a worker; `address` is where ranks on other hosts reach it."""

    protocol_version: int
    rank: NonNegative
    pid: int
    versions: dict[str, str] = {}
    host: str = ""
    address: str = ""


class StepCosts(Data, frozen=True, kw_only=True):
    """How long steps are expected to take, in seconds: a function of the model and the kind of device, not measured.

    `step`: a decode step of a single sequence; `row`: each additional row; `result`: between the result of a step and
    the next step that depends on it; `draft`: a token of the draft model that shares the device.
    """

    step: float
    row: float
    result: float
    draft: float = 0.0


class ModelLoaded(Message, frozen=True, kw_only=True):
    """Answer to LoadModel. The limits and `block_size` are those in use; `fingerprint` the parts this worker knows.

    Up to `max_steps_in_flight` steps may be sent before the first of them is answered; none may have more than
    `max_num_batched_tokens` tokens, or more than `max_num_seqs` requests. Where the worker chose the number of tokens,
    `max_prompt_tokens` of them may be prompt tokens. The next step is best sent `step_lead_s` seconds before the
    current one ends; 0: at once. A model whose layers keep states has `available_state_slots` of `state_slot_bytes`.
    """

    rank: NonNegative
    digests_before_load: RngDigests
    vocab_size: Positive
    max_model_len: Positive
    kv_block_bytes: Positive
    available_kv_blocks: Positive
    costs: StepCosts
    eos_token_ids: list[TokenId] = []
    fingerprint: dict[str, str] = {}
    phase_seconds: dict[str, float] = {}
    max_steps_in_flight: Positive = 1
    block_size: Positive = 16
    max_num_batched_tokens: Positive = 2048
    max_prompt_tokens: Positive | None = None
    step_lead_s: float = 0.0
    max_num_seqs: Positive = 128
    available_state_slots: NonNegative = 0
    state_slot_bytes: NonNegative = 0
    pooling: PoolingModel | None = None
    """None: the model generates"""
    attention_parity: Positive | None = None
    """tokens of context over which attention costs a prompt token as much as the rest of the model, where that counts
    for how many prompt tokens a step has"""


class WorkerReady(Message, frozen=True, kw_only=True):
    """Answer to StartServing. `fingerprint`: parts that are known only now."""

    rank: NonNegative
    digests_after_warm_up: RngDigests
    phase_seconds: dict[str, float] = {}
    fingerprint: dict[str, str] = {}


class SampledTokens(Data, frozen=True, kw_only=True):
    """The result of one request in one step: no token (chunked prefill goes on), one, or several (speculation).

    An error of type NOT_READY does not end the request: its grammar was not ready, and the token is sampled in a later
    step.
    """

    request_id: str
    token_ids: list[TokenId] = []
    logprobs: LogprobRows | None = None
    prompt_logprobs: LogprobRows | None = None
    error: ErrorInfo | None = None
    pooled: bytes | None = None
    """of a request that is pooled, with its prompt's last token: float32 little-endian"""
    hidden_digest: bytes = b""
    """of the hidden states that its tokens were sampled from, as they leave this rank's layers; empty where no other
    rank has the same, or takes them over"""
    received_digest: bytes = b""
    """likewise, as the stage before passed them on; empty without one"""


class RequestOutcome(Data, frozen=True, kw_only=True):
    """What the last stage tells the others of one request in one step."""

    token_ids: list[TokenId] = []
    error_type: str = ""
    """empty: none"""


class StepResult(Message, frozen=True, kw_only=True):
    """Answer to ExecuteStep; `sampled` is in the order of its `scheduled`, `drafts` in the order of its `drafts`.

    Drafts may be fewer than asked for, or none.
    """

    rank: NonNegative
    step_id: NonNegative
    sampled: list[SampledTokens] = []
    drafts: list[list[TokenId]] = []


class CallMethodReply(Message, frozen=True, kw_only=True):
    """Answer to CallMethod: a msgpack value, or the error."""

    rank: NonNegative
    call_id: NonNegative
    result: object = None
    error: ErrorInfo | None = None


class WorkerFailed(Message, frozen=True, kw_only=True):
    """The worker's last message: the exception that ended it."""

    rank: NonNegative
    error: ErrorInfo


WorkerEvent = (
    WorkerHello | ModelLoaded | WorkerReady | StepResult | CallMethodReply | WorkerFailed | Heartbeat | Refused
)
