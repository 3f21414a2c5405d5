"""LiteLLM, LangChain and Instructor with a server: seeds, streams, tools and typed answers.

    sempre serve tiny --port 8000
    pip install litellm                  # or langchain-openai, or instructor
    python examples/client_libraries.py litellm http://127.0.0.1:8000

Each library is asked twice with one seed, once as a stream, and for an answer of a given form.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

QUESTION = "Describe a ship."
FORM = "Report a departure."
MODEL = "tiny"
SEED = 7
MOST_TOKENS = 48


class Answers(NamedTuple):
    """What a library returns for QUESTION, and for FORM as the arguments of a tool or the fields of a type."""

    once: str
    again: str
    streamed: str
    of_another_seed: str
    departure: dict[str, Any]
    departure_again: dict[str, Any]


def litellm(url: str) -> Answers:
    from litellm import completion

    def ask(content: str, **fields: Any) -> Any:
        messages = [{"role": "user", "content": content}]
        fields = {"seed": SEED, "max_tokens": MOST_TOKENS, **fields}
        return completion(
            model=f"hosted_vllm/{MODEL}", api_base=f"{url}/v1", api_key="none", messages=messages, **fields
        )

    def text(**fields: Any) -> str:
        return str(ask(QUESTION, **fields).choices[0].message.content)

    def departure() -> dict[str, Any]:
        answer = ask(FORM, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=160)
        [call] = answer.choices[0].message.tool_calls
        found: dict[str, Any] = json.loads(call.function.arguments)
        return found

    parts = [chunk.choices[0].delta.content or "" for chunk in ask(QUESTION, stream=True)]
    return Answers(text(), text(), "".join(parts), text(seed=SEED + 1), departure(), departure())


def langchain(url: str) -> Answers:
    from langchain_openai import ChatOpenAI

    def model(**fields: Any) -> Any:
        fields = {"seed": SEED, "max_tokens": MOST_TOKENS, **fields}
        return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", **fields)  # type: ignore[arg-type]

    def text(**fields: Any) -> str:
        return str(model(**fields).invoke(QUESTION).content)

    def departure() -> dict[str, Any]:
        bound = model(max_tokens=160).bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
        answer = bound.invoke(FORM)
        [call] = answer.tool_calls
        found: dict[str, Any] = call["args"]
        return found

    parts = [str(chunk.content) for chunk in model().stream(QUESTION)]
    return Answers(text(), text(), "".join(parts), text(seed=SEED + 1), departure(), departure())


def instructor(url: str) -> Answers:
    from instructor import Mode, from_openai
    from openai import OpenAI
    from pydantic import BaseModel, ConfigDict

    class Departure(BaseModel):
        model_config = ConfigDict(extra="forbid")
        harbour: Literal["Nantucket", "Plymouth"]
        day: Literal["Monday", "Tuesday"]

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    typed = from_openai(client, mode=Mode.JSON_SCHEMA)

    def ask(stream: bool, **fields: Any) -> Any:
        messages: Any = [{"role": "user", "content": QUESTION}]
        fields = {"seed": SEED, "max_tokens": MOST_TOKENS, **fields}
        return client.chat.completions.create(model=MODEL, messages=messages, stream=stream, **fields)

    def text(**fields: Any) -> str:
        return str(ask(False, **fields).choices[0].message.content)

    def departure() -> dict[str, Any]:
        messages: Any = [{"role": "user", "content": FORM}]
        found = typed.chat.completions.create(
            model=MODEL, messages=messages, response_model=Departure, seed=SEED, max_tokens=160, max_retries=0
        )
        return dict(found.model_dump())

    parts = [chunk.choices[0].delta.content or "" for chunk in ask(True)]
    return Answers(text(), text(), "".join(parts), text(seed=SEED + 1), departure(), departure())


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "departure",
        "description": "Report when a ship leaves.",
        "parameters": {
            "type": "object",
            "properties": {
                "harbour": {"enum": ["Nantucket", "Plymouth"]},
                "day": {"enum": ["Monday", "Tuesday"]},
            },
            "required": ["harbour", "day"],
            "additionalProperties": False,
        },
    },
}
LIBRARIES: dict[str, Callable[[str], Answers]] = {
    "litellm": litellm,
    "langchain": langchain,
    "instructor": instructor,
}


def main() -> None:
    name, *rest = sys.argv[1:] or ["litellm"]
    found = LIBRARIES[name](rest[0] if rest else "http://127.0.0.1:8000")
    print(f"answer: {found.once!r}")
    print(f"departure: {json.dumps(found.departure)}")
    print("again:", "equal" if found.again == found.once else "different")
    print("streamed:", "equal" if found.streamed == found.once else "different")
    print("another seed:", "equal" if found.of_another_seed == found.once else "different")
    print("departure again:", "equal" if found.departure_again == found.departure else "different")


if __name__ == "__main__":
    main()
