"""Log-probabilities, under the path that users of vLLM import them from."""

from sempre.engine.flat_logprobs import FlatLogprobs
from sempre.engine.outputs import Logprob

__all__ = ["FlatLogprobs", "Logprob"]
