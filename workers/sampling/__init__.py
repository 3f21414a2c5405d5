"""A worker's sampler and the state it keeps per request."""

from sempre.workers.sampling.grammar import GrammarCompiler
from sempre.workers.sampling.row_error import NoDistribution, RowError
from sempre.workers.sampling.sampler import RowResult, Sampler, pack_logprobs, reports_of
from sempre.workers.sampling.state import SamplingState

__all__ = [
    "GrammarCompiler",
    "NoDistribution",
    "RowError",
    "RowResult",
    "Sampler",
    "SamplingState",
    "pack_logprobs",
    "reports_of",
]
