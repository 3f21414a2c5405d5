"""What decoders read from config.json, validated: unsupported fields are refused by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, NamedTuple, Self, TypeVar

from sempre.kernels.rope import RopeSpec
from sempre.kernels.states import StateShape
from sempre.workers.config_fields import ConfigFields
from sempre.workers.models.pooling import Pooling
from sempre.workers.models.rope_config import rope_of
from sempre.workers.quantization.config import StoredQuantization
from sempre.workers.quantization.stored import parse_stored

# what `layer_types` may say of a layer
FULL, WINDOWED = "full_attention", "sliding_attention"

FLOAT_DTYPES = ("float32", "bfloat16", "float16")

# More than any model has, yet cheap to handle before the tensors are checked.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 4096
MAX_WIDTH = 2**20
MAX_VOCAB_SIZE = 2**24
MAX_POSITIONS = 2**27
MAX_EOS_TOKENS = 1024

# null in these says that there is none; elsewhere it says nothing
NULLABLE = ("eos_token_id", "sliding_window")

# rows of activations are processed in vectors of this many elements
WIDTH_MULTIPLE = 16


class LayerKv(NamedTuple):
    """The keys and values of one layer."""

    num_kv_heads: int
    """0: it has none"""
    head_dim: int
    source: int | None = None
    """the layer whose keys and values it reads, which is another one of these heads; None: its own"""


class BiasRule(Enum):
    """Whether a projection has a bias."""

    NEVER = "never"
    ALWAYS = "always"
    ATTENTION_BIAS = "attention_bias"
    """set by the config's field `attention_bias`"""
    QKV_BIAS = "qkv_bias"
    """as the config's field `qkv_bias` says"""
    MLP_BIAS = "mlp_bias"
    """set by the config's field `mlp_bias`"""


class WindowRule(Enum):
    """Which layers attend to a sliding window only."""

    NEVER = "never"
    EVERY_LAYER = "every layer"
    """`sliding_window` keys in every layer; null is off"""
    UPPER_LAYERS = "upper layers"
    """`sliding_window` keys from layer `max_window_layers` on, when `use_sliding_window` is true"""
    LAYER_TYPES = "layer types"
    """`sliding_window` keys in those layers of which `layer_types` says so"""
    EVERY_OTHER_LAYER = "every other layer"
    """`sliding_window` keys in the layers of even number"""


@dataclass(frozen=True)
class FamilyRules:
    """What a family reads differently; everything else is common to decoders."""

    qkv_bias: BiasRule = BiasRule.NEVER
    o_bias: BiasRule = BiasRule.NEVER
    mlp_bias: BiasRule = BiasRule.NEVER
    window: WindowRule = WindowRule.NEVER
    rope: Callable[[ConfigFields, int, int], RopeSpec] = rope_of
    """of the config, the head dimension and max_position_embeddings"""
    qk_norm: bool = False
    """RMSNorm over each head of the queries and keys, before the rotary embedding"""
    quantization: Callable[[ConfigFields], StoredQuantization | None] = parse_stored


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: what its config.json says, resolved; families add fields. Sizes are counts of elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    """per layer: keys visible to a query, itself included; None is all"""
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    initializer_range: float
    """standard deviation of dummy weights"""
    checkpoint_dtype: str | None
    """dtype in config.json, if any"""
    eos_token_ids: tuple[int, ...]
    quantization: StoredQuantization | None
    """how the checkpoint's matrices are quantised, if they are"""
    pooling: Pooling | None = field(default=None, kw_only=True, repr=False)
    """what it computes of a prompt; None: it generates"""

    @property
    def layer_states(self) -> tuple[StateShape | None, ...]:
        """Per layer: the shape of its states; None: it has keys and values instead."""
        return (None,) * self.num_layers

    @property
    def kv_layers(self) -> tuple[LayerKv, ...]:
        """What each layer keeps in the KV cache: nothing where it keeps states."""
        return tuple(LayerKv(0 if state else self.num_kv_heads, self.head_dim) for state in self.layer_states)

    @property
    def largest_head_dim(self) -> int:
        """Of any layer."""
        return max(layer.head_dim for layer in self.kv_layers)

    @property
    def default_positions(self) -> int:
        """The longest sequence, unless a setting says otherwise."""
        trained = None if self.pooling is None else self.pooling.files.max_length
        return min(self.max_position_embeddings, trained or self.max_position_embeddings)

    @property
    def most_positions(self) -> int:
        """The longest sequence: dynamic rope reaches `factor` times as far."""
        factor = self.rope.factor if self.rope.scaling == "dynamic" else 1.0
        return int(self.max_position_embeddings * factor)

    def one_layer_per_kind(self) -> Self:
        """The same model with one layer of each kind."""
        first = {self.kind_of(layer): layer for layer in reversed(range(self.num_layers))}
        return self.with_layers(sorted(first.values()))

    def kind_of(self, layer: int) -> Hashable:
        """What tells a layer from others; families add to it."""
        return self.windows[layer]

    def with_layers(self, layers: Sequence[int]) -> Self:
        """The same model with these of its layers; families keep what they say of each layer."""
        return replace(self, num_layers=len(layers), windows=tuple(self.windows[layer] for layer in layers))


Spec = TypeVar("Spec", bound=ModelSpec)


def spec_digest(spec: ModelSpec, max_model_len: int) -> str:
    """Digest of what config.json and generation_config.json say, and of the tables of rope that depend on the setting
    `max_model_len`; the weights' digest covers tensors only."""
    ropes = [value for value in vars(spec).values() if isinstance(value, RopeSpec)]
    said = repr(spec) + "".join(rope.variant(max_model_len) for rope in ropes)
    if spec.pooling is not None:
        said += repr(spec.pooling)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def parse_decoder(architecture: str, rules: FamilyRules, fields: ConfigFields, generation: ConfigFields) -> ModelSpec:
    """Read the fields of config.json (`fields`) and generation_config.json common to decoders, by a family's rules.

    Raises ModelError naming the field.
    """
    hidden_size = width("hidden_size", fields)
    num_heads = fields.positive("num_attention_heads", most=MAX_HEADS)
    num_kv_heads = fields.positive("num_key_value_heads", default=num_heads, most=MAX_HEADS)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"a divisor of num_attention_heads={num_heads}", num_kv_heads)
    num_layers = fields.positive("num_hidden_layers", most=MAX_LAYERS)
    head_dim = _head_dim(fields, hidden_size, num_heads)
    vocab_size = fields.positive("vocab_size", most=MAX_VOCAB_SIZE)
    max_position_embeddings = fields.positive("max_position_embeddings", most=MAX_POSITIONS)
    return ModelSpec(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=width("intermediate_size", fields),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.positive_number("rms_norm_eps", default=1e-6),
        rope=rules.rope(fields, head_dim, max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        windows=_windows(fields, rules, num_layers),
        qkv_bias=_bias(fields, rules.qkv_bias),
        o_bias=_bias(fields, rules.o_bias),
        mlp_bias=_bias(fields, rules.mlp_bias),
        qk_norm=rules.qk_norm,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", default=False),
        initializer_range=fields.positive_number("initializer_range", default=0.02),
        checkpoint_dtype=_checkpoint_dtype(fields),
        eos_token_ids=_eos_token_ids(fields, generation, vocab_size),
        quantization=rules.quantization(fields),
    )


def extended(common: ModelSpec, kind: type[Spec], **more: Any) -> Spec:
    """A family's spec: the common fields, and those that the family adds."""
    return kind(**{field.name: getattr(common, field.name) for field in fields(common)}, **more)


def with_defaults(config: ConfigFields, values: Mapping[str, Any], nullable: Sequence[str] = ()) -> ConfigFields:
    """With a class's default values where the config is silent; null is silence but in NULLABLE and `nullable` fields.

    A default end of sequence that the vocabulary lacks is left out: nothing can sample it.
    """
    said = {name for name, value in config.raw.items() if value is not None or name in NULLABLE or name in nullable}
    missing = {name: value for name, value in values.items() if name not in said}
    fields = ConfigFields({**config.raw, **missing}, config.source)
    ends = missing.get("eos_token_id")
    if ends is not None:
        vocab_size = fields.positive("vocab_size", most=MAX_VOCAB_SIZE)
        fields.raw["eos_token_id"] = [end for end in (ends if isinstance(ends, list) else [ends]) if end < vocab_size]
    return fields


def with_layer_types(fields: ConfigFields, full_every: int) -> ConfigFields:
    """With `layer_types` where the config states none: a full layer after each `full_every` - 1 with a window."""
    if fields.raw.get("layer_types") is not None:
        return fields
    count = fields.positive("num_hidden_layers", most=MAX_LAYERS)
    types = [WINDOWED if (layer + 1) % full_every else FULL for layer in range(count)]
    return ConfigFields({**fields.raw, "layer_types": types}, fields.source)


def refuse_other_activation(fields: ConfigFields, supported: str, name: str = "hidden_act") -> None:
    """Raise ModelError for a feed-forward activation other than the `supported` one."""
    activation = fields.raw.get(name, supported)
    if activation != supported:
        fields.fail(name, repr(supported), activation)


def _head_dim(fields: ConfigFields, hidden_size: int, num_heads: int) -> int:
    if fields.raw.get("head_dim") is None and hidden_size % num_heads:
        fields.fail("hidden_size", f"a multiple of num_attention_heads={num_heads}, or head_dim", hidden_size)
    head_dim = fields.positive("head_dim", default=hidden_size // num_heads, most=MAX_HEAD_DIM)
    return _multiple("head_dim", head_dim, fields)


def width(name: str, fields: ConfigFields, default: int | None = None, most: int = MAX_WIDTH) -> int:
    """The row size in field `name`. Raises ModelError."""
    return _multiple(name, fields.positive(name, default=default, most=most), fields)


def _multiple(name: str, size: int, fields: ConfigFields) -> int:
    if size % WIDTH_MULTIPLE:
        fields.fail(name, f"a multiple of {WIDTH_MULTIPLE} (the width of the kernels' vectors)", size)
    return size


def _bias(fields: ConfigFields, rule: BiasRule) -> bool:
    if rule not in (BiasRule.NEVER, BiasRule.ALWAYS):
        return fields.boolean(rule.value, default=False)
    return rule is BiasRule.ALWAYS


def _windows(fields: ConfigFields, rules: FamilyRules, num_layers: int) -> tuple[int | None, ...]:
    full: tuple[int | None, ...] = (None,) * num_layers
    windows = full
    if rules.window is WindowRule.EVERY_LAYER and fields.raw.get("sliding_window") is not None:
        windows = (fields.positive("sliding_window"),) * num_layers
    elif rules.window is WindowRule.UPPER_LAYERS and fields.boolean("use_sliding_window", default=False):
        first = min(fields.natural("max_window_layers"), num_layers)
        windows = full[:first] + (fields.positive("sliding_window"),) * (num_layers - first)
    elif rules.window is WindowRule.EVERY_OTHER_LAYER:
        window = _window(fields, "every other layer")
        windows = tuple(None if layer % 2 else window for layer in range(num_layers))
    layer_types = fields.raw.get("layer_types")
    if rules.window is WindowRule.LAYER_TYPES:
        windows = _windows_by_type(fields, layer_types, num_layers)
    elif layer_types is not None:
        implied = [FULL if window is None else WINDOWED for window in windows]
        if layer_types != implied:
            fields.fail("layer_types", f"what the sliding-window fields imply, {implied}", layer_types)
    return windows


def _window(fields: ConfigFields, layers: str) -> int:
    if fields.raw.get("sliding_window") is None:
        fields.fail("sliding_window", f"a number of keys, as layers have a window ({layers})", None)
    return fields.positive("sliding_window")


def _windows_by_type(fields: ConfigFields, layer_types: object, num_layers: int) -> tuple[int | None, ...]:
    expected = f"a list of {num_layers} times {FULL!r} or {WINDOWED!r}"
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        fields.fail("layer_types", expected, layer_types)
    if not all(layer_type in (FULL, WINDOWED) for layer_type in layer_types):
        fields.fail("layer_types", expected, layer_types)
    window = _window(fields, "those that layer_types names") if WINDOWED in layer_types else None
    return tuple(window if layer_type == WINDOWED else None for layer_type in layer_types)


def _checkpoint_dtype(fields: ConfigFields) -> str | None:
    name = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    value = fields.raw.get(name)
    if value is None:
        return None
    if value not in FLOAT_DTYPES:
        fields.fail(name, f"one of {', '.join(FLOAT_DTYPES)}", value)
    return str(value)


def _eos_token_ids(config: ConfigFields, generation: ConfigFields, vocab_size: int) -> tuple[int, ...]:
    fields = generation if generation.raw.get("eos_token_id") is not None else config
    value = fields.raw.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if len(ids) > MAX_EOS_TOKENS:
        fields.fail("eos_token_id", f"at most {MAX_EOS_TOKENS} token ids", value)
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            fields.fail("eos_token_id", f"token ids in [0, vocab_size={vocab_size})", value)
    return tuple(dict.fromkeys(ids))
