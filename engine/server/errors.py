"""OpenAI's error object and Anthropic's, and the HTTP status of each exception.

{"error": {"message": "…", "type": "BadRequestError", "param": "top_p", "code": 400}}
{"type": "error", "error": {"type": "invalid_request_error", "message": "…"}}          under /v1/messages
"""

from __future__ import annotations

import logging

import msgspec
from starlette.responses import Response

from sempre.ipc.errors import ConfigError, EngineDeadError, ProtocolError, RecordError

logger = logging.getLogger(__name__)

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
MESSAGES_PATH = "/v1/messages"
_TYPES_OF_MESSAGES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_LONGEST = 1000


class ErrorObject(msgspec.Struct):
    """`param` names the invalid field; `code` is the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(msgspec.Struct):
    error: ErrorObject


class MessagesErrorObject(msgspec.Struct):
    """Anthropic's, which names no field but in its text."""

    type: str
    message: str


class MessagesErrorResponse(msgspec.Struct):
    error: MessagesErrorObject
    type: str = "error"


class APIError(Exception):
    """An error response: `status` and OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        # the message often quotes what a client sent
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…")
        self.status = status
        self.param = param
        self.headers = headers or {}

    def encode(self, path: str = "") -> bytes:
        """Return the error object as JSON, in the form that clients of `path` read."""
        if path.startswith(MESSAGES_PATH):
            kind = "invalid_request_error" if self.status < 500 else "api_error"
            return msgspec.json.encode(
                MessagesErrorResponse(MessagesErrorObject(_TYPES_OF_MESSAGES.get(self.status, kind), str(self)))
            )
        error = ErrorObject(str(self), _TYPES.get(self.status, "APIError"), self.param, self.status)
        return msgspec.json.encode(ErrorResponse(error))

    def response(self, path: str = "") -> Response:
        """Return the whole response, in the form that clients of `path` read."""
        return Response(self.encode(path), self.status, self.headers, "application/json")


class BadRequest(APIError):
    """The request is invalid."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(400, message, param=param)


class Busy(APIError):
    """The request is valid and may be sent again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(503, message, headers={"Retry-After": str(retry_after_s)})


class RateLimited(APIError):
    """The client has used what its key allows for now; it may try again after `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(429, message, headers={"Retry-After": str(max(1, retry_after_s))})


class ClientGone(APIError):
    """The client has disconnected; the status is only logged."""

    def __init__(self) -> None:
        super().__init__(499, "The client closed the connection.")


RESTART_RETRY_S = 5


def api_error(error: Exception) -> APIError:
    """Return the response for `error`; an unexpected one is logged, and its response gives no details."""
    match error:
        case APIError():
            return error
        case ConfigError():
            return BadRequest(str(error), param=error.parameter)
        case EngineDeadError():
            return Busy(f"The engine cannot serve: {str(error).splitlines()[0]}", RESTART_RETRY_S)
        case ProtocolError():
            return APIError(500, f"A frame between the processes of the engine was lost: {error}")
        case RecordError():
            logger.error("%s", error)
            return APIError(500, "The receipt of this output could not be written; the server's log has the details.")
        case _:
            logger.error("unforeseen error", exc_info=error)
            return APIError(500, f"Internal server error ({type(error).__name__}); the server's log has the details.")
