"""The axes of the guarantee that can be checked from outside, of any server with OpenAI's /v1/completions.

The reference is each request alone, after one that warms the server up. Whatever a server does not report is not
compared: without log-probabilities, texts are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from sempre.engine.cli.remote.connection import Server
from sempre.engine.outputs import Logprob
from sempre.engine.proof.axis_result import AxisResult, judged, not_checked
from sempre.engine.proof.kept_output import KeptOutput
from sempre.ipc.errors import RequestError, ServerError

_MAX_TOKENS = 32
_NUM_CHOICES = 3
# requests that only make load
_NUM_MATES = 16
_WORDS = (
    "It is a truth universally acknowledged, that",
    "The sea, the sea, the sea,",
    "Once upon a time there was",
    "In the beginning",
    "Count: one, two, three, four, five, six,",
    "A",
)
_SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.0},
)
Body = dict[str, Any]


class BlackBox:
    """Checks one server."""

    def __init__(self, server: Server, engine: str, model: str | None) -> None:
        """`engine` decides which fields beyond OpenAI's are sent. Raises ServerError, UsageError for the model."""
        self._server = server
        self._engine = engine
        self._common: Body = {"model": server.model(model), "max_tokens": _MAX_TOKENS, "logprobs": 1}
        if engine != "llama.cpp":
            self._common["ignore_eos"] = True
        self._ids: dict[str, int] = {}
        self._bodies = self._requests()
        self._alone: list[KeptOutput] = []
        self.fingerprint = ""

    def results(self) -> Iterator[AxisResult]:
        """Yield each axis as it is done. Raises RequestError if the server refuses the requests, ServerError."""
        self._one(self._bodies[0])
        self._alone = [self._one(body) for body in self._bodies]
        self.fingerprint = self._alone[0].fingerprint
        for name, check in _AXES.items():
            yield replace(self._checked(check), axis=name)

    def _checked(self, check: Callable[[BlackBox], AxisResult]) -> AxisResult:
        try:
            return check(self)
        except RequestError as error:
            return not_checked(f"the server refuses it: {error}")

    def _requests(self) -> list[Body]:
        """Prompts of one word to some hundred, some with a common beginning, each with every kind of sampling."""
        prompts = [*_WORDS, *(f"{_WORDS[0]} {word} " * 12 for word in ("and", "but", "or"))]
        return [
            {**self._common, "prompt": prompt, "seed": 1000 + place, **_SAMPLING[place % len(_SAMPLING)]}
            for place, prompt in enumerate(prompts + prompts[::-1])
        ]

    # the axes

    def retried(self) -> AxisResult:
        """The same requests once more, one at a time."""
        return judged(self._alone, [self._one(body) for body in self._bodies])

    def under_load(self) -> AxisResult:
        """All at once, beside other requests."""
        return judged(self._alone, self._at_once(self._bodies, _NUM_MATES))

    def backwards(self) -> AxisResult:
        """All at once, in the reverse order."""
        return judged(self._alone, self._at_once(self._bodies[::-1], 0)[::-1])

    def streamed(self) -> AxisResult:
        """As streams, all at once."""
        with ThreadPoolExecutor(len(self._bodies)) as pool:
            return judged(self._alone, list(pool.map(self._stream, self._bodies)))

    def without_logprobs(self) -> AxisResult:
        """Without log-probabilities: the same texts."""
        bodies = [{name: value for name, value in body.items() if name != "logprobs"} for body in self._bodies]
        expected = [self._text_alone(kept) for kept in self._alone]
        return judged(expected, [self._text_alone(kept) for kept in self._at_once(bodies, 0)])

    def siblings(self) -> AxisResult:
        """Completions of n, asked for twice: alone and all at once."""
        bodies = [{**body, "n": _NUM_CHOICES} for body in self._bodies if body["temperature"]][:4]
        expected = [kept for body in bodies for kept in self._choices(body)]
        with ThreadPoolExecutor(len(bodies)) as pool:
            found = [kept for choices in pool.map(self._choices, bodies) for kept in choices]
        return judged(expected, found)

    def other_seeds(self) -> AxisResult:
        """A control: each sampled request with another seed."""
        places = [place for place, body in enumerate(self._bodies) if body["temperature"]]
        bodies = [{**self._bodies[place], "seed": self._bodies[place]["seed"] + 7} for place in places]
        return judged([self._alone[place] for place in places], self._at_once(bodies, 0), is_control=True)

    # requests

    def _at_once(self, bodies: Sequence[Body], num_mates: int) -> list[KeptOutput]:
        mates = [
            {**self._bodies[i % len(self._bodies)], "seed": 9000 + i, "temperature": 1.0} for i in range(num_mates)
        ]
        with ThreadPoolExecutor(len(bodies) + num_mates) as pool:
            others = [pool.submit(self._one, mate) for mate in mates]
            found = list(pool.map(self._one, bodies))
            for other in others:
                other.result()
        return found

    def _one(self, body: Body) -> KeptOutput:
        return self._choices(body)[0]

    def _choices(self, body: Body) -> list[KeptOutput]:
        answer = self._server.post("/v1/completions", body)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not choices:
            raise ServerError(f"{self._server.url}/v1/completions answered without choices", url=self._server.url)
        told = str(answer.get("system_fingerprint") or "")
        return [self._kept(body, choice, told) for choice in sorted(choices, key=lambda each: int(each["index"]))]

    def _stream(self, body: Body) -> KeptOutput:
        whole: dict[str, Any] = {"index": 0, "text": "", "finish_reason": None}
        tokens: list[str] = []
        values: list[float | None] = []
        told = ""
        for chunk in self._server.stream("/v1/completions", {**body, "stream": True}):
            told = str(chunk.get("system_fingerprint") or told)
            for choice in chunk.get("choices") or ():
                whole["text"] += choice.get("text") or ""
                whole["finish_reason"] = choice.get("finish_reason") or whole["finish_reason"]
                more = _tokens_of(choice)
                if more is not None:
                    tokens += more[0]
                    values += more[1]
        if tokens:
            whole["logprobs"] = {"tokens": tokens, "token_logprobs": values}
        return self._kept(body, whole, told)

    def _kept(self, body: Body, choice: Mapping[str, Any], told: str) -> KeptOutput:
        found = _tokens_of(choice)
        tokens, values = ([str(choice.get("text", ""))], None) if found is None else found
        ids = [self._ids.setdefault(token, len(self._ids)) for token in tokens]
        rows = None
        if values is not None:
            numbers = [math.nan if value is None else float(value) for value in values]
            rows = [
                {token_id: Logprob(number, None, token)}
                for token_id, number, token in zip(ids, numbers, tokens, strict=True)
            ]
        return KeptOutput(
            name=f"prompt {str(body['prompt'])[:24]!r}, seed {body['seed']}, temperature {body['temperature']:g}:",
            token_ids=ids,
            finish_reason=choice.get("finish_reason"),
            stop_reason=None,
            seed=body["seed"],
            fingerprint=told,
            prompt_digest=str(body["prompt"]),
            logprobs=None if rows is None else [next(iter(row.values())).logprob for row in rows],
            rows=rows,
        )

    def _text_alone(self, kept: KeptOutput) -> KeptOutput:
        """The text as one token, since texts are divided into tokens only where these are reported."""
        names = {token_id: token for token, token_id in self._ids.items()}
        text = "".join(names[token_id] for token_id in kept.token_ids)
        return replace(kept, token_ids=[self._ids.setdefault(text, len(self._ids))], logprobs=None, rows=None)


def _tokens_of(choice: Mapping[str, Any]) -> tuple[list[str], list[float | None]] | None:
    """Return tokens and log-probabilities, in the form of completions or that of chats; None without any."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return None
    if found.get("tokens"):
        return [str(token) for token in found["tokens"]], list(found["token_logprobs"])
    content = found.get("content")
    if not content:
        return None
    return [str(entry["token"]) for entry in content], [entry["logprob"] for entry in content]


_AXES: dict[str, Callable[[BlackBox], AxisResult]] = {
    "retried": BlackBox.retried,
    "under load": BlackBox.under_load,
    "order of arrival": BlackBox.backwards,
    "streamed": BlackBox.streamed,
    "without log-probabilities": BlackBox.without_logprobs,
    "completions of n": BlackBox.siblings,
    "control: other seeds": BlackBox.other_seeds,
}
