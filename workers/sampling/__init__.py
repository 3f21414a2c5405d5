"""The sampler of a worker and the state it keeps per request."""

from sempre.workers.sampling.sampler import RowResult, Sampler, pack_logprobs
from sempre.workers.sampling.state import RowError, SamplingState

__all__ = ["RowError", "RowResult", "Sampler", "SamplingState", "pack_logprobs"]
