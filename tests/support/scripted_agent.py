"""A worker whose model calls tools: it reads the prompt and answers as a script says, with choices that its seed makes.

`scripted_agent_server.py` serves it.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from light_worker import LightWorker
from scripted_worker import next_token, run
from tokenizers import Tokenizer

from sempre.ipc.messages import LoadModel, ModelLoaded, SampledTokens, ScheduledRequest

TEMPLATE = (
    "{% for t in tools or [] %}[tool {{ t.function.name }}: {{ t.function.parameters | tojson }}]\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}{{ '\\n' }}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call {{ c.id }}>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if enable_thinking is defined %}[thinking: {{ enable_thinking }}]\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Ids of calls are part of its prompts, so a loop is only the same if they are."""
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Quito", "Perth", "Delhi", "Turin")
_RESULT = re.compile(r"<\|im_start\|>tool \S+\n(.*?)<\|im_end\|>", re.DOTALL)


def answer(prompt: str, choice: int) -> str:
    """What the model says: two calls at once, then one, then what it has learnt.

    With `[broken]` in the prompt a call that is none, with `[long]` a long one.
    """
    results = _RESULT.findall(prompt)
    if "[long]" in prompt:
        words = ", ".join(map(str, range(60)))
        return f'<tool_call>\n{{"name": "clock", "arguments": {{"of": [{words}]}}}}\n</tool_call>'
    if "[broken]" in prompt:
        return 'See:\n<tool_call>\n{"name": "weather", "arguments": {"city": [1}}\n</tool_call>'
    if "[tool " not in prompt:
        return f"No tools, city {CITIES[choice % len(CITIES)]}."
    if not results:
        city = CITIES[choice % len(CITIES)]
        return (
            f"<think>\nWhere? In {city}.\n</think>\n\nLet me see.\n"
            f'<tool_call>\n{{"name": "weather", "arguments": {{"city": "{city}", "days": [1, 2.50]}}}}\n</tool_call>\n'
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
        )
    if len(results) == 2:
        call = f'{{"name": "weather", "arguments": {{"city": "{CITIES[(choice + 1) % len(CITIES)]}"}}}}'
        return f"<think>\nOne more.\n</think>\n\n<tool_call>\n{call}\n</tool_call>"
    return f"<think>\nEnough.\n</think>\n\nI found: {'; '.join(results)}."


class ScriptedAgent(LightWorker):
    """Its tokens are those of `answer`, then the end."""

    def load_model(self, command: LoadModel) -> ModelLoaded:
        folder = Path(command.config.model_path)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._scripts: dict[str, list[int]] = {}
        return msgspec.structs.replace(super().load_model(command), vocab_size=self._tokenizer.get_vocab_size())

    def _run(self, scheduled: ScheduledRequest) -> SampledTokens:
        sequence = self._sequences[scheduled.request_id]
        if scheduled.num_computed_tokens + scheduled.num_tokens < len(sequence.token_ids):
            return SampledTokens(request_id=scheduled.request_id)
        prompt_ids = sequence.token_ids[: sequence.num_prompt_tokens]
        script = self._scripts.get(scheduled.request_id)
        if script is None:
            prompt = self._tokenizer.decode(prompt_ids, skip_special_tokens=False)
            text = answer(prompt, next_token(sequence.seed, prompt_ids))
            script = self._tokenizer.encode(text, add_special_tokens=False).ids
            self._scripts[scheduled.request_id] = script
        place = len(sequence.token_ids) - sequence.num_prompt_tokens
        end = self._tokenizer.token_to_id("<|im_end|>")
        sequence.token_ids.append(script[place] if place < len(script) else end)
        return SampledTokens(request_id=scheduled.request_id, token_ids=sequence.token_ids[-1:])


if __name__ == "__main__":
    run(ScriptedAgent)
