"""The joint loop of several runs: the rows of all go through one base as one batch, and each takes its own steps.

Owns whose turn it is and who has fallen out; how a run takes a step is its Loop's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers  # pyright: ignore[reportPrivateUsage]

from loraplex_server.engine.model import Base
from loraplex_trainer.adapter import checkpoint_activations, freeze, in_our_words
from loraplex_trainer.combine import as_one_row, as_rows
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import Batch, make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.errors import TooMuchTogether, TrainerError
from loraplex_trainer.fast import use_kernels
from loraplex_trainer.loop import Loop, Step, losses_at, memory_named
from loraplex_trainer.methods import lora_config, refuse_unused
from loraplex_trainer.mixed import Mixed, Part, adapted_by, mix
from loraplex_trainer.packing import packed_inputs, prepare_packing
from loraplex_trainer.ragged import Ragged, blocks_of, use_ragged

Generators = dict[str, torch.Generator]  # by kind of device


@dataclass(frozen=True)
class Shared:
    """One base with an adapter for each run, called `run0`, `run1`, … in it."""

    model: PeftModel
    generators: dict[str, Generators]  # of each adapter
    mixed: Mixed
    ragged: Ragged | None  # None: the rows of all runs are padded to one length

    @contextmanager
    def losses(self, batches: Sequence[tuple[str, Batch]], pad_id: int) -> Iterator[list[torch.Tensor]]:
        """The summed loss of each adapter's batch, by one forward; what is differentiated is so within."""
        each = [batch for _, batch in batches]
        combined = as_one_row(each) if self.ragged else as_rows(each, pad_id)
        blocks = blocks_of(combined.shapes)
        parts = [Part(name, block.start, block.stop) for (name, _), block in zip(batches, blocks, strict=True)]
        inputs = {"input_ids": combined.input_ids.to(self.model.device)}
        inputs |= packed_inputs(self.model, combined.position_ids)
        with self.mixed.batch(parts), _blocks(self.ragged, blocks):
            yield losses_at(self.model, inputs, combined.logits_to_keep.to(self.model.device), combined.answers)


@contextmanager
def _blocks(ragged: Ragged | None, blocks: Sequence) -> Iterator[None]:
    if ragged is None:
        yield
    else:
        with ragged.batch(blocks):
            yield


def share(base: Base, configs: Sequence[RunConfig]) -> Shared:
    """Freezes the base and puts a fresh adapter of each run on it: the weights it would have alone.

    Raises ConfigError for a target that the base has not.
    """
    freeze(base)
    # peft would take the adapter before for a part of the base: what "all-linear" is is asked while there is none.
    wanted = [_maybe_include_all_linear_layers(lora_config(each.lora, base.model), base.model) for each in configs]
    model: Any = None
    generators: dict[str, Generators] = {}
    for number, (config, lora) in enumerate(zip(configs, wanted, strict=True)):
        name = f"run{number}"
        torch.manual_seed(config.training.seed)
        with in_our_words("lora"):
            if model is None:
                model = get_peft_model(base.model, lora, adapter_name=name)
            else:
                model.add_adapter(name, lora)
        refuse_unused(config.lora, adapted_by(model, name))
        generators[name] = _generators(config.training.seed, base.device)
    mixed = mix(model, generators)
    if configs[0].training.gradient_checkpointing:
        checkpoint_activations(base, context_fn=mixed.contexts)
    if configs[0].training.kernels:
        use_kernels(model, mixed.parts_of)
    if any(config.data.packing for config in configs):
        prepare_packing(model)
    return Shared(model, generators, mixed, use_ragged(model.get_base_model()))


def _generators(seed: int, device: torch.device) -> Generators:
    """What a run draws its dropout from: on a CPU it goes on where making the adapter left off, as alone."""
    cpu = torch.Generator()
    cpu.set_state(torch.get_rng_state())
    more = {} if device.type == "cpu" else {device.type: torch.Generator(device).manual_seed(seed)}
    return {"cpu": cpu, **more}


@dataclass
class Member:
    """One run of several. `after_step` is called after each of its steps and says whether that was the last."""

    loop: Loop
    after_step: Callable[[Loop], bool]
    error: TrainerError | None = None  # why it fell out


def train_together(shared: Shared, members: Sequence[Member]) -> None:
    """Takes the remaining steps of all, in turns of one step of each.

    A run that is done, or fails, leaves the batch, and the others go on. Raises TooMuchTogether.
    """
    shared.model.train()
    at_work = [(member, member.loop.remaining_steps()) for member in members]
    while turn := [(member, step) for member, steps in at_work if (step := next(steps, None))]:
        losses = _forward_backward(shared, [(member.loop, step) for member, step in turn])
        over = [member for (member, step), loss in zip(turn, losses, strict=True) if _take(shared, member, step, loss)]
        at_work = [(member, steps) for member, steps in at_work if member not in over]


def _take(shared: Shared, member: Member, step: Step, loss: torch.Tensor) -> bool:
    """One run's step, and what is due after it; returns whether that was its last."""
    loop = member.loop
    loop.take(step, loss)
    try:
        with shared.mixed.alone(loop.adapter):
            over = member.after_step(loop) or loop.step == loop.total_steps
        if over:
            loop.read_losses()
    except TrainerError as error:
        member.error = error
        return True
    return over


def _forward_backward(shared: Shared, turn: Sequence[tuple[Loop, Step]]) -> list[torch.Tensor]:
    """Adds to the gradients of each run those of its step; returns each one's loss, by its own answer tokens."""
    totals = [torch.zeros((), device=shared.model.device) for _ in turn]
    for parts in zip_longest(*(loop.micro_batches(step) for loop, step in turn)):
        there = [number for number, part in enumerate(parts) if part is not None]
        losses = _one_pass(shared, [turn[number] for number in there], [parts[number].examples for number in there])
        for number, loss in zip(there, losses, strict=True):
            totals[number] += loss.to(shared.model.device)
    return totals


def _one_pass(
    shared: Shared, turn: Sequence[tuple[Loop, Step]], parts: Sequence[Sequence[Example]]
) -> list[torch.Tensor]:
    """A micro-batch of each run, through the base and back."""
    pad_id = turn[0][0].pad_id
    batches = [(loop.adapter, make_batch(part, pad_id)) for (loop, _), part in zip(turn, parts, strict=True)]
    with memory_named(partial(_too_much, parts)), shared.losses(batches, pad_id) as sums:
        losses = [loss / step.answer_tokens for (_, step), loss in zip(turn, sums, strict=True)]
        scaled = [loss * loop.scale_of(step) for (loop, step), loss in zip(turn, losses, strict=True)]
        torch.stack(scaled).sum().backward()
    return [loss.detach() for loss in losses]


def _too_much(parts: Sequence[Sequence[Example]]) -> TooMuchTogether:
    examples = [example for part in parts for example in part]
    return TooMuchTogether(len(examples), len(parts), max(len(example.ids) for example in examples))
