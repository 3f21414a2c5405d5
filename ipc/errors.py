"""Every exception a user can see, in one tree.

SempreError
├── ConfigError                a setting or argument is refused          (parameter, value); also a ValueError
│   └── RequestError           one request is refused                    (request_id)
│       └── RequestCrashed     its worker crashed with it repeatedly     (num_crashes)
├── ModelError                 a checkpoint cannot be used
│   ├── UnknownArchitecture    no decoder for it                         (architecture)
│   └── TensorMismatch         a tensor is missing or does not fit       (tensor, expected, found)
├── InvarianceError            an operation cannot keep the guarantee    (operation)
├── SeedMismatch               a worker's RNG digests differ             (rank, expected, found)
├── ProtocolError              a frame is refused
│   ├── MessageMalformed       it does not decode                        (field)
│   ├── MessageTooLarge        it exceeds the limit                      (size_bytes, limit_bytes)
│   ├── FrameLost              frames of a link are missing              (expected, found)
│   └── VersionMismatch        the peer speaks another protocol          (expected, found)
├── RecordError                a saved run or receipt cannot be used    (path, line)
├── ServerError                an HTTP server fails or cannot be reached (url, status)
├── RanksDiffer                ranks of a replica computed different results (rank, step_id, request_id)
├── StartupError               a process did not become ready            (rank, cause)
├── EngineUnhealthy            a worker is unhealthy                     (rank, cause)
└── EngineDeadError            the engine cannot go on
    ├── WorkerDied             (rank, exitcode, cause, worker_traceback)
    └── CoordinatorDied        (exitcode, cause)
"""

from __future__ import annotations


class SempreError(Exception):
    """Base of all errors raised by the project."""


class ConfigError(SempreError, ValueError):
    """A setting or argument is refused; `parameter` names it, `value` is what was found."""

    def __init__(self, message: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


class RequestError(ConfigError):
    """One request is refused or failed; the engine and all other requests continue."""

    def __init__(
        self, message: str, *, parameter: str | None = None, value: object = None, request_id: str | None = None
    ) -> None:
        super().__init__(message, parameter=parameter, value=value)
        self.request_id = request_id


class RequestCrashed(RequestError):
    """A request that was running each time its worker died is not retried; the engine and all others continue."""

    def __init__(
        self,
        message: str,
        *,
        parameter: str | None = None,
        value: object = None,
        request_id: str | None = None,
        num_crashes: int = 0,
    ) -> None:
        super().__init__(message, parameter=parameter, value=value, request_id=request_id)
        self.num_crashes = num_crashes


class ModelError(SempreError):
    """A checkpoint cannot be used."""


class UnknownArchitecture(ModelError):
    """No decoder exists for the checkpoint's architecture."""

    def __init__(self, message: str, *, architecture: str) -> None:
        super().__init__(message)
        self.architecture = architecture


class TensorMismatch(ModelError):
    """A tensor is missing, unexpected, or has another shape or dtype."""

    def __init__(self, message: str, *, tensor: str, expected: str, found: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class InvarianceError(SempreError):
    """An operation does not keep the guarantee on this machine; `operation` names it."""

    def __init__(self, message: str, *, operation: str) -> None:
        super().__init__(message)
        self.operation = operation


class SeedMismatch(SempreError):
    """A worker's random states differ from those of its peers."""

    def __init__(self, message: str, *, rank: int, expected: str, found: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.expected = expected
        self.found = found


class ProtocolError(SempreError):
    """A frame from a peer is refused."""


class MessageMalformed(ProtocolError):
    """A frame does not decode; `field` is the path of the first offending field."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class MessageTooLarge(ProtocolError):
    """A frame exceeds the size limit."""

    def __init__(self, message: str, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class FrameLost(ProtocolError):
    """Frames of an established link did not arrive; the counts are sequence numbers."""

    def __init__(self, message: str, *, expected: int, found: int) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class VersionMismatch(ProtocolError):
    """The peer speaks another version of the protocol."""

    def __init__(self, message: str, *, expected: int, found: int) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class RecordError(SempreError):
    """A saved run or a receipt cannot be read, verified or written; `line` is that of its file, from 1."""

    def __init__(self, message: str, *, path: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.line = line


class ServerError(SempreError):
    """An HTTP server failed or cannot be reached; `status` is that of its response, if any."""

    def __init__(self, message: str, *, url: str, status: int | None = None) -> None:
        super().__init__(message)
        self.url = url
        self.status = status


class RanksDiffer(SempreError):
    """The ranks that share a replica did not compute the same in a step; `rank` is the first that differs."""

    def __init__(self, message: str, *, rank: int, step_id: int, request_id: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.step_id = step_id
        self.request_id = request_id


class StartupError(SempreError):
    """A process did not become ready; `cause` is its last message."""

    def __init__(self, message: str, *, rank: int | None = None, cause: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause


class EngineUnhealthy(SempreError):
    """Requests may wait: a worker is being restarted, silent or stuck; `rank` is None for the coordinator."""

    def __init__(self, message: str, *, rank: int | None = None, cause: str = "") -> None:
        super().__init__(message)
        self.rank = rank
        self.cause = cause


class EngineDeadError(SempreError):
    """The engine cannot continue; unfinished requests are lost."""


class WorkerDied(EngineDeadError):
    """A worker process ended or stopped answering."""

    def __init__(
        self, message: str, *, rank: int, exitcode: int | None = None, cause: str = "", worker_traceback: str = ""
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.exitcode = exitcode
        self.cause = cause
        self.worker_traceback = worker_traceback


class CoordinatorDied(EngineDeadError):
    """The coordinator process ended or stopped answering."""

    def __init__(self, message: str, *, exitcode: int | None = None, cause: str = "") -> None:
        super().__init__(message)
        self.exitcode = exitcode
        self.cause = cause


def too_long(num_prompt_tokens: int, max_model_len: int, num_output_tokens: int = 1) -> str:
    """A prompt that leaves no room for an output; one that is pooled has none."""
    prompt = _prompt(num_prompt_tokens, num_output_tokens)
    return (
        f"{_limit(max_model_len)} {prompt} is longer than the maximum model length of "
        f"{max_model_len}. Make sure that `max_model_len` is no smaller than the number of text tokens (prompt + "
        "requested output tokens). Please reduce the length of the prompt or raise max_model_len."
    )


def too_long_for_cache(
    num_prompt_tokens: int, max_model_len: int, max_kv_tokens: int, num_output_tokens: int = 1
) -> str:
    """A prompt that fits the model but not the KV cache of `max_kv_tokens` tokens."""
    prompt = _prompt(num_prompt_tokens, num_output_tokens)
    return (
        f"{_limit(max_model_len)} {prompt} does not fit into the KV cache of {max_kv_tokens} "
        "tokens. Shorten the prompt or raise kv_cache_memory_bytes."
    )


def too_many_characters(num_characters: int, max_model_len: int) -> str:
    """A prompt that is not encoded at all, since no encoding of it could fit."""
    return (
        f"{_limit(max_model_len)} The decoder prompt ({num_characters} characters) is longer than the maximum model "
        f"length of {max_model_len}, however it is encoded. Shorten the prompt or raise max_model_len."
    )


def _limit(max_model_len: int) -> str:
    return f"This model's maximum context length is {max_model_len} tokens."


def _prompt(num_prompt_tokens: int, num_output_tokens: int) -> str:
    if not num_output_tokens:
        return f"The prompt (length {num_prompt_tokens})"
    return f"The decoder prompt (length {num_prompt_tokens}) plus the number of requested output tokens (at least 1)"
