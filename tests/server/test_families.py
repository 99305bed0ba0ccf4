"""Which configs are paged, and how far back their layers look. That this is right, test_exact proves."""

import pytest
from tiny import FAMILIES
from transformers import AutoConfig

from loraplex_server.engine.families import pattern_of


def config(name: str, **overrides):
    return AutoConfig.for_model(name.partition("-")[0], **{**FAMILIES[name], **overrides})


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("llama", (None, None)),
        ("mistral-window", (16, 16)),
        ("mistral", (None, None)),
        ("qwen2-window", (None, 16)),
        ("gemma2", (16, None)),
        ("qwen2_moe", (16, None)),
        ("bloom", (None, None)),
    ],
)
def test_each_layer_looks_back_as_far_as_its_config_says(name, windows):
    pattern = pattern_of(config(name))
    assert pattern is not None and pattern.windows == windows
    assert (pattern.slopes is not None) == (name == "bloom")


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"]}),
        ("llama", {"sliding_window": 16}),  # no such thing in this family: what is meant by it is not known
        ("mistral", {"sliding_window": 0}),
        ("gemma2", {"use_bidirectional_attention": True}),
        ("gpt2", {"add_cross_attention": True}),
        ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}),
        ("phi3-longrope", {}),
        ("falcon", {}),
        ("jamba", {}),
    ],
    ids=str,
)
def test_a_variant_that_is_not_known_is_not_paged(name, variant):
    assert pattern_of(config(name, **variant)) is None
