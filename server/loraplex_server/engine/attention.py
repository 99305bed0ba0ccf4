"""The KV tensors, and attention over them: rows of different lengths side by side in one forward.

Knows tensors and slots; which slots belong to whom is the business of kv_cache, and which model looks back how far is
said by families.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.configuration_utils import PreTrainedConfig

from loraplex_server.engine.errors import BaseUnusable
from loraplex_server.kernels.native import addresses, native

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
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if heads is None:
        raise BaseUnusable(f"models of type {config.model_type!r} cannot be served: they have no attention")
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Pattern:
    """How far back each layer of a model looks, and whether a distance costs."""

    windows: tuple[int | None, ...]  # a layer sees so many tokens back, the token itself included; None: all
    slopes: torch.Tensor | None = None  # (heads,): ALiBi, what a key's score gains for each position; float32


@dataclass(frozen=True)
class RowSlots:
    """One row of a step: its place in the flat token axis, and the slots of its sequence so far."""

    first: int
    last: int  # exclusive
    context: torch.Tensor  # (tokens of the sequence, this step's included,)

    @property
    def tokens(self) -> int:
        """How many tokens the step adds to the sequence."""
        return self.last - self.first


@dataclass(frozen=True)
class Block:
    """Rows that attend in one call: the same number of tokens each, their contexts padded to one length."""

    place: Any  # a slice or a tensor: their tokens in the flat token axis, row after row
    slots: torch.Tensor  # (rows, seen) of the cache; a short context is filled up with its own last slot
    mask: torch.Tensor | None  # bool (rows, 1, tokens, seen): what is seen; or float (rows, heads, tokens, seen): added
    lengths: torch.Tensor | None = None  # (rows,): of single tokens, instead of a mask for the kernel
    causal: bool = False  # instead of a mask: the tokens are the whole sequence, each sees itself and those before


class PagedStep:
    """What attention must know about a step, made once for all layers."""

    def __init__(
        self,
        kv: KVTensors,
        written: torch.Tensor,
        rows: Sequence[RowSlots],
        pattern: Pattern,
        kernels: bool = False,  # single tokens may go by our kernel
    ) -> None:
        self.kv = kv
        self.kernels = kernels and kv.keys[0].shape[-1] % 32 == 0
        self.written = written  # (tokens,) slot of each token of the step
        self._windows = pattern.windows
        self._blocks = {window: list(_blocks(rows, window)) for window in set(pattern.windows)}
        if pattern.slopes is not None:
            assert set(pattern.windows) == {None}  # the positions below count from the beginning
            dtype = kv.keys[0].dtype
            self._blocks[None] = [_sloped(block, pattern.slopes, dtype) for block in self._blocks[None]]

    def window(self, layer: int) -> int | None:
        """How far back a layer looks."""
        return self._windows[layer]

    def blocks(self, layer: int) -> list[Block]:
        """The rows of the step as a layer attends for them."""
        return self._blocks[self._windows[layer]]


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
    softcap: float | None = None,
    sliding_window: int | None = None,  # some families say it here, some only in the mask: the pattern has it for all
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each row over its own sequence; an attention function of transformers' AttentionInterface."""
    layer = module.layer_idx
    assert attention_mask is None  # transformers makes none for an attention it does not know
    assert not sliding_window or sliding_window == paged.window(layer)
    keys, values = paged.kv.keys[layer], paged.kv.values[layer]
    keys.index_copy_(0, paged.written, key[0].transpose(0, 1))
    values.index_copy_(0, paged.written, value[0].transpose(0, 1))
    flat = query[0].transpose(0, 1).contiguous()  # (tokens, heads, head_dim)
    out = torch.empty_like(flat)
    for block in paged.blocks(layer):
        if paged.kernels and block.lengths is not None and softcap is None:
            attend_by_kernel(out, flat, keys, values, block, scaling)
            continue
        asked = flat[block.place].unflatten(0, (len(block.slots), -1)).transpose(1, 2)
        seen = keys[block.slots].transpose(1, 2), values[block.slots].transpose(1, 2)
        out[block.place] = (
            attend(asked, *seen, block.mask, block.causal, scaling, softcap).transpose(1, 2).flatten(0, 1)
        )
    return out[None], None


def attend(
    query: torch.Tensor,  # (rows, heads, tokens, head_dim)
    keys: torch.Tensor,  # (rows, kv_heads, seen, head_dim)
    values: torch.Tensor,
    mask: torch.Tensor | None,  # see Block
    causal: bool,
    scaling: float | None,  # None: 1 / sqrt(head_dim)
    softcap: float | None,  # scores are bent to stay below it (gemma2)
) -> torch.Tensor:
    """Attention of some rows: (rows, heads, tokens, head_dim)."""
    rows, heads, tokens, width = query.shape
    kv_heads = keys.shape[1]
    if softcap is not None:
        return _attend_capped(query, keys, values, mask, causal, scaling or width**-0.5, softcap)
    if tokens == 1 and kv_heads != heads:  # heads that share keys become tokens that share keys: no copies of the keys
        grouped = query.view(rows, kv_heads, heads // kv_heads, width)
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling).view(query.shape)
    return scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=kv_heads != heads
    )


def attend_by_kernel(
    out: torch.Tensor,  # (tokens, heads, head_dim), written where the block's tokens are
    query: torch.Tensor,  # (tokens, heads, head_dim)
    keys: torch.Tensor,  # (slots, kv_heads, head_dim)
    values: torch.Tensor,
    block: Block,  # of single tokens
    scaling: float | None,
) -> None:
    """`attend` for single tokens, in bfloat16 on a CPU with kernels: nothing is gathered and nothing padded."""
    rows, most = block.slots.shape
    _, heads, width = query.shape
    native().library.attend(  # pyright: ignore[reportOptionalMemberAccess]
        *addresses(out, query, keys, values, block.slots, block.lengths, block.place),
        *(rows, most, heads, keys.shape[1], width, width**-0.5 if scaling is None else scaling),
    )


def _attend_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """`attend` with a cap on the scores, which torch's attention does not know; as gemma2 computes it."""
    shared = query.shape[1] // keys.shape[1]
    scores = query @ keys.repeat_interleave(shared, 1).transpose(2, 3) * scaling  # (rows, heads, tokens, seen)
    scores = torch.tanh(scores / softcap) * softcap
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        assert mask.dtype == torch.bool  # no family has both ALiBi and a cap
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return weights @ values.repeat_interleave(shared, 1)


def _blocks(rows: Iterable[RowSlots], window: int | None) -> Iterator[Block]:
    """A block for each prompt chunk, and one for all single tokens whose contexts are about as long."""
    single: dict[int, list[RowSlots]] = defaultdict(list)
    for row in rows:
        if row.tokens == 1:
            single[min(len(row.context), window or len(row.context)).bit_length()].append(row)
        else:
            yield _chunk(row, window)
    for group in single.values():  # padding never more than doubles the work
        yield _decode(group, window)


def _chunk(row: RowSlots, window: int | None) -> Block:
    total, tokens = len(row.context), row.tokens
    reach = window or total
    oldest = max(0, total - tokens - reach + 1)  # the first position that the chunk's first token sees
    place, slots = slice(row.first, row.last), row.context[None, oldest:]
    if tokens == total <= reach:
        return Block(place, slots, None, causal=True)
    positions = torch.arange(oldest, total, device=slots.device)  # of the keys; the last are those of the chunk itself
    asking = positions[-tokens:, None]
    visible = (positions <= asking) & (positions > asking - reach)  # (tokens, seen)
    return Block(place, slots, visible[None, None])


def _decode(rows: list[RowSlots], window: int | None) -> Block:
    contexts = [row.context[-window:] if window else row.context for row in rows]
    device = contexts[0].device
    place = torch.tensor([row.first for row in rows], device=device)
    lengths = torch.tensor([len(context) for context in contexts], device=device)[:, None]
    positions = torch.arange(max(len(context) for context in contexts), device=device)
    starts = lengths.cumsum(0) - lengths
    slots = torch.cat(contexts)[starts + torch.minimum(positions, lengths - 1)]  # (rows, seen)
    padded = len({len(context) for context in contexts}) > 1
    return Block(place, slots, (positions < lengths)[:, None, None] if padded else None, lengths[:, 0])


def _sloped(block: Block, slopes: torch.Tensor, dtype: torch.dtype) -> Block:
    """The block with ALiBi: what is seen gains by its position, a constant less than by its nearness (BLOOM's way)."""
    seen, device = block.slots.shape[1], block.slots.device
    bias = slopes.to(device)[None, :, None, None] * torch.arange(seen, device=device)  # (1, heads, 1, seen)
    visible = torch.ones(seen, seen, dtype=torch.bool, device=device).tril() if block.causal else block.mask
    if visible is not None:
        bias = torch.where(visible, bias, float("-inf"))
    return Block(block.place, block.slots, bias.to(dtype))


AttentionInterface.register(NAME, paged_attention)
