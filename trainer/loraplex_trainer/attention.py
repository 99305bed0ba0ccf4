"""Attention of a layer that is trained on a CPU: the rotation, the scores and what both hand back, by kernels.

Rows see what transformers' mask lets them see, packed examples only themselves. What is not of that kind goes the
layer's own way, as everything does without kernels: the reference that this is tested against.
"""

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from loraplex_server.kernels.native import addresses, native
from loraplex_trainer.ragged import BlockMasks

# Of these a layer is its projections, a rotation and attention; which of them it is all the same is asked.
KINDS = ("LlamaAttention", "MistralAttention", "Qwen2Attention")
_CLOSE = 2**-6  # of the largest value: of two ways to round in bfloat16
_PROBE_TOKENS = 40
_known = WeakIdKeyDictionary()  # what first_seen said of a mask: all layers of a step are given the same


class Causal(torch.autograd.Function):
    """Attention of query (rows, tokens, heads, width) over keys and values (rows, tokens, kv_heads, width), bfloat16.

    A query sees the keys from `starts` (rows, tokens) int32 on, or all, up to its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        starts: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        rows, tokens, heads, width = query.shape
        out = torch.empty_like(query)
        stats = torch.empty(rows, heads, -(-tokens // 32) * 32, 2)
        sizes = rows, tokens, heads, keys.shape[2], width, scale
        _library().causal(*addresses(out, stats, query, keys, values, starts), *sizes)
        ctx.sizes, ctx.starts = sizes, starts
        ctx.save_for_backward(query, keys, values, out, stats)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        query, keys, values, out, stats = ctx.saved_tensors
        found = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)
        where = addresses(*found, grads[0].contiguous(), query, keys, values, out, stats, ctx.starts)
        _library().causal_grad(*where, *ctx.sizes)
        return *found, None, None


class Rotation(torch.autograd.Function):
    """Rotary embedding of x (rows, tokens, heads, width) by cos and sin (rows, tokens, width), all bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return _rotated(grads[0], *ctx.saved_tensors, back=True), None, None


def use_attention_kernel(module: Any) -> None:
    """Let an attention layer in bfloat16 attend by kernels, if it is of a known kind and that gives the same."""
    if type(module).__name__ not in KINDS or module.head_dim % 32 or module.attention_dropout:
        return
    if module.config._attn_implementation != "sdpa":
        return
    plain = module.forward

    def forward(
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | BlockMasks | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> tuple[torch.Tensor, None]:
        blocks, masks = attention_mask if isinstance(attention_mask, BlockMasks) else (None, [attention_mask])
        starts = [_starts(mask, len(hidden_states) if blocks is None else None) for mask in masks]
        unknown = any(mask is not None and start is None for mask, start in zip(masks, starts, strict=True))
        if past_key_values is not None or unknown or hidden_states.dtype != torch.bfloat16:
            return plain(hidden_states, position_embeddings, attention_mask, past_key_values, **more)
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        turn = [part.expand(*shape[:2], -1).contiguous() for part in position_embeddings]
        query, keys = (
            Rotation.apply(project(hidden_states).view(shape), *turn) for project in (module.q_proj, module.k_proj)
        )
        values = module.v_proj(hidden_states).view(shape)
        states = query, keys, values
        if blocks is None:
            return module.o_proj(Causal.apply(*states, starts[0], module.scaling).flatten(2)), None  # pyright: ignore
        pieces = [
            Causal.apply(*(block.rows_of(part) for part in states), start, module.scaling).flatten(0, 1)  # pyright: ignore
            for block, start in zip(blocks, starts, strict=True)
        ]
        return module.o_proj(torch.cat(pieces).flatten(1)[None]), None

    if _alike(plain, forward, module):
        module.forward = forward


def first_seen(mask: torch.Tensor, rows: int) -> torch.Tensor | None:
    """The first token that each token sees, (rows, tokens) int32, where it sees all from there to itself; else None."""
    if mask.dtype != torch.bool or mask.shape[1] != 1 or mask.shape[2] != mask.shape[3]:
        return None
    sees = mask[:, 0].expand(rows, -1, -1)  # (rows, tokens, tokens)
    token = torch.arange(sees.shape[1])
    starts = token + 1 - sees.sum(2)
    as_said = (token[None, None] >= starts[:, :, None]) & (token[None, None] <= token[None, :, None])
    return starts.int().contiguous() if torch.equal(as_said, sees) and bool((starts <= token).all()) else None


def _starts(mask: Any, rows: int | None) -> torch.Tensor | None:
    """Of as many rows, or of as many as the mask has; None where there is no mask."""
    if mask is None:
        return None
    if mask not in _known:
        _known[mask] = first_seen(mask, rows or len(mask))
    return _known[mask]


def _alike(plain: Any, forward: Any, module: Any) -> bool:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, _PROBE_TOKENS, module.config.hidden_size, generator=random).bfloat16()
    angles = 9 * torch.rand(1, _PROBE_TOKENS, module.head_dim // 2, generator=random).repeat(1, 1, 2)
    turn = angles.cos().bfloat16(), angles.sin().bfloat16()
    with torch.random.fork_rng(devices=[]):  # dropout draws from it
        expected, given = (way(x, turn, attention_mask=None)[0].float() for way in (plain, forward))
    return torch.allclose(given, expected, rtol=0, atol=_CLOSE * float(expected.abs().max()))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, back: bool) -> torch.Tensor:
    x = x.contiguous()
    out, (rows, tokens, heads, width) = torch.empty_like(x), x.shape
    _library().rotate(*addresses(out, x, cos, sin), rows * tokens, heads, width, back)
    return out


def _library() -> Any:
    return native().library
