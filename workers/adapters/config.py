"""`adapter_config.json`, as PEFT writes it: what of it a worker can serve, and everything else refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from sempre.ipc.adapter_files import CONFIG_FILE
from sempre.ipc.errors import ModelError
from sempre.ipc.model_files import read_json_object, shown

ALL_LINEAR = "all-linear"
# decide nothing when an adapter is used, or what the tensors' names say already
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
        "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "lora_alpha", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_rslora",
    }
)  # fmt: skip
_HINTS = {
    "lora_bias": "biases of adapters are not supported",
    "modules_to_save": "whole modules beside the adapter are not supported; merge the adapter into the checkpoint",
    "target_parameters": "adapters of parameters, such as stacked experts, are not supported",
    "trainable_token_indices": "trained embeddings are not supported",
    "use_dora": "DoRA is not supported; merge the adapter into the checkpoint",
}
# others change the model's own weights as well
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class AdapterConfig:
    """What decides which modules an adapter changes, and by how much."""

    source: Path
    rank: int
    alpha: float
    use_rslora: bool
    targets: str | tuple[str, ...]
    """a regular expression, ALL_LINEAR, or names or ends of names"""
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def changes(self, module: str) -> bool:
        """Whether the adapter should have tensors for a linear module of this name."""
        if _matches(module, self.excluded):
            return False
        if self.layers is not None and isinstance(self.targets, tuple) and _layer(module) not in self.layers:
            return False
        return self.targets == ALL_LINEAR or _matches(module, self.targets)

    def rank_of(self, module: str) -> int:
        """The rank that the file says a module's matrices have."""
        return next((rank for key, rank in self.rank_pattern.items() if _fits(key, module)), self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of B A."""
        rank = self.rank_of(module)
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _fits(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def refuse(self, field: str, expected: str, found: object) -> NoReturn:
        """Raises ModelError."""
        raise ModelError(f"{self.source}: {field}: expected {expected}, found {shown(found)}.")


def read_config(folder: Path) -> AdapterConfig:
    """Raises ModelError naming file, field, what is expected and what is found."""
    source = folder / CONFIG_FILE
    raw = read_json_object(source)
    fields = _Fields(source, raw)
    fields.check_known()
    config = AdapterConfig(
        source=source,
        rank=fields.rank("r", raw.get("r", 8)),
        alpha=fields.number("lora_alpha", raw.get("lora_alpha", 8)),
        use_rslora=fields.boolean("use_rslora"),
        targets=fields.names("target_modules"),
        excluded=fields.names("exclude_modules"),
        layers=fields.layers(),
        rank_pattern={key: fields.rank(f"rank_pattern.{key}", value) for key, value in fields.pattern("rank_pattern")},
        alpha_pattern={
            key: fields.number(f"alpha_pattern.{key}", value) for key, value in fields.pattern("alpha_pattern")
        },
    )
    if not config.targets:
        config.refuse("target_modules", "names of modules, a regular expression or 'all-linear'", config.targets)
    return config


class _Fields:
    """The fields of one file."""

    def __init__(self, source: Path, raw: Mapping[str, object]) -> None:
        self._source = source
        self._raw = raw

    def fail(self, field: str, expected: str, found: object) -> NoReturn:
        raise ModelError(f"{self._source}: {field}: expected {expected}, found {shown(found)}.")

    def check_known(self) -> None:
        """Refuse other methods, and fields that would change the result."""
        if self._raw.get("peft_type") != "LORA":
            self.fail("peft_type", "'LORA'", self._raw.get("peft_type"))
        if self._raw.get("bias", "none") != "none":
            self.fail("bias", "'none', as biases are the model's own", self._raw["bias"])
        initial = self._raw.get("init_lora_weights", True)
        if not any(initial is known or (isinstance(known, str) and initial == known) for known in _INITIALISATIONS):
            expected = "one that leaves the model's weights as they are (true, false, gaussian, eva, orthogonal)"
            self.fail("init_lora_weights", expected, initial)
        for field, value in self._raw.items():
            if field in _WITHOUT_EFFECT or (field in _READ and field != "modules_to_save"):
                continue
            if value not in (None, False) and value not in ([], {}, ""):
                self.fail(field, f"nothing, since {_HINTS.get(field, 'this is not supported')}", value)

    def rank(self, field: str, value: object) -> int:
        if type(value) is not int or value < 1:
            self.fail(field, "a positive integer", value)
        return value

    def number(self, field: str, value: object) -> float:
        if type(value) not in (int, float) or not abs(float(value)) < 1e9:  # type: ignore[arg-type]
            self.fail(field, "a number", value)
        return float(value)  # type: ignore[arg-type]

    def boolean(self, field: str) -> bool:
        value = self._raw.get(field, False)
        if type(value) is not bool:
            self.fail(field, "true or false", value)
        return value

    def names(self, field: str) -> str | tuple[str, ...]:
        value = self._raw.get(field)
        if value is None:
            return ()
        if isinstance(value, str):
            if value != ALL_LINEAR:
                self._compiled(field, value)
            return value
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.fail(field, "a list of names, or a regular expression", value)
        return tuple(value)

    def layers(self) -> tuple[int, ...] | None:
        value = self._raw.get("layers_to_transform")
        if value is None:
            return None
        if self._raw.get("layers_pattern") not in (None, [], "", "layers", ["layers"]):
            self.fail("layers_pattern", "'layers'", self._raw["layers_pattern"])
        layers = value if isinstance(value, list) else [value]
        if not all(type(layer) is int for layer in layers):
            self.fail("layers_to_transform", "numbers of layers", value)
        return tuple(layers)

    def pattern(self, field: str) -> list[tuple[str, object]]:
        value = self._raw.get(field) or {}
        if not isinstance(value, dict):
            self.fail(field, "an object", value)
        for key in value:
            self._compiled(field, key)
        return list(value.items())

    def _compiled(self, field: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            self.fail(field, f"a regular expression ({error})", pattern)


def _matches(module: str, names: str | tuple[str, ...]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _fits(key: str, module: str) -> bool:
    """As PEFT looks up its patterns."""
    return re.fullmatch(rf"(.*\.)?({key})", module) is not None


def _layer(module: str) -> int | None:
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", module)
    return None if found is None else int(found.group(1))
