"""The preflight of a run, `loraplex train --check`: everything that can be known before training, and nothing written.

Shows what the model will see and where the loss is, what is left out, what it will take in memory and in time.
"""

import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from loraplex_server.engine.model import load_base
from loraplex_trainer.adapter import load_weights
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Encoded, steps_in_epoch
from loraplex_trainer.encoding import Example, encoder_for
from loraplex_trainer.loop import Loop
from loraplex_trainer.memory import MemoryEstimate, attach_within_memory, base_bytes, estimate_memory, gib
from loraplex_trainer.parent import find_parent
from loraplex_trainer.progress import duration, say
from loraplex_trainer.run import Material, build_loop, encode_splits, rows_of
from loraplex_trainer.schedule import count_steps
from loraplex_trainer.sections import SHARED
from loraplex_trainer.size import adapter_size
from loraplex_trainer.team import check_strategy

SHOWN_EXAMPLES = 3
SHOWN_CHARACTERS = 400  # of each part of an example, from its two ends
TIMED_STEPS = 2


def check(config: RunConfig, console: Console, *, timing: bool) -> MemoryEstimate:
    """Prints the report; returns what it says of memory.

    Raises what `train` would raise before its first step: TrainerError and EngineError.
    """
    check_strategy(strategy := config.training.distributed.strategy)
    splits = Material.read(config, console).splits
    base = load_base(**config.base.load_options, weights=False)
    encoded = encode_splits(config, splits, base, encoder_for(base, config.data), console)
    for name, split in splits.items():
        say(console, f"{name}: {split.path}: {_counts(encoded[name])}")
    for number, example in enumerate(encoded["train"].examples[:SHOWN_EXAMPLES], start=1):
        console.print(rendered(number, example, base.tokenizer, colour=console.is_terminal), soft_wrap=True)
    loaded = base_bytes(base.model, config.base)
    model = attach_within_memory(base, config)
    with tempfile.TemporaryDirectory() as scratch:
        if parent := find_parent(config, base.description, Path(scratch)):
            with warnings.catch_warnings():  # torch says that nothing is copied into a model without numbers
                warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
                load_weights(model, parent.folder)
            say(console, f"continues: {parent.name}, {parent.digest}")
    say(console, _adapter(model))
    if hint := config.serving_hint:
        say(console, hint)
    examples = rows_of(encoded["train"], config)
    estimate = estimate_memory(model, loaded, examples, config.training)
    for line in _memory(estimate, config):
        say(console, line)
    if strategy in SHARED:
        say(console, f"{strategy}: of this the processes share out, each its part: {SHARED[strategy]}")
    per_epoch = steps_in_epoch(len(examples), config.examples_per_step)
    rows = "packed rows" if config.data.packing else "examples"
    size = f"{config.training.batch_size} × {config.training.accumulation_steps} {rows}"
    say(console, f"steps: {count_steps(config.training, per_epoch)} of {size}, {per_epoch} to an epoch")
    if timing:
        seconds, tokens_per_second = _timed(config, encoded["train"])
        say(
            console, f"time: about {duration(seconds)}, at the {tokens_per_second:,.0f} tokens/s of {TIMED_STEPS} steps"
        )
    return estimate


def say_memory_together(estimates: Sequence[MemoryEstimate], config: RunConfig, console: Console) -> None:
    """Of runs that are trained at the same time: they share `config`'s base, and each has all else of its own."""
    base, own = estimates[0].base, sum(estimate.total - estimate.base for estimate in estimates)
    free, where = _free_memory(config.base.device)
    parts = f"base {gib(base)}, once, and what the runs have of their own {gib(own)}"
    say(
        console, f"memory together, an estimate: {parts}: {gib(base + own)} in all; {gib(free)} are free on the {where}"
    )
    if base + own > free:
        say(
            console,
            "too much: lower training.batch_size of each, and raise training.accumulation_steps as much, or train "
            "fewer together",
        )


def rendered(number: int, example: Example, tokenizer: PreTrainedTokenizerBase, *, colour: bool) -> Text:
    """An example as the model sees it; where the loss is, green on a terminal and in [brackets] elsewhere."""
    text = Text(f"example {number}: ")
    for part, learnt in _parts(example, tokenizer):
        short = part if len(part) <= 2 * SHOWN_CHARACTERS else f"{part[:SHOWN_CHARACTERS]} … {part[-SHOWN_CHARACTERS:]}"
        text.append(short if colour or not learnt else f"[{short}]", style="green" if learnt else "dim")
    return text


def _parts(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """Stretches of text in their order, and whether the loss is on them."""
    at = 0
    for start, stop in (*example.trained, (len(example.ids), len(example.ids))):
        for ids, learnt in ((example.ids[at:start], False), (example.ids[start:stop], True)):
            if ids:
                yield str(tokenizer.decode(list(ids))).replace("\n", "⏎"), learnt
        at = stop


def _counts(encoded: Encoded) -> str:
    return (
        f"{len(encoded.examples)} examples, {encoded.tokens:,} tokens, loss on {encoded.answer_tokens:,}; "
        f"{encoded.truncated} truncated by {encoded.cut_tokens} tokens, {encoded.dropped} of {encoded.dropped_tokens} "
        f"tokens left out"
    )


def _adapter(model: PeftModel) -> str:
    size = adapter_size(model)
    return (
        f"adapter: {size.parameters:,} trainable parameters; {size.tensor_bytes:,} bytes of weights are saved, "
        f"in a file of {size.file_bytes:,}"
    )


def _memory(estimate: MemoryEstimate, config: RunConfig) -> Iterator[str]:
    """The parts, their sum beside what there is, and what to lower where that is less."""
    parts = ", ".join(f"{name} {gib(size)}" for name, size in vars(estimate).items())
    free, where = _free_memory(config.base.device)
    yield f"memory, an estimate: {parts}: {gib(estimate.total)} in all; {gib(free)} are free on the {where}"
    if estimate.total <= free:
        return
    fixed = estimate.total - estimate.activations
    if fixed > free:
        yield "too much: the base and its adapter alone do not fit: take a smaller base, or quantize it"
        return
    size = config.training.batch_size
    fits = max(1, int(size * (free - fixed) / estimate.activations))
    yield (
        f"too much: lower training.batch_size from {size} to {fits}, and raise training.accumulation_steps to "
        f"{-(-config.examples_per_step // fits)}: the steps stay the same"
        if fits < size
        else "too much: lower data.max_tokens"
    )


def _timed(config: RunConfig, train: Encoded) -> tuple[float, float]:
    """Seconds that the run will take, and tokens per second, from a few real steps after one that warms up."""
    loop = build_loop(config, load_base(**config.base.load_options), train)
    total_steps, loop.total_steps = loop.total_steps, 1 + TIMED_STEPS
    marks: list[tuple[float, int]] = []

    def mark(loop: Loop) -> bool:
        loop.read_losses()  # waits for the device
        marks.append((time.monotonic(), loop.tokens_done))
        return False

    loop.run(mark)
    (began, tokens_before), (ended, tokens) = marks[0], marks[-1]
    speed = (tokens - tokens_before) / (ended - began)
    return total_steps / loop.steps_per_epoch * train.tokens / speed, speed


def _free_memory(device: str) -> tuple[int, str]:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return psutil.virtual_memory().available, "CPU"
