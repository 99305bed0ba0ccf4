"""Rows of several runs as one row of tokens, each run's padded to its own longest only; attention stays in its rows.

Everything but attention looks at one token at a time and does not mind. Knows transformers' attention interface and
rows; not whose they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "loraplex_ragged"
_PROBE = ((2, 5), (3, 9))  # rows, tokens
_CLOSE = 0.02  # of the largest logit: roundings in bfloat16


class Block(NamedTuple):
    """So many rows of so many tokens each, one after another, from token `start` on."""

    start: int
    rows: int
    tokens: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.tokens

    def rows_of(self, states: torch.Tensor) -> torch.Tensor:
        """(1, all tokens, …) → (rows, tokens, …)"""
        return states[0, self.start : self.stop].unflatten(0, (self.rows, self.tokens))


class BlockMasks(NamedTuple):
    """What transformers hands from the model to each layer in the place of an attention mask.

    `masks`: for each block (rows, 1, tokens, tokens) bool, or None where every token sees all before it in its row.
    """

    blocks: Sequence[Block]
    masks: Sequence[torch.Tensor | None]


class Ragged:
    """The blocks of the batch in hand; none: a batch of rows as transformers knows them."""

    def __init__(self) -> None:
        self.blocks: Sequence[Block] = ()

    @contextmanager
    def batch(self, blocks: Sequence[Block]) -> Iterator[None]:
        before, self.blocks = self.blocks, blocks
        try:
            yield
        finally:
            self.blocks = before


def blocks_of(shapes: Sequence[tuple[int, int]]) -> list[Block]:
    """One after another; shapes: (rows, tokens)."""
    blocks: list[Block] = []
    for rows, tokens in shapes:
        blocks.append(Block(blocks[-1].stop if blocks else 0, rows, tokens))
    return blocks


def use_ragged(model: Any) -> Ragged | None:
    """Lets a causal model take such batches; None, with nothing changed, where its attention cannot be asked in parts.

    Whether it can is not told by its name: it is asked, and compared with each block alone.
    """
    if model.config._attn_implementation != "sdpa" or not model._can_set_attn_implementation():
        return None
    ragged = Ragged()
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, partial(_masks, ragged))
    model.set_attn_implementation(_NAME)
    if _answers_alike(model, ragged):
        return ragged
    model.set_attn_implementation("sdpa")
    return None


def row_positions(blocks: Sequence[Block], device: torch.device) -> torch.Tensor:
    """(1, tokens): in each row from 0 on."""
    return torch.cat([torch.arange(block.tokens, device=device).repeat(block.rows) for block in blocks])[None]


def _masks(ragged: Ragged, *args: Any, **kwargs: Any) -> Any:
    """In the place of transformers' `sdpa_mask`, which it asks for what is not a ragged batch."""
    if not ragged.blocks:
        return sdpa_mask(*args, **kwargs)
    assert not args and kwargs["batch_size"] == 1 and kwargs["q_length"] == ragged.blocks[-1].stop
    if kwargs.get("use_vmap"):  # a model that adds to the mask in its own way
        raise NotImplementedError
    masks = [_mask(block, kwargs["mask_function"], kwargs["device"]) for block in ragged.blocks]
    return BlockMasks(ragged.blocks, masks)


def _mask(block: Block, sees: Callable[..., torch.Tensor], device: torch.device) -> torch.Tensor | None:
    at = torch.arange(block.start, block.stop, device=device).view(block.rows, 1, block.tokens)
    mask = sees(torch.zeros_like(at)[..., None], 0, at[..., None], at[..., None, :])  # (rows, 1, tokens, tokens)
    causal = torch.ones(block.tokens, block.tokens, dtype=torch.bool, device=device).tril()
    return None if mask.eq(causal).all() else mask


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """query: (1, heads, tokens, width); key and value: fewer heads, it may be. Gives (1, tokens, heads, width)."""
    if not isinstance(attention_mask, BlockMasks):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    pieces = []
    for block, mask in zip(*attention_mask, strict=True):
        q, k, v = (block.rows_of(states.transpose(1, 2)).transpose(1, 2) for states in (query, key, value))
        pieces.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(pieces)[None], None


@torch.no_grad()
def _answers_alike(model: Any, ragged: Ragged) -> bool:
    blocks = blocks_of(_PROBE)
    ids = torch.arange(blocks[-1].stop, device=model.device)[None] * 7 % model.config.get_text_config().vocab_size
    try:
        with ragged.batch(blocks):
            positions = row_positions(blocks, model.device)
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0].float()
    except (NotImplementedError, TypeError, AssertionError):  # it makes masks in a way of its own
        return False
    for block in blocks:
        rows = ids[0, block.start : block.stop].view(block.rows, block.tokens)
        alone = model(input_ids=rows, use_cache=False).logits.flatten(0, 1).float()
        if (logits[block.start : block.stop] - alone).abs().max() > _CLOSE * alone.abs().max():
            return False
    return True
