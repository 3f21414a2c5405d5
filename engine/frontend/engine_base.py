"""The base class of `LLM` and `AsyncLLM`, and their errors for missing attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from sempre.engine.arg_utils import EngineArgs, keywords_of
from sempre.engine.arguments import EngineKeywords, check_keywords
from sempre.engine.frontend.beam_search import BeamSearches
from sempre.engine.frontend.frontend import Frontend
from sempre.engine.frontend.prompts import TokensPrompt
from sempre.engine.near_names import near_name
from sempre.engine.sampling_params import SamplingParams
from sempre.engine.text.tokenizer import Tokenizer

_TEXT_ALONE = "This engine reads text alone."
_PROFILE = (
    "Make the engine with multiprocessing=False and run it inside torch.profiler.profile(), or attach a sampling "
    "profiler to the worker processes."
)
_HEALTH = "Use `await engine.health()`, which returns the state and the problems by rank."
_INSTEAD = {
    "add_request": "Use generate(…), or stream(…) for several prompts.",
    "apply_model": (
        "Functions are never sent to another process; call a method of the workers by its name: collective_rpc(…)."
    ),
    "check_and_raise_dead_error": _HEALTH,
    "dead_error": _HEALTH,
    "do_log_stats": "Use get_metrics().",
    "errored": _HEALTH,
    "get_decoding_config": "Use `config`.",
    "get_model_config": "Use `config`, and `ready` for the limits in use.",
    "get_vllm_config": "Use `config`, and `ready` for the limits in use.",
    "is_running": _HEALTH,
    "is_stopped": _HEALTH,
    "pin_lora": "Raise max_cpu_loras: the least recently used adapter is forgotten, and loaded again when needed.",
    "reset_encoder_cache": _TEXT_ALONE,
    "reset_mm_cache": _TEXT_ALONE,
    "reward": "Use classify or score.",
    "set_tokenizer": "Pass tokenizer=… when you create the engine.",
    "start_profile": _PROFILE,
    "stop_profile": _PROFILE,
}


def absent(kind: str, name: str, known: Iterable[str]) -> AttributeError:
    """Return the error for an attribute that an engine of this `kind` lacks; `known` are its attributes."""
    if name in _INSTEAD:
        return AttributeError(f"{kind} has no {name!r}. {_INSTEAD[name]}")
    near = None if name.startswith("_") else near_name(name, [other for other in known if not other.startswith("_")])
    return AttributeError(f"{kind} has no attribute {name!r}.{f' Did you mean {near!r}?' if near else ''}")


class EngineBase:
    """Base class of `LLM` and `AsyncLLM`."""

    _frontend: Frontend

    def __new__(cls, *values: Any, **keywords: Any) -> Self:
        check_keywords(cls.__name__, values, keywords)
        return object.__new__(cls)

    if TYPE_CHECKING:

        def __init__(self, model: str | PathLike[str], **keywords: Unpack[EngineKeywords]) -> None: ...

    else:

        def __getattr__(self, name: str) -> Any:
            raise absent(type(self).__name__, name, dir(type(self)))

    def __repr__(self) -> str:
        config = self._frontend.config
        state = f"fingerprint={self.fingerprint!r}" if self.fingerprint else "not started"
        return f"{type(self).__name__}({config.model!r}, seed={config.seed}, {state})"

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> Self:
        """Create an engine with these keywords. Raises the constructor's errors."""
        return cls(**keywords_of(engine_args))

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer in use."""
        return self._frontend.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return a copy of the parameters used when none are given."""
        return self._frontend.default_sampling_params.clone()

    @property
    def fingerprint(self) -> str:
        """Short digest of `fingerprint_parts`: the same fingerprint, seed and request give the same bits.

        Empty before an `AsyncLLM` is started.
        """
        return self._frontend.fingerprint

    @property
    def fingerprint_parts(self) -> dict[str, str]:
        """The values that `fingerprint` is a digest of, by name."""
        return dict(self._frontend.bits)

    @property
    def fingerprint_environment(self) -> dict[str, str]:
        """Facts that no bit depends on, by name: threads, the versions of Python and of this package, …"""
        return dict(self._frontend.environment)

    @property
    def model_folder(self) -> Path:
        """The folder of the model in use."""
        return Path(self._frontend.config.model_path)

    def prepare_receipts(self) -> None:
        """Hash the model's files, which receipts name; the first receipt does it otherwise. Raises ModelError."""
        self._frontend.recorder.prepare()

    def record_beams(self, searches: BeamSearches) -> None:
        """Make the receipts of searches that the caller has run, if this engine records. Raises RecordError."""
        searches.record(self._frontend.recorder)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **keywords: Any) -> TokensPrompt:
        """Return one conversation as the prompt that `LLM.chat` uses; takes its keywords and raises its errors."""
        return self._frontend.render_chat(messages, **keywords)

    def _or_default(self, params: Any) -> Any:
        return self._frontend.default_sampling_params if params is None else params
