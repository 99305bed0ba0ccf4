"""Packing: several examples in one row, none of which sees another, so that the loss is that of rows of their own.

transformers finds the borders where positions begin anew, but only without an attention mask and without a cache.
BLOOM knows no positions: it is given the mask itself.
"""

import random
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from loraplex_trainer.encoding import Example
from loraplex_trainer.errors import ConfigError

_PROBE_TOKENS = 8
_SEEN = 1e-4  # of the largest logit: what another neighbour may change, which is nothing but rounding
_SHIFTED = 0.1  # what being packed may change: rounding, also in bfloat16


def pack(examples: Sequence[Example], max_tokens: int, seed: int) -> tuple[Example, ...]:
    """Rows of at most `max_tokens`, by best fit, longest first; which of equal length comes first is drawn by `seed`.

    Best-fit decreasing needs at most 11/9 of the fewest rows, and one (Johnson, 1973).
    """
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda index: -len(examples[index].ids))
    rows: list[list[Example]] = []
    rooms: list[int] = []  # sorted; what is left in some row, each once
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    for index in order:
        example = examples[index]
        at = bisect_left(rooms, len(example.ids))
        if at == len(rooms):
            rows.append([])
            row, room = len(rows) - 1, max_tokens
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(at)
        rows[row].append(example)
        left = room - len(example.ids)
        if not with_room[left]:
            insort(rooms, left)
        with_room[left].append(row)
    return tuple(map(joined, rows))


def joined(examples: Sequence[Example]) -> Example:
    """Several examples as one; what was trained in each still is, and nothing else."""
    ids: list[int] = []
    trained: list[tuple[int, int]] = []
    starts: list[int] = []
    where: list[str] = []
    for example in examples:
        shift = len(ids)
        trained += [(start + shift, stop + shift) for start, stop in example.trained]
        starts += [start + shift for start in example.starts]
        ids += example.ids
        where += example.where
    return Example(tuple(ids), tuple(trained), tuple(starts), tuple(where))


def packed_positions(example: Example, tokens: int) -> torch.Tensor:
    """The position of each token in its own example; padding to `tokens` counts as one more."""
    borders = [*example.starts, len(example.ids), tokens]
    return torch.cat([torch.arange(stop - start) for start, stop in pairwise(borders)])


def packed_inputs(model: Any, position_ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a forward is given beside the ids; nothing for rows of one example. `position_ids` is (rows, tokens)."""
    if position_ids is None:
        return {}
    position_ids = position_ids.to(model.device)
    if model.config.model_type != "bloom":
        return {"position_ids": position_ids}
    piece = (position_ids == 0).cumsum(1)  # (rows, tokens): which example a token belongs to
    sees = (piece[:, :, None] == piece[:, None, :]).tril()[:, None]  # (rows, 1, tokens, tokens)
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return {"attention_mask": mask.masked_fill(~sees, torch.finfo(model.dtype).min)}


def prepare_packing(model: Any) -> None:
    """Makes a model ready for packed rows. Raises ConfigError for one in which examples would see each other.

    Measured, not listed: what it says of an example must not depend on the one before it, and be what it says of a row
    of its own.
    """
    if model.config.model_type == "bloom":
        model.get_base_model().transformer.build_alibi_tensor = _alibi
    was_training = model.training
    model.eval()
    with torch.no_grad():
        seen, shifted = _differences(model)
    model.train(was_training)
    if seen > _SEEN or shifted > _SHIFTED:
        raise ConfigError(
            f"data.packing: true: a model of the type {model.config.model_type!r} lets packed examples see each other "
            f"(logits change by {max(seen, shifted):.1%}); leave it out"
        )


def _differences(model: Any) -> tuple[float, float]:
    """By how much an example's logits differ after two different neighbours, and after one and after none.

    Both as a share of the largest logit. Equal shapes in the same place round alike, so the first can be held to zero.
    """
    size = _PROBE_TOKENS
    first, second, last = torch.arange(3 * size).view(3, size) * 7 % model.config.vocab_size
    positions = torch.arange(size).repeat(2)[None]

    def of_last(before: torch.Tensor) -> torch.Tensor:
        ids = torch.cat([before, last])[None].to(model.device)
        return model(input_ids=ids, use_cache=False, **packed_inputs(model, positions)).logits[:, size:].float()

    after_first, after_second = of_last(first), of_last(second)
    alone = model(input_ids=last[None].to(model.device), use_cache=False).logits.float()
    largest = alone.abs().max()
    seen, shifted = ((after_first - other).abs().max() / largest for other in (after_second, alone))
    return seen.item(), shifted.item()


def _alibi(attention_mask: torch.Tensor, num_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """BLOOM's `build_alibi_tensor`, with the positions that a packed mask (rows, 1, tokens, tokens) tells."""
    if attention_mask.dim() == 2:
        return build_alibi_tensor(attention_mask, num_heads, dtype)
    rows, _, tokens, _ = attention_mask.shape
    slopes = build_alibi_tensor(attention_mask.new_ones(1, 2, dtype=torch.float32), num_heads, torch.float32)[:, 0, 1]
    positions = (attention_mask == 0).sum(-1) - 1  # (rows, 1, tokens)
    return (slopes[None, :, None] * positions).reshape(rows * num_heads, 1, tokens).to(dtype)
