"""Which rope a config asks for, in both spellings: `rope_parameters`, or `rope_scaling` beside `rope_theta`."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sempre.kernels.rope import RopeSpec
from sempre.workers.config_fields import ConfigFields

# fields of the rope section by its kind, beside those of every kind; any other belongs to an unsupported kind
COMMON_FIELDS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
FIELDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "proportional": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        "factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", "finetuned"
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}  # fmt: skip
# fields that may be this whatever the kind is, since they then change nothing
NEUTRAL: dict[str, object] = {"factor": 1, "attention_factor": 1}
ALIASES = {"su": "longrope"}
PARTIAL = "partial_rotary_factor"


def rope_of(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    """The one rope of all layers. Raises ModelError."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    return _parse(fields.section(name), fields, head_dim, max_position_embeddings)


def rope_of_part(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    """The one rope of all layers, of families whose heads may turn in part. Raises ModelError."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    rope = fields.section(name)
    if _kind(rope) == "proportional":
        return rope_of(fields, head_dim, max_position_embeddings)
    holder = rope if rope.raw.get(PARTIAL) is not None else fields
    fraction = holder.positive_number(PARTIAL, default=1.0)
    turning = int(head_dim * fraction)
    if not 0 < turning <= head_dim or turning % 2:
        holder.fail(PARTIAL, f"an even number of the {head_dim} dimensions of a head", fraction)
    rest = ConfigFields({**fields.raw, PARTIAL: None, name: {**rope.raw, PARTIAL: None}}, fields.source)
    spec = rope_of(rest, turning, max_position_embeddings)
    return replace(spec, head_dim=head_dim, rotary_dim=turning if turning < head_dim else None)


def rope_of_full_layers(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    """That of the layers that see all keys, where those with a window have another. Raises ModelError."""
    rope = _section_of(fields, "full_attention")
    if rope is None:
        rope = fields.section("rope_scaling")
    return _parse(rope, fields, head_dim, max_position_embeddings)


def rope_of_windowed_layers(
    fields: ConfigFields, head_dim: int, max_position_embeddings: int, default_theta: float
) -> RopeSpec:
    """That of the layers with a window, beside `rope_of_full_layers`; scaling outside of `rope_parameters` is not
    theirs. Raises ModelError.
    """
    rope = _section_of(fields, "sliding_attention") or ConfigFields({}, fields.source)
    theta = ConfigFields({"rope_theta": default_theta}, fields.source)
    return _parse(rope, theta, head_dim, max_position_embeddings)


def _section_of(fields: ConfigFields, layer_type: str) -> ConfigFields | None:
    """That part of rope_parameters, None without any."""
    if fields.raw.get("rope_parameters") is None:
        return None
    if fields.raw.get("rope_scaling") is not None:
        fields.fail("rope_scaling", "null beside rope_parameters", fields.raw["rope_scaling"])
    both = fields.section("rope_parameters")
    for key, value in both.raw.items():
        if key not in ("full_attention", "sliding_attention"):
            both.fail(key, "only the objects full_attention and sliding_attention", value)
    return both.section(layer_type)


def _parse(rope: ConfigFields, fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RopeSpec:
    kind = _kind(rope)
    if kind not in FIELDS:
        rope.fail("rope_type", f"one of {', '.join(FIELDS)}", kind)
    _refuse_other_fields(rope, kind)
    for holder in (rope, fields):
        partial = holder.raw.get(PARTIAL)
        if partial not in (None, 1, 1.0) and kind != "proportional":
            holder.fail(PARTIAL, "1.0 (all of each head turns)", partial)
    theta = (rope if rope.raw.get("rope_theta") is not None else fields).positive_number("rope_theta", default=10000.0)
    if kind == "default":
        return RopeSpec(head_dim, theta)
    if kind == "linear":
        return RopeSpec(head_dim, theta, "linear", rope.positive_number("factor"))
    if kind == "proportional":
        return _proportional(rope, fields, head_dim, theta)
    holder = fields if fields.raw.get("original_max_position_embeddings") is not None else rope
    original = holder.positive("original_max_position_embeddings", default=max_position_embeddings)
    if kind == "dynamic":
        return _dynamic(rope, head_dim, theta, original, max_position_embeddings)
    if kind == "llama3":
        return _llama3(rope, head_dim, theta, original)
    factor = rope.positive_number("factor", default=max_position_embeddings / original)
    if kind == "yarn":
        return _yarn(rope, RopeSpec(head_dim, theta, "yarn", factor, original_max_position_embeddings=original))
    growth = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeSpec(
        head_dim,
        theta,
        "longrope",
        original_max_position_embeddings=original,
        attention_factor=rope.positive_number("attention_factor", default=growth),
        short_factors=_factors(rope, "short_factor", head_dim),
        long_factors=_factors(rope, "long_factor", head_dim),
    )


def _kind(rope: ConfigFields) -> str:
    stated = rope.raw.get("rope_type")
    kind = rope.raw.get("type") if stated is None else stated
    return "default" if kind is None else ALIASES.get(str(kind), str(kind))


def _proportional(rope: ConfigFields, fields: ConfigFields, head_dim: int, theta: float) -> RopeSpec:
    """Waves as of whole heads, of which only the first turn."""
    holder = rope if rope.raw.get(PARTIAL) is not None else fields
    fraction = holder.positive_number(PARTIAL, default=1.0)
    if fraction > 1:
        holder.fail(PARTIAL, "at most 1", fraction)
    factor = rope.positive_number("factor", default=1.0)
    return RopeSpec(head_dim, theta, "proportional", factor, turning_pairs=int(fraction * head_dim // 2))


def _dynamic(rope: ConfigFields, head_dim: int, theta: float, original: int, max_position_embeddings: int) -> RopeSpec:
    """The original context is that of max_position_embeddings; the engine's longest sequence decides on the waves."""
    if original != max_position_embeddings:
        rope.fail("original_max_position_embeddings", f"max_position_embeddings={max_position_embeddings}", original)
    factor = rope.positive_number("factor")
    if factor < 1:
        rope.fail("factor", "at least 1", factor)
    if head_dim <= 2:
        rope.fail(PARTIAL, "more than two dimensions of a head that turn", head_dim)
    return RopeSpec(head_dim, theta, "dynamic", factor, original_max_position_embeddings=original)


def _refuse_other_fields(rope: ConfigFields, kind: str) -> None:
    allowed = (*COMMON_FIELDS, *FIELDS[kind])
    for key, value in rope.raw.items():
        if key not in allowed and value is not None and not (key in NEUTRAL and value == NEUTRAL[key]):
            rope.fail(key, f"of the type {kind!r} only the fields {', '.join(allowed)}", value)


def _llama3(rope: ConfigFields, head_dim: int, theta: float, original: int) -> RopeSpec:
    factor = rope.positive_number("factor")
    low, high = rope.positive_number("low_freq_factor"), rope.positive_number("high_freq_factor")
    if high <= low:
        rope.fail("high_freq_factor", f"more than low_freq_factor={low}", high)
    return RopeSpec(head_dim, theta, "llama3", factor, low, high, original)


def _yarn(rope: ConfigFields, spec: RopeSpec) -> RopeSpec:
    fast, slow = rope.positive_number("beta_fast", default=32.0), rope.positive_number("beta_slow", default=1.0)
    if fast <= slow:
        rope.fail("beta_fast", f"more than beta_slow={slow}", fast)
    if spec.theta <= 1:
        rope.fail("rope_theta", "more than 1", spec.theta)
    scale = 0.1 * math.log(max(spec.factor, 1.0))
    growth = scale + 1
    if rope.raw.get("mscale") and rope.raw.get("mscale_all_dim"):
        growth = (rope.positive_number("mscale") * scale + 1) / (rope.positive_number("mscale_all_dim") * scale + 1)
    more: dict[str, Any] = {
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": rope.boolean("truncate", default=True),
        "attention_factor": rope.positive_number("attention_factor", default=growth),
    }
    return RopeSpec(**(vars(spec) | more))


def _factors(rope: ConfigFields, name: str, head_dim: int) -> tuple[float, ...]:
    values = rope.raw.get(name)
    count = head_dim // 2
    if not isinstance(values, list) or len(values) != count:
        rope.fail(name, f"a list of {count} numbers (half of the dimensions that turn)", values)
    numbers = ConfigFields({str(index): value for index, value in enumerate(values)}, f"{rope.source}: {name}")
    return tuple(numbers.positive_number(index) for index in numbers.raw)
