"""Outputs in a file: a line that says what follows, then one output per line, each log-probability exact.

A float32 is written as the shortest decimal of its value as a double, which reads back to the same bits. JSON has no
infinity and no NaN; they are written as the strings `Infinity`, `-Infinity` and `NaN`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from sempre.engine.outputs import RequestOutput
from sempre.engine.proof.json_lines import JsonLine, line_error, read_json_lines
from sempre.engine.version import __version__
from sempre.ipc.errors import ConfigError, RecordError

SCHEMA = "sempre/outputs/v1"
# fields whose numbers may be ones that JSON lacks
_NUMBERS = frozenset({"logprob", "cumulative_logprob", "pooled", "prompt_token_id_logprobs"})


def save_outputs(outputs: Sequence[RequestOutput], path: str | os.PathLike[str]) -> None:
    """Write outputs to `path`, which is replaced only when all of them are on disk.

    Raises ConfigError for anything but outputs of `generate` or `chat`, OSError if the file cannot be written.
    """
    target = Path(path)
    for place, output in enumerate(outputs):
        if not isinstance(output, RequestOutput):
            text = f"outputs[{place}] must be a RequestOutput, got {type(output).__name__}."
            raise ConfigError(text, parameter="outputs", value=output)
    head = {"schema": SCHEMA, "count": len(outputs), "engine": __version__}
    written = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with written.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(head) + "\n")
            for output in outputs:
                file.write(output.to_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)


def load_outputs(path: str | os.PathLike[str]) -> list[RequestOutput]:
    """Return the outputs that `save_outputs` wrote. Raises RecordError naming the first line that is wrong."""
    outputs = []
    for line in read_outputs(Path(path)):
        if isinstance(line, RecordError):
            raise line
        outputs.append(line)
    return outputs


def read_outputs(path: Path) -> list[RequestOutput | RecordError]:
    """Return each saved output, or the error of its line; a truncated file has one more error at the end.

    Raises RecordError if the file is none of saved outputs.
    """
    lines = read_json_lines(path)
    count = _count(path, next(lines, None))
    found = [_output(path, line) for line in lines]
    if len(found) < count:
        text = f"{path} is truncated: expected {count} outputs, found {len(found)}. Save the run again."
        found.append(RecordError(text, path=str(path)))
    return found


def is_head(value: Mapping[str, Any]) -> bool:
    """Whether this is the first line of saved outputs, of any version."""
    return str(value.get("schema")).startswith(SCHEMA.rpartition("/")[0] + "/")


def _count(path: Path, line: JsonLine | None) -> int:
    if line is None:
        raise RecordError(f"{path} is empty: expected a line with the schema {SCHEMA}.", path=str(path))
    if line.error is not None:
        raise line.error
    schema, count = line.value.get("schema"), line.value.get("count")
    if schema != SCHEMA:
        hint = " A newer engine reads it." if is_head(line.value) else " It is no file of save_outputs."
        raise line_error(path, line.number, f"expected the schema {SCHEMA!r}, found {schema!r}.{hint}".rstrip("."))
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise line_error(path, line.number, f"count: expected a number of outputs, found {count!r}")
    return count


def _output(path: Path, line: JsonLine) -> RequestOutput | RecordError:
    if line.error is not None:
        return line.error
    try:
        output = msgspec.convert(_numbers(line.value), RequestOutput, str_keys=True)
        if output.prompt_token_id_logprobs is not None:
            output.prompt_token_id_logprobs = _matrix(output.prompt_token_id_logprobs)
        return output
    except (msgspec.ValidationError, TypeError, ValueError, AttributeError) as error:
        return line_error(path, line.number, f"expected an output, found other fields: {error}")


def _matrix(value: Any) -> npt.NDArray[np.float32]:
    """The only field that is no plain value."""
    return np.array(msgspec.convert(value, list[list[float]]), np.float32)


def _numbers(value: Any, name: str = "") -> Any:
    """Return `value` with the strings for numbers that JSON lacks as floats."""
    if isinstance(value, dict):
        return {key: _numbers(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item, name) for item in value]
    if name in _NUMBERS and value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    return value
