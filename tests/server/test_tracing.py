"""Spans of requests, by the real SDK in the server's process."""

from __future__ import annotations

import json
from pathlib import Path

from server_process import ServerProcess

# A program that sets up an SDK as an application would, then runs the command line.
PROGRAM = """
import sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from sempre.engine.cli.main import main
provider = TracerProvider()
path = sys.argv.pop(1)
file = open(path, "a", buffering=1)
exporter = ConsoleSpanExporter(out=file, formatter=lambda span: span.to_json(indent=None) + "\\n")
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
sys.exit(main(["serve", *sys.argv[1:]]))
"""
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_a_request_is_a_span_with_seed_and_fingerprint(tmp_path: Path) -> None:
    program, spans = tmp_path / "program.py", tmp_path / "spans"
    program.write_text(PROGRAM)
    with ServerProcess(tmp_path / "log", "--num-threads", "1", program=(str(program), str(spans))) as server:
        fields = {"prompt": ["It is", "The ship"], "max_tokens": 3, "seed": 9, "ignore_eos": True}
        answer = server.http.post("/v1/completions", json=fields, headers={"traceparent": PARENT}).json()
        assert server.complete(prompt="a", allowed_token_ids=[10**6]).status_code == 400
    # the HTTP framework may have spans of its own
    found_spans = [json.loads(line) for line in spans.read_text().splitlines()]
    good, bad = (span for span in found_spans if span["name"] == "llm_request")
    assert good["context"]["trace_id"] == "0x" + PARENT.split("-")[1]
    assert good["parent_id"] is not None
    found = good["attributes"]
    assert found["sempre.fingerprint"] == answer["system_fingerprint"]
    assert (found["sempre.seed"], found["gen_ai.request.id"]) == (["9", "9"], answer["id"].removeprefix("cmpl-"))
    assert (found["gen_ai.usage.prompt_tokens"], found["gen_ai.usage.completion_tokens"]) == (4, 6)
    assert bad["events"][0]["name"] == "exception"
