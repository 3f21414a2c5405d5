"""A log line per request with its prompt and parameters, for operators who ask for it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import fields

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.sampling_params import SamplingParams

logger = logging.getLogger(__name__)
_DEFAULTS = SamplingParams()


def log_requests(requests: Sequence[PreparedRequest], max_len: int | None) -> None:
    """Log each prompt, at most `max_len` characters and token ids of it, and the parameters that are not defaults."""
    for request in requests:
        params = {
            name: value
            for name in (field.name for field in fields(request.params))
            # how answers are handed out is the server's choice
            if name != "output_kind" and (value := getattr(request.params, name)) != getattr(_DEFAULTS, name)
        }
        facts = {
            "engine_request_id": request.request_id,
            "seed": request.seeds[0],
            "prompt": None if request.prompt is None else request.prompt[:max_len],
            "prompt_token_ids": request.prompt_token_ids[:max_len],
            "num_prompt_tokens": len(request.prompt_token_ids),
            "params": {name: repr(value) for name, value in params.items()},
        }
        logger.info("request", extra={"facts": facts})
