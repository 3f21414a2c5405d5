"""A server whose model is `scripted_agent`, with some flags of `sempre serve`; `scripted_agent` starts it."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scripted_agent import TEMPLATE
from server_process import ServerProcess

from sempre.engine import AsyncLLM
from sempre.engine.client.asynchronous import AsyncProcessClient
from sempre.engine.client.engine_process import ProcessOptions
from sempre.engine.server.config import server_config
from sempre.engine.server.logs import set_up_logging
from sempre.engine.server.run import serve


@contextmanager
def scripted_agent(folder: Path, *flags: str, headers: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server with a folder of its own."""
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    flags = ("--chat-template", str(template), *flags)
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    with ServerProcess(
        folder / "log", *flags, environment=environment, headers=headers, program=(__file__,)
    ) as process:
        yield process


class _ScriptedLLM(AsyncLLM):
    async def _launch(self) -> None:
        options = ProcessOptions(worker_module="scripted_agent")
        self._client = await AsyncProcessClient.launch(self._frontend.config, options=options)
        self._frontend.connect(self._client.ready)
        self._reader = asyncio.create_task(self._read(self._client))


def main() -> None:
    """Serve until a signal."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--host")
    parser.add_argument("--chat-template")
    parser.add_argument("--tool-call-parser", default="hermes")
    parser.add_argument("--reasoning-parser", default="qwen3")
    parser.add_argument("--api-key", action="append", default=[])
    given: dict[str, Any] = vars(parser.parse_args())
    model, template = given.pop("model"), given.pop("chat_template")
    set_up_logging("text", debug=False)
    serve(_ScriptedLLM(model, chat_template=template), server_config({"enable_auto_tool_choice": True, **given}))


if __name__ == "__main__":
    main()
