"""The KV tensors, and attention over them: rows of different lengths side by side in one forward, without padding.

Knows tensors and slots; which slots belong to whom is the business of kv_cache.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig

NAME = "loraplex_paged"


class KVTensors:
    """Keys and values of every layer, one slot a token: each (slots, kv_heads, head_dim)."""

    def __init__(self, config: PreTrainedConfig, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (slots, *_kv_shape(config))
        layers = range(config.num_hidden_layers)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    @staticmethod
    def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
        """What one token costs over all layers."""
        heads, width = _kv_shape(config)
        return 2 * config.num_hidden_layers * heads * width * dtype.itemsize


def _kv_shape(config: PreTrainedConfig) -> tuple[int, int]:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class RowSlots:
    """One row of a step: its place in the flat token axis, and the slots of its sequence so far."""

    first: int
    last: int  # exclusive
    context: torch.Tensor  # (tokens of the sequence, this step's included,)


@dataclass(frozen=True)
class PagedStep:
    """What attention must know about a step, the same in every layer."""

    kv: KVTensors
    written: torch.Tensor  # (tokens,) slot of each token of the step
    rows: tuple[RowSlots, ...]


def paged_attention(
    module: Any,  # the attention layer
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, kv_heads, tokens, head_dim)
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged: PagedStep,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row over its own sequence; an attention function of transformers' AttentionInterface."""
    keys, values = paged.kv.keys[module.layer_idx], paged.kv.values[module.layer_idx]
    keys[paged.written] = key[0].transpose(0, 1)
    values[paged.written] = value[0].transpose(0, 1)
    out = torch.empty_like(query)
    for row in paged.rows:
        tokens, seen = row.last - row.first, len(row.context)
        mask = None
        if 1 < tokens < seen:  # a later chunk of a prompt: it sees what came before it
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
        out[:, :, row.first : row.last] = scaled_dot_product_attention(
            query[:, :, row.first : row.last],
            keys[row.context].transpose(0, 1)[None],  # (1, kv_heads, seen, head_dim)
            values[row.context].transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=mask is None and tokens > 1,
            scale=scaling,
            enable_gqa=query.shape[1] != keys.shape[1],
        )
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, paged_attention)
