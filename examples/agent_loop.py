"""A loop of tool calls with the `openai` client; with the same seed it takes the same steps, every time.

    sempre serve tiny --port 8000
    python examples/agent_loop.py http://127.0.0.1:8000

The first step must call a tool (a form that the server enforces, so even a tiny model manages), the second answers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from openai import OpenAI

DEPARTURES = {"Nantucket": "the Pequod, at dawn", "Plymouth": "no ship today"}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "departures",
            "description": "The next ship that leaves a harbour.",
            "parameters": {
                "type": "object",
                "properties": {"harbour": {"enum": sorted(DEPARTURES)}},
                "required": ["harbour"],
                "additionalProperties": False,
            },
        },
    }
]


def run(client: OpenAI, model: str) -> list[dict[str, Any]]:
    """The messages of one conversation."""
    messages: list[Any] = [{"role": "user", "content": "When does a ship leave?"}]
    while len(messages) < 8:
        choice = "required" if len(messages) == 1 else "none"
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice=choice,
            parallel_tool_calls=False,
            seed=7,
            max_tokens=160,
        )
        message = answer.choices[0].message
        calls = message.tool_calls or []
        messages.append(
            {
                "role": "assistant",
                "content": message.content,
                # ids are made up for each call, so they are numbered for the comparison below
                "tool_calls": [
                    {"id": f"call-{len(messages)}-{i}", "type": "function", "function": call.function.model_dump()}
                    for i, call in enumerate(calls)
                    if call.type == "function"
                ],
            }
        )
        if not calls:
            return messages
        for call in messages[-1]["tool_calls"]:
            harbour = json.loads(call["function"]["arguments"])["harbour"]
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": DEPARTURES[harbour]})
    raise RuntimeError("The model still calls tools after eight messages.")


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    first, second = run(client, model), run(client, model)
    for message in first:
        calls = [f"{c['function']['name']}({c['function']['arguments']})" for c in message.get("tool_calls", [])]
        print(f"{message['role']}: {calls[0] if calls else repr(message['content'])}")
    print("both loops:", "equal" if first == second else "different")


if __name__ == "__main__":
    main()
