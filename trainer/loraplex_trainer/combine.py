"""Batches of several runs as one: in one row of tokens, or in rows of one length. Knows tokens and labels, no model."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from loraplex_trainer.data import IGNORED, Batch

Shape = tuple[int, int]  # rows, tokens


class Combined(NamedTuple):
    """One batch; its tokens, row by row, are those of one run after another: `shapes` of each."""

    input_ids: torch.Tensor  # (rows, tokens) int64
    position_ids: torch.Tensor | None  # (rows, tokens) int64; None: every row is one example
    logits_to_keep: torch.Tensor  # the positions of a row whose logits are asked for
    answers: list[tuple[torch.Tensor, torch.Tensor]]  # of each run: places among the logits, row by row, and ids
    shapes: list[Shape]


def as_one_row(batches: Sequence[Batch]) -> Combined:
    """Each with the padding it has, and no more; logits where there is a label, and nowhere else."""
    places, answers, positions, first, asked = [], [], [], 0, 0
    for batch in batches:
        rows, tokens = batch.input_ids.shape
        row, column, ids = _labelled(batch)
        places.append(first + row * tokens + column)
        answers.append((torch.arange(asked, asked + len(ids)), ids))
        positions.append(_positions(batch, tokens).flatten())
        first, asked = first + rows * tokens, asked + len(ids)
    input_ids = torch.cat([batch.input_ids.flatten() for batch in batches])[None]
    shapes = [_shape(batch) for batch in batches]
    return Combined(input_ids, torch.cat(positions)[None], torch.cat(places), answers, shapes)


def as_rows(batches: Sequence[Batch], pad_id: int) -> Combined:
    """All padded to the longest."""
    longest = max(batch.input_ids.shape[1] for batch in batches)
    labelled = [_labelled(batch) for batch in batches]
    columns, where = torch.unique(torch.cat([column for _, column, _ in labelled]), return_inverse=True)
    answers, first = [], 0
    for batch, (row, column, ids), at in zip(
        batches, labelled, where.split([len(ids) for *_, ids in labelled]), strict=True
    ):
        assert len(column) == len(at)
        answers.append(((first + row) * len(columns) + at, ids))
        first += len(batch.input_ids)
    rows = [pad(batch.input_ids, (0, longest - batch.input_ids.shape[1]), value=pad_id) for batch in batches]
    packed = any(batch.position_ids is not None for batch in batches)
    positions = torch.cat([_positions(batch, longest) for batch in batches]) if packed else None
    shapes = [(len(batch.input_ids), longest) for batch in batches]
    return Combined(torch.cat(rows), positions, columns, answers, shapes)


def _shape(batch: Batch) -> Shape:
    rows, tokens = batch.input_ids.shape
    return rows, tokens


def _labelled(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row, column and id of every label, row by row."""
    tokens, keep = batch.input_ids.shape[1], batch.logits_to_keep
    columns = torch.arange(tokens - keep, tokens) if isinstance(keep, int) else keep
    row, column = (batch.labels != IGNORED).nonzero(as_tuple=True)
    return row, columns[column], batch.labels[row, column]


def _positions(batch: Batch, tokens: int) -> torch.Tensor:
    """(rows, tokens); padding that is added counts from 0 on where examples are packed, and sees none of them."""
    rows, own = batch.input_ids.shape
    if batch.position_ids is None:
        return torch.arange(tokens).expand(rows, tokens)
    return torch.cat([batch.position_ids, torch.arange(tokens - own).expand(rows, -1)], 1)
