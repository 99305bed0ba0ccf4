"""BLOOM over paged keys and values: its layers compute attention themselves, so theirs is replaced on the instance."""

from collections.abc import Callable
from typing import Any

import torch

from loraplex_server.engine.attention import NAME, PagedStep, paged_attention


def page_bloom(model: Any, current: Callable[[], PagedStep]) -> None:
    """Let every layer attend over ``current``, the step that runs. The distances' bias is in the step's blocks."""
    model.config._attn_implementation = NAME  # so that no mask over the whole step is made: none is looked at
    for block in model.transformer.h:
        block.self_attention.forward = _paged_forward(block.self_attention, current)


def _paged_forward(attention: Any, current: Callable[[], PagedStep]) -> Callable[..., tuple[torch.Tensor, None]]:
    def forward(hidden_states: torch.Tensor, residual: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
        fused = attention.query_key_value(hidden_states).unflatten(-1, (attention.num_heads, 3, attention.head_dim))
        query, key, value = (part.transpose(1, 2) for part in fused.unbind(-2))  # (1, heads, tokens, head_dim) each
        context, _ = paged_attention(attention, query, key, value, None, attention.inv_norm_factor, paged=current())
        return attention.dense(context.flatten(2)) + residual, None

    return forward
