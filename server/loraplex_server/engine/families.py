"""Which models paged attention is right for, and how far back their layers look: as their configs say, not by hope.

A positive list: every family here is held to peft alone in tests/server/test_exact.py. Knows configs, no weights.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from loraplex_server.engine.attention import Pattern

FULL = frozenset({"bloom", "gpt2", "gpt_neox", "llama", "opt"})  # every layer looks back to the beginning
ONE_WINDOW = frozenset({"mistral", "mixtral", "phi3", "qwen3_moe"})  # sliding_window, if set, is every layer's
BY_LAYER = frozenset({"gemma2", "gemma3_text", "qwen2", "qwen2_moe", "qwen3"})  # layer_types says which layers slide
# Rotary embeddings of other types change with the longest position of a forward: rows would change each other.
FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


def pattern_of(config: PreTrainedConfig) -> Pattern | None:
    """How the layers of a model attend; None if this is not known to be what paged attention computes."""
    if not _is_causal(config) or not FIXED_ROPE.issuperset(_rope_types(config)):
        return None
    windows = _windows(config)
    if windows is None or any(window is not None and window < 1 for window in windows):
        return None
    return Pattern(windows, _slopes(config))


def _windows(config: Any) -> tuple[int | None, ...] | None:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if config.model_type in BY_LAYER and kinds and {"full_attention", "sliding_attention"}.issuperset(kinds):
        return tuple(window if kind == "sliding_attention" else None for kind in kinds)
    if kinds and set(kinds) != {"full_attention"}:
        return None
    if config.model_type in ONE_WINDOW:
        return (window,) * config.num_hidden_layers
    if config.model_type in FULL and window is None and _is_ordinary(config):
        return (None,) * config.num_hidden_layers
    return None


def _is_ordinary(config: Any) -> bool:
    """Neither an encoder beside it, nor BLOOM's slow way to imitate the slices it was trained in."""
    sliced = getattr(config, "slow_but_exact", False) and config.pretraining_tp > 1
    return not (sliced or getattr(config, "add_cross_attention", False))


def _is_causal(config: Any) -> bool:
    return getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)


def _rope_types(config: Any) -> Iterator[str]:
    """Of the model, or of each kind of its layers."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for found in (parameters, *parameters.values()):
        if isinstance(found, dict) and "rope_type" in found:
            yield found["rope_type"]


def rope_turns_at(config: Any) -> int | None:
    """The length from which every position is embedded anew, so that no key from before is of use (phi3's longrope)."""
    if "longrope" not in _rope_types(config):
        return None
    return config.rope_parameters["original_max_position_embeddings"]


def _slopes(config: Any) -> torch.Tensor | None:
    if config.model_type != "bloom":
        return None
    return build_alibi_tensor(torch.ones(1, 2), config.num_attention_heads, torch.float32)[:, 0, 1]
