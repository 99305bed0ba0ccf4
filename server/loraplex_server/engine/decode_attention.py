"""Attention of a decode step in which every row has one token: shapes depend on the number of rows alone.

That is what a CUDA graph can hold. On a CUDA device a Triton kernel reads each row's own pages; elsewhere, where only
the tests go, the longest context is gathered and masked. Knows tensors and pages; kv_cache knows who owns a page.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from loraplex_server.engine.attention import KVTensors

NAME = "loraplex_decode"


@dataclass(frozen=True)
class DecodeStep:
    """What attention must know about a step of one token a row, the same in every layer."""

    kv: KVTensors
    written: torch.Tensor  # (rows,) int64: slot of each row's token
    tables: torch.Tensor  # (rows, most pages) int32: each row's pages in order; what lies past its length is not read
    lengths: torch.Tensor  # (rows,) int64: tokens of each row, this step's included; at least 1
    page_tokens: int


def decode_attention(
    module: Any,  # the attention layer
    query: torch.Tensor,  # (1, heads, rows, head_dim)
    key: torch.Tensor,  # (1, kv_heads, rows, head_dim)
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged: DecodeStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each row's token over its own sequence; an attention function of transformers' AttentionInterface.

    Returns (1, rows, heads, head_dim). ``sliding_window`` counts tokens, the row's own included; ``softcap`` bounds
    scores as Gemma 2 does (arXiv:2408.00118).
    """
    keys, values = paged.kv.keys[module.layer_idx], paged.kv.values[module.layer_idx]
    keys[paged.written] = key[0].transpose(0, 1)
    values[paged.written] = value[0].transpose(0, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _by_kernel if query.device.type == "cuda" else by_gathering
    out = attend(query[0].transpose(0, 1), keys, values, paged, scale, sliding_window or 0, softcap or 0.0)
    return out[None], None


def by_gathering(
    query: torch.Tensor,  # (rows, heads, head_dim)
    keys: torch.Tensor,  # (slots, kv_heads, head_dim)
    values: torch.Tensor,
    step: DecodeStep,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:  # (rows, heads, head_dim)
    """The plain formula over the longest context there can be, in float32; the kernel is tested against it."""
    within = torch.arange(step.page_tokens, device=query.device)
    slots = (step.tables.long()[:, :, None] * step.page_tokens + within).flatten(1)  # (rows, context)
    position = torch.arange(slots.shape[1], device=query.device)
    seen = position < step.lengths[:, None]
    if window:
        seen = seen & (position >= step.lengths[:, None] - window)
    slots = slots.where(seen, step.written[:, None])  # what is not seen may be memory that nobody has written
    group = query.shape[1] // keys.shape[1]
    k = keys[slots].repeat_interleave(group, dim=2).float()  # (rows, context, heads, head_dim)
    v = values[slots].repeat_interleave(group, dim=2).float()
    scores = torch.einsum("rhd,rchd->rhc", query.float(), k) * scale
    if softcap:
        scores = (scores / softcap).tanh() * softcap
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return torch.einsum("rhc,rchd->rhd", weights, v).to(query.dtype)


def _by_kernel(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    step: DecodeStep,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """See by_gathering; imports Triton, which torch's CUDA builds bring along."""
    from loraplex_server.engine.attention_kernel import attend

    return attend(query, keys, values, step.tables, step.lengths, step.page_tokens, scale, window, softcap)


AttentionInterface.register(NAME, decode_attention)
