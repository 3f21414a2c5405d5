"""Which `architectures` entry of a config.json is decoded how: the differences between the families, as data."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum

from sempre.ipc.errors import UnknownArchitecture


class BiasRule(Enum):
    """Whether a projection has a bias."""

    NEVER = "never"
    ALWAYS = "always"
    ATTENTION_BIAS = "attention_bias"
    """as the config's field `attention_bias` says"""
    MLP_BIAS = "mlp_bias"
    """as the config's field `mlp_bias` says"""


class WindowRule(Enum):
    """Which layers attend to a sliding window only."""

    NEVER = "never"
    EVERY_LAYER = "every layer"
    """`sliding_window` keys in every layer; null is off"""
    UPPER_LAYERS = "upper layers"
    """`sliding_window` keys from layer `max_window_layers` on, when `use_sliding_window` is true"""


@dataclass(frozen=True)
class Family:
    """What a model family does differently; everything else is common to the decoder."""

    qkv_bias: BiasRule
    o_bias: BiasRule
    mlp_bias: BiasRule
    window: WindowRule
    qk_norm: bool
    """RMSNorm over each head of the queries and keys, before the rotary embedding"""
    default_head_dim: int | None
    """head dimension when the config states none; None: hidden_size / num_attention_heads"""


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        qkv_bias=BiasRule.ATTENTION_BIAS,
        o_bias=BiasRule.ATTENTION_BIAS,
        mlp_bias=BiasRule.MLP_BIAS,
        window=WindowRule.NEVER,
        qk_norm=False,
        default_head_dim=None,
    ),
    "MistralForCausalLM": Family(
        qkv_bias=BiasRule.NEVER,
        o_bias=BiasRule.NEVER,
        mlp_bias=BiasRule.NEVER,
        window=WindowRule.EVERY_LAYER,
        qk_norm=False,
        default_head_dim=None,
    ),
    "Qwen2ForCausalLM": Family(
        qkv_bias=BiasRule.ALWAYS,
        o_bias=BiasRule.NEVER,
        mlp_bias=BiasRule.NEVER,
        window=WindowRule.UPPER_LAYERS,
        qk_norm=False,
        default_head_dim=None,
    ),
    "Qwen3ForCausalLM": Family(
        qkv_bias=BiasRule.ATTENTION_BIAS,
        o_bias=BiasRule.ATTENTION_BIAS,
        mlp_bias=BiasRule.NEVER,
        window=WindowRule.UPPER_LAYERS,
        qk_norm=True,
        default_head_dim=128,
    ),
}


def family_of(architecture: str) -> Family:
    """The settings of `architecture`; raises UnknownArchitecture, which lists the known ones."""
    family = FAMILIES.get(architecture)
    if family is None:
        near = get_close_matches(architecture, FAMILIES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UnknownArchitecture(
            f"config.json: architectures: no decoder for {architecture!r}.{hint} Known: {', '.join(FAMILIES)}.",
            architecture=architecture,
        )
    return family
