"""Splits: rows read and rendered, held-out ones set aside, duplicates and leaks counted; encoded, batched, ordered.

Knows no model. Reading needs no tokenizer, so its mistakes are found before a base is loaded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from loraplex_trainer.data_keys import DataSection, SourceSection
from loraplex_trainer.encoding import Encoder, Example, template_file
from loraplex_trainer.errors import DataError
from loraplex_trainer.forms import Sample, sample_of, trained_roles
from loraplex_trainer.packing import packed_positions
from loraplex_trainer.sources import Source, digest_of, read_source

IGNORED = -100  # the label that cross_entropy leaves out
_SHARES = 10_000  # a share is taken of so many parts: a hundredth of a percent


@dataclass(frozen=True)
class Split:
    """Samples to train on, or to hold out, and their sources. `leaks` training samples are held out too, or were.

    `shared_prompts` ask what is asked of a held-out one too, and answer it differently.
    """

    sources: tuple[Source, ...]
    samples: tuple[Sample, ...]
    leaks: int = 0
    shared_prompts: int = 0

    @cached_property
    def duplicates(self) -> int:
        """How many samples are the same as one before."""
        return len(self.samples) - len({sample.digest for sample in self.samples})

    @cached_property
    def sha256(self) -> str:
        """Of the file, where the split is one whole file; else of the samples."""
        if len(self.sources) == 1 and not self.sources[0].split and self.sources[0].rows == len(self.samples):
            return self.sources[0].sha256
        return "sha256:" + digest_of([sample.turns for sample in self.samples])

    @property
    def path(self) -> str:
        return ", ".join(source.path for source in self.sources)

    @property
    def prompts(self) -> tuple[str, ...]:
        """Of rows with a prompt and a completion."""
        return tuple(sample.turns[0][1] for sample in self.samples)

    @property
    def completions(self) -> tuple[str, ...]:
        """Of rows with a prompt and a completion."""
        return tuple(sample.turns[-1][1] for sample in self.samples)

    @property
    def record(self) -> dict[str, Any]:
        """What the receipt says of it before any token: each source, and what is the same as something else."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "sources": [source.record for source in self.sources],
            "duplicates": self.duplicates,
            "leaks": self.leaks,
            "shared_prompts": self.shared_prompts,
        }


def read_splits(data: DataSection) -> dict[str, Split]:
    """`train`, and `heldout` where there is one. Raises DataError, naming file and row."""
    template_file(data)  # a file that is not there is told before the rows are read
    train = read_split(data.train, data)
    match data.heldout:
        case None:
            return {"train": train}
        case int() | str() as wanted:
            train, heldout = _held_out(train, wanted)
        case sources:
            heldout = read_split(sources, data)
    return dict(zip(("train", "heldout"), _without_leaks(train, heldout, data.on_leak), strict=True))


def read_split(sources: Any, data: DataSection) -> Split:
    """Reads and renders one source or several; raises DataError naming file and row."""
    several = sources if isinstance(sources, tuple | list) else (sources,)
    read = [read_source(one if isinstance(one, SourceSection) else SourceSection(path=str(one))) for one in several]
    samples = tuple(sample_of(row, data) for _, rows in read for row in rows)
    split = Split(tuple(source for source, _ in read), samples)
    if not samples:
        raise DataError(f"{split.path}: no examples in this file")
    roles = trained_roles(data)
    if not any(text.strip() for sample in samples for role, text in sample.turns if role in roles):
        raise DataError(f"{split.path}: {_nothing_to_learn(data)} in every row: no loss is left")
    return split


def _nothing_to_learn(data: DataSection) -> str:
    if data.form == "prompt_completion":
        return f"the template {data.completion!r} gives an empty completion"
    return f"no text of {' or '.join(sorted(trained_roles(data)))}"


def _held_out(train: Split, wanted: int | str) -> tuple[Split, Split]:
    """Divides one split by the digests of its samples: rows that are added or moved change no other row's side.

    A share takes the digests up to that part of all there can be, a count the lowest ones there are.
    """
    if isinstance(wanted, str):
        parts = round(float(wanted.removesuffix("%")) / 100 * _SHARES)
        limit = f"{16**16 * parts // _SHARES:016x}"
    else:
        limit = sorted(sample.digest for sample in train.samples)[:wanted][-1]
    kept = tuple(sample for sample in train.samples if sample.digest > limit)
    held = tuple(sample for sample in train.samples if sample.digest <= limit)
    if not kept or not held:
        told = f"of {len(train.samples)} examples it holds out {len(held)}; some must be held out, and some left"
        raise DataError(f"data.heldout: {wanted}: {told}")
    return replace(train, samples=kept), replace(train, samples=held)


def _without_leaks(train: Split, heldout: Split, on_leak: str) -> tuple[Split, Split]:
    """Counts the training samples that are held out too; `drop` leaves them out of the training."""
    held = {sample.digest for sample in heldout.samples}
    leaked = [sample for sample in train.samples if sample.digest in held]
    if leaked and on_leak == "error":
        raise DataError(
            f"{leaked[0].where}: this example is held out too, as are {len(leaked) - 1} others (data.on_leak)"
        )
    if leaked and on_leak == "drop":
        kept = tuple(sample for sample in train.samples if sample.digest not in held)
        if not kept:
            raise DataError(f"{train.path}: every example is held out too: nothing is left to train on")
        train = replace(train, samples=kept)
    asked = {sample.asked for sample in heldout.samples} - {()}
    shared = sum(sample.asked in asked and sample.digest not in held for sample in train.samples)
    return replace(train, leaks=len(leaked), shared_prompts=shared), heldout


@dataclass(frozen=True)
class Encoded:
    """A tokenized split. `truncated` samples lost `cut_tokens` to data.truncation; `dropped` ones are left out.

    In `unlearnt` ones nothing has a label: a conversation in which nobody answers, an empty text. In `empty` ones the
    loss is on no text, on the end of sequence alone.
    """

    examples: tuple[Example, ...]
    truncated: int
    dropped: int
    cut_tokens: int
    dropped_tokens: int
    unlearnt: int
    empty: int

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def answer_tokens(self) -> int:
        return sum(example.answer_tokens for example in self.examples)

    @property
    def what_was_lost(self) -> str:
        """What data.truncation did, in words."""
        return (
            f"{self.truncated} examples are too long and lost {self.cut_tokens} tokens, "
            f"{self.dropped} of {self.dropped_tokens} tokens were left out, {self.unlearnt} have nothing to learn; "
            f"{self.tokens} tokens are kept"
        )


def encode_split(split: Split, encoder: Encoder) -> Encoded:
    """Tokenizes every sample; raises DataError when none fits, or no token has a label."""
    fitted = [encoder.fit(sample) for sample in split.samples]
    examples = tuple(
        replace(example, where=(sample.where,))
        for sample, (_, kept) in zip(split.samples, fitted, strict=True)
        for example in kept
    )
    lost = [(_tokens(whole), _tokens(kept)) for whole, kept in fitted if whole is not kept]
    if not examples:
        limit = encoder.data.max_tokens
        if not any(whole for whole, _ in fitted):
            raise DataError(f"{split.path}: the template masks every token of every example: no loss is left")
        raise DataError(f"{split.path}: every example is longer than data.max_tokens = {limit}: raise it")
    return Encoded(
        examples,
        truncated=sum(0 < left < all_of_it for all_of_it, left in lost),
        dropped=sum(not left for _, left in lost),
        cut_tokens=sum(all_of_it - left for all_of_it, left in lost if 0 < left < all_of_it),
        dropped_tokens=sum(all_of_it for all_of_it, left in lost if not left),
        unlearnt=sum(not whole for whole, _ in fitted),
        empty=sum(
            bool(whole) and not any(text.strip() for role, text in sample.turns if role in encoder.roles)
            for sample, (whole, _) in zip(split.samples, fitted, strict=True)
        ),
    )


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows, trimmed to the positions the loss needs."""

    input_ids: torch.Tensor  # (rows, tokens) int64
    labels: torch.Tensor  # (rows, answer positions) int64: the id to predict at each of the last positions, or IGNORED
    tokens: int  # real ones, padding not counted
    logits_to_keep: int | torch.Tensor  # the last so many positions, or these ones: whose logits the labels are for
    position_ids: torch.Tensor | None = None  # (rows, tokens) int64, where examples are packed: each begins at 0

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
        for start, stop in example.trained:
            labels[row, start - 1 : stop - 1] = ids[start:stop]  # predicted one earlier
    tokens = sum(len(example.ids) for example in examples)
    # The last position predicts nothing that is labelled, and attends for no one: it is not computed.
    input_ids, labels = input_ids[:, :-1], labels[:, :-1]
    if all(len(example.starts) == 1 for example in examples):
        first = min(example.answer_start for example in examples) - 1
        return Batch(input_ids, labels[:, first:], tokens, logits_to_keep=longest - 1 - first)
    spans = [span for example in examples for span in example.trained]
    labelled = torch.tensor(sorted({at - 1 for start, stop in spans for at in range(start, stop)}))
    positions = torch.stack([packed_positions(example, longest)[:-1] for example in examples])
    return Batch(input_ids, labels[:, labelled], tokens, logits_to_keep=labelled, position_ids=positions)


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
