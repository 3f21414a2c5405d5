"""Limits of a sequence and of a step, and the errors for requests beyond them."""

from __future__ import annotations

from dataclasses import dataclass

from sempre.ipc.errors import RequestError, too_long, too_long_for_cache
from sempre.ipc.messages import ErrorInfo, RequestSpec


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one replica, in tokens except for the numbers of blocks and requests (`max_num_seqs`)."""

    max_model_len: int
    num_blocks: int
    """blocks of the KV cache, of `block_size` tokens each"""
    block_size: int
    max_num_seqs: int
    """requests in one step"""
    max_num_batched_tokens: int
    """tokens in one step"""
    max_prompt_tokens: int | None = None
    """of these, for requests that do more than decode; None: all of them"""
    attention_parity: int | None = None
    """tokens of context over which attention costs a prompt token as much as the rest of the model; None: costs do not
    matter, or attention's does not grow with the context"""
    max_draft_tokens: int = 0
    """draft tokens to verify in one step"""
    num_state_slots: int = 0
    """slots of states; 0: no layer of the model keeps states"""
    max_adapters: int = 0
    """adapters of the requests in one step; 0: none are served"""
    pools_every_token: bool = False
    """of a model that pools: results depend on every token of a prompt, so that none may come from the cache"""

    @property
    def max_kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def check_prompt(self, spec: RequestSpec) -> None:
        """Raise RequestError for a prompt that leaves no room for one token after it, unless it is pooled, or is
        empty."""
        length = len(spec.prompt_token_ids)
        num_after = 1 if spec.pooling is None else 0
        if not length:
            message = "The decoder prompt cannot be empty."
        elif length + num_after > self.max_model_len:
            message = too_long(length, self.max_model_len, num_after)
        elif length + num_after > self.max_kv_tokens:
            message = too_long_for_cache(length, self.max_model_len, self.max_kv_tokens, num_after)
        else:
            return
        raise RequestError(message, parameter="prompt_token_ids", value=length, request_id=spec.request_id)

    def check_adapter(self, spec: RequestSpec) -> None:
        """Raise RequestError for an adapter where none are served."""
        if spec.adapter is not None and not self.max_adapters:
            message = f"lora_request: expected an engine with enable_lora=True for adapter {spec.adapter.name!r}."
            raise RequestError(message, parameter="lora_request", request_id=spec.request_id)

    def outgrown(self, request_id: str, num_tokens: int) -> ErrorInfo:
        """The error of a request whose next token could not be computed even if it ran alone."""
        message = (
            f"Request {request_id!r} has {num_tokens} tokens and outgrew the KV cache of {self.max_kv_tokens} tokens "
            f"(num_blocks={self.num_blocks}, block_size={self.block_size}). "
            "Lower max_tokens or raise kv_cache_memory_bytes."
        )
        return ErrorInfo(type="RequestError", message=message, facts={"request_id": request_id})
