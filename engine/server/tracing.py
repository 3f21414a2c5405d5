"""A span per request through opentelemetry-api, with seed and fingerprint; no-op without it or an SDK."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from starlette.requests import Request

from sempre.engine.frontend.request_builder import PreparedRequest
from sempre.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from sempre.engine.server.service import Service

try:
    from opentelemetry import trace
    from opentelemetry.propagate import extract
except ImportError:  # the extra `otel` is not installed
    trace = None  # type: ignore[assignment]


class RequestSpan:
    """Spans one request, as a child of the caller's span if it sent a `traceparent`.

    As a context manager it covers the request's admission: an error there ends the span; otherwise `end` does.
    """

    def __init__(self, span: Any, fingerprint_of: Callable[[PreparedRequest], str] | None = None) -> None:
        self._span = span
        self._fingerprint_of = fingerprint_of
        self._began = time.monotonic()

    @classmethod
    def begin(cls, http: Request, service: Service, params: SamplingParams) -> RequestSpan:
        """Start the span, with vLLM's attribute names."""
        if trace is None:
            return cls(None)
        # If the HTTP framework has its own span, ours is its child.
        is_child = trace.get_current_span().get_span_context().is_valid
        context = None if is_child else extract(http.headers)
        span = trace.get_tracer("sempre").start_span("llm_request", context=context)
        if not span.is_recording():
            return cls(None)
        span.set_attributes(
            {
                "gen_ai.request.id": http.state.request_id,
                "gen_ai.request.n": params.n,
                "gen_ai.request.temperature": params.temperature,
                "gen_ai.request.top_p": params.top_p,
                "gen_ai.response.model": service.model_names[0],
            }
        )
        if params.max_tokens is not None:
            span.set_attribute("gen_ai.request.max_tokens", params.max_tokens)
        return cls(span, service.engine.fingerprint_of)

    def end(self, requests: Sequence[PreparedRequest], num_tokens: int) -> None:
        """Finish the span with what was generated; a second call does nothing."""
        span, self._span = self._span, None
        if span is None or self._fingerprint_of is None:
            return
        span.set_attributes(
            {
                # integer attributes have 63 bits, seeds 64
                "sempre.seed": [str(request.seeds[0]) for request in requests],
                "sempre.fingerprint": self._fingerprint_of(requests[0]),
                "gen_ai.usage.prompt_tokens": sum(len(request.prompt_token_ids) for request in requests),
                "gen_ai.usage.completion_tokens": num_tokens,
                "gen_ai.usage.num_sequences": sum(len(request.sequences) for request in requests),
                "gen_ai.latency.e2e": time.monotonic() - self._began,
            }
        )
        span.end()

    def __enter__(self) -> RequestSpan:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._span is not None:
            self._span.record_exception(error)
            self._span.end()
            self._span = None
