"""What requests of agents have beside the fields of OpenAI and Anthropic: this engine's own parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from msgspec import Meta, Struct, structs

from sempre.engine.server.errors import APIError
from sempre.engine.server.requests import Count, NotNegative, Penalty, Seed, Share, TokenId
from sempre.ipc.errors import ConfigError

_CACHE_SALT = Meta(min_length=1, description="requests with different salts share no prefix cache")


class SamplingFields(Struct, kw_only=True):
    """They mean what they mean at /v1/chat/completions."""

    model: Annotated[str | None, Meta(description="a name at /v1/models; default: the served model")] = None
    stream: bool = False
    seed: Annotated[Seed | None, Meta(description="the response reports the seed used")] = None
    temperature: NotNegative | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    skip_special_tokens: bool | None = None
    thinking_token_budget: Annotated[int, Meta(ge=-1)] | None = None
    structured_outputs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), lt=2**31)] | None = None
    cache_salt: Annotated[str, _CACHE_SALT] | None = None
    request_id: str | None = None
    stream_interval: Annotated[int, Meta(ge=1)] | None = None


_NAMES = tuple(field.name for field in structs.fields(SamplingFields))


def sampling_of(request: SamplingFields) -> dict[str, Any]:
    """Return those fields that a request gives."""
    given = {name: getattr(request, name) for name in _NAMES}
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Make errors name the request's own fields; `names`: field of /v1/chat/completions → field of the request."""
    try:
        yield
    except APIError as error:
        told, param = _renamed(str(error), error.param, names)
        raise APIError(error.status, told, param=param, headers=error.headers) from None
    except ConfigError as error:
        told, param = _renamed(str(error), error.parameter, names)
        raise APIError(400, told, param=param) from None


def _renamed(text: str, param: str | None, names: Mapping[str, str]) -> tuple[str, str | None]:
    """(text, param) with the new name."""
    field = re.split(r"[.\[]", param or "", maxsplit=1)[0]
    if param is None or field not in names:
        return text, param
    told = names[field] + text.removeprefix(field) if text.startswith(field) else text
    return told, names[field] + param.removeprefix(field)
