"""Examples: from a jsonl file, through the two templates, to token ids with the loss on the completion only.

Knows no model. Reading and rendering need no tokenizer, so their mistakes are found before a base is loaded.
"""

import difflib
import hashlib
import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from loraplex_server.engine.model import Base
from loraplex_trainer.config import DataSection
from loraplex_trainer.errors import DataError

IGNORED = -100  # the label that cross_entropy leaves out


@dataclass(frozen=True)
class Split:
    """One jsonl file, rendered: what the model is asked, and what it should answer."""

    path: Path
    sha256: str
    prompts: tuple[str, ...]
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """Token ids of prompt, completion and EOS; the loss is on the ids from `answer_start` on, EOS included."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.answer_start


@dataclass(frozen=True)
class Encoded:
    """A tokenized split. `truncated` examples lost the front of their prompt; `dropped` ones had no room at all."""

    examples: tuple[Example, ...]
    truncated: int
    dropped: int

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        return sum(example.answer_tokens for example in self.examples)


def read_split(path: Path, data: DataSection) -> Split:
    """Reads and renders a jsonl file; raises DataError naming file and line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    prompts, completions = [], []
    for number, row in _rows(path, content):
        where = f"{path}:{number}"
        prompts.append(render(data.prompt, row, where))
        completions.append(render(data.completion, row, where))
    if not prompts:
        raise DataError(f"{path}: no examples in this file")
    if not any(completion.strip() for completion in completions):
        raise DataError(
            f"{path}: the template {data.completion!r} gives an empty completion in every row: no loss is left"
        )
    return Split(path, "sha256:" + hashlib.sha256(content).hexdigest(), tuple(prompts), tuple(completions))


def render(template: str, row: dict[str, Any], where: str) -> str:
    """Fills `{column}` from the row; a list is joined with ", ". `where` names the row in a DataError."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}") from error
    text = []
    for literal, column, format_spec, conversion in parts:
        text.append(literal)
        if column is None:
            continue
        if format_spec or conversion:
            raise DataError(f"template {template!r}: only {{column}} is understood, without format or conversion")
        if column not in row:
            near = difflib.get_close_matches(column, row, n=1)
            nearest = f"; the nearest is {near[0]!r}" if near else f"; there are {', '.join(map(repr, row))}"
            raise DataError(f"{where}: no column {column!r} in this row{nearest}")
        value = row[column]
        if value is None or isinstance(value, dict):
            raise DataError(f"{where}: column {column!r} is {json.dumps(value)}; text, a number or a list is expected")
        text.append(", ".join(map(str, value)) if isinstance(value, list) else str(value))
    return "".join(text)


def end_of_sequence(base: Base) -> int:
    """The id every answer ends in: one at which the server stops."""
    tokenizers_own = base.tokenizer.eos_token_id
    if tokenizers_own in base.eos_token_ids:
        return tokenizers_own
    if not base.eos_token_ids:
        raise DataError(f"{base.id} has no end-of-sequence token: the adapter could not learn to stop")
    return min(base.eos_token_ids)


def encode_split(split: Split, tokenizer: PreTrainedTokenizerBase, eos_id: int, max_tokens: int) -> Encoded:
    """Tokenizes every example to at most `max_tokens` ids; raises DataError when none fits."""
    encoded = [
        encode(prompt, completion, tokenizer, eos_id, max_tokens)
        for prompt, completion in zip(split.prompts, split.completions, strict=True)
    ]
    kept = tuple(example for example, _ in encoded if example is not None)
    if not kept:
        raise DataError(f"{split.path}: every example is longer than data.max_tokens = {max_tokens}: raise it")
    truncated = sum(was_cut for example, was_cut in encoded if example is not None)
    return Encoded(kept, truncated, dropped=len(encoded) - len(kept))


def encode(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, eos_id: int, max_tokens: int
) -> tuple[Example | None, bool]:
    """The example and whether its prompt had to be cut; no example when not one prompt token would be left.

    The prompt's ids are what the server feeds the model for the same text, BOS or none included. The boundary is
    counted in tokens and the answer always ends in a labelled EOS: no label is derived from an id, so a pad token that
    is also EOS cannot mask it.
    """
    prompt_ids: list[int] = tokenizer(prompt).input_ids
    if not prompt_ids:
        raise DataError("a prompt is empty, and this tokenizer puts no token before it: nothing to predict from")
    whole_ids: list[int] = tokenizer(prompt + completion).input_ids
    if whole_ids[: len(prompt_ids)] == prompt_ids:
        answer_ids = whole_ids[len(prompt_ids) :]  # the model's own spelling, also where text begins with a "▁"
    else:
        answer_ids = tokenizer(completion, add_special_tokens=False).input_ids
    if answer_ids[-1:] != [eos_id]:
        answer_ids = [*answer_ids, tokenizer.eos_token_id]
    if len(prompt_ids) + len(answer_ids) <= max_tokens:
        return Example((*prompt_ids, *answer_ids), len(prompt_ids)), False
    front = prompt_ids[:1] if prompt_ids[0] == tokenizer.bos_token_id else []
    room = max_tokens - len(answer_ids) - len(front)
    if room < 1:
        return None, True
    cut = [*front, *prompt_ids[-room:]]
    return Example((*cut, *answer_ids), len(cut)), True


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, trimmed to the positions the loss needs."""

    input_ids: torch.Tensor  # (rows, tokens) int64
    labels: torch.Tensor  # (rows, answer positions) int64: the id to predict at each of the last positions, or IGNORED
    tokens: int  # real ones, padding not counted

    @property
    def answer_positions(self) -> int:
        return self.labels.shape[1]


def make_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pads on the right. A causal model needs no attention mask then: no real token ever looks at a pad."""
    longest = max(len(example.ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORED)
    for row, example in enumerate(examples):
        ids = torch.tensor(example.ids)
        input_ids[row, : len(ids)] = ids
        labels[row, example.answer_start - 1 : len(ids) - 1] = ids[example.answer_start :]  # predicted one earlier
    first = min(example.answer_start for example in examples) - 1
    # The last position predicts nothing that is labelled, and attends for no one: it is not computed.
    return Batch(input_ids[:, :-1], labels[:, first:-1], sum(len(example.ids) for example in examples))


def steps_in_epoch(examples: int, examples_per_step: int) -> int:
    return math.ceil(examples / examples_per_step)


def epoch_order(lengths: Sequence[int], examples_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Which examples each optimizer step of an epoch sees: random, but of like length, so that little is padding.

    A function of its arguments alone: a resumed run finds its place by the step number. `examples_per_step` is the
    whole step's, so that the same examples meet whether they come as 1 batch of 16 or as 4 batches of 4.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    pool = 16 * examples_per_step  # sorted within pools: like lengths meet, yet never the same neighbours twice
    steps = []
    for start in range(0, len(shuffled), pool):
        by_length = sorted(shuffled[start : start + pool], key=lambda index: lengths[index])
        steps += [by_length[i : i + examples_per_step] for i in range(0, len(by_length), examples_per_step)]
    return [steps[i] for i in torch.randperm(len(steps), generator=generator).tolist()]


def _rows(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is expected, not {type(row).__name__}")
        yield number, row
