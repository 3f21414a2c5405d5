"""Sampling parameters, under the path that users of vLLM import them from."""

from sempre.engine.sampling_params import RequestOutputKind, SamplingParams
from sempre.engine.structured_outputs import StructuredOutputsParams

__all__ = ["RequestOutputKind", "SamplingParams", "StructuredOutputsParams"]
