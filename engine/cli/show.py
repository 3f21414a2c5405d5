"""`sempre show`: what a model on this machine is."""

from __future__ import annotations

import argparse
import json
from typing import Any

# field of config.json, what it is called here
_FACTS = {
    "architectures": "architecture",
    "dtype": "dtype",
    "torch_dtype": "dtype",
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "longest text, tokens",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("name", metavar="MODEL", help="one of `sempre list`")
    parser.add_argument("--json", action="store_true", help="print a JSON object")


def run(namespace: argparse.Namespace) -> int:
    """Print where the model is and what its config.json says of it. Nothing is downloaded or loaded."""
    from sempre.engine.cli.list import megabytes
    from sempre.engine.models.stored import stored_model
    from sempre.ipc.log_lines import plain
    from sempre.ipc.model_files import read_json_object

    model = stored_model(namespace.name)
    config_file = model.path / "config.json"
    config = read_json_object(config_file) if config_file.is_file() else {}
    facts: dict[str, Any] = {"name": model.name, "source": model.source, "folder": str(model.path)}
    facts["size"] = model.num_bytes if namespace.json else megabytes(model.num_bytes)
    text_config = config.get("text_config")
    for of_model in (config, text_config if isinstance(text_config, dict) else {}):
        facts |= {name: of_model[field] for field, name in _FACTS.items() if field in of_model and name not in facts}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        facts["quantization"] = quantization.get("quant_method")
    if namespace.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(plain(f"{name + ':':<22} {shown}"))
    return 0
