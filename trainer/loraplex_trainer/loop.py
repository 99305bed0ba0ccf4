"""The optimisation of the adapter's parameters, the loss normalised by the answer tokens of the whole step.

Owns the order forward → backward → clip → step and the stop signals; writes nothing itself.
"""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy

from loraplex_server.engine.model import OUT_OF_MEMORY
from loraplex_trainer import seq2seq
from loraplex_trainer.adapter import ADAPTER, rate_groups, trainable_parameters
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import IGNORED, Batch, Example, epoch_order, make_batch, steps_in_epoch
from loraplex_trainer.errors import NotFinite, OutOfMemory, TrainerError
from loraplex_trainer.head import head_in_pieces, hidden_states, loss_in_pieces
from loraplex_trainer.optimizers import build_optimizer
from loraplex_trainer.packing import packed_inputs
from loraplex_trainer.schedule import count_steps, scheduled_rate
from loraplex_trainer.stopping import Evaluation, is_best
from loraplex_trainer.team import ALONE, Part, Team


def torch_generators() -> dict[str, torch.Generator]:
    """torch's own, of the CPU and of the GPU in use."""
    found = {"cpu": torch.default_generator}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    return found


@dataclass(frozen=True)
class Step:
    """What one step of the optimizer sees: examples, and where they are among all of the run's."""

    indices: list[int]
    examples: list[Example]

    @property
    def answer_tokens(self) -> int:
        return sum(example.answer_tokens for example in self.examples)


@dataclass
class Loop:
    """One run's optimisation state. `losses` holds one number per step done: mean nats per answer token.

    `evaluations` are the held-out losses measured so far, `best` the weights (on the CPU) at the lowest of them.
    """

    model: PeftModel
    examples: Sequence[Example]
    config: RunConfig
    pad_id: int
    team: Team = ALONE
    adapter: str = ADAPTER  # which of the model's adapters is this run's
    generators: dict[str, torch.Generator] = field(default_factory=torch_generators)  # by kind of device, for dropout
    step: int = 0
    losses: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    tokens_done: int = 0  # since this process began
    learning_rate: float = 0.0  # of the latest step
    _unread: list[tuple[torch.Tensor, torch.Tensor, list[int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        training = self.config.training
        self.parameters, groups = rate_groups(
            trainable_parameters(self.model, self.adapter), self.config.lora.plus_ratio
        )
        self.optimizer = build_optimizer(groups, training, self.model.device)
        self.steps_per_epoch = steps_in_epoch(len(self.examples), self.config.examples_per_step)
        self.total_steps = count_steps(training, self.steps_per_epoch)
        self.forward: torch.nn.Module = self.model  # what computes; a team may put an engine around the model

    def run(self, after_step: Callable[["Loop"], bool]) -> None:
        """Takes the remaining steps until `after_step`, called after each, says that one was the last.

        Raises NotFinite before a bad step is kept.
        """
        self.model.train()
        for step in self.remaining_steps():
            self.team.seed(self.config.training.seed, self.step)
            loss = self._forward_backward(step)
            self.take(step, self.team.add_up(self.parameters, loss))
            if after_step(self):
                break
        self.read_losses()

    def remaining_steps(self) -> Iterator[Step]:
        """From the one after `self.step` on; each is asked for when the one before is taken."""
        lengths = [len(example.ids) for example in self.examples]
        while self.step < self.total_steps:
            epoch, place = divmod(self.step, self.steps_per_epoch)
            order = epoch_order(lengths, self.config.examples_per_step, self.config.training.seed, epoch)
            for indices in order[place : place + self.total_steps - self.step]:
                yield Step(indices, [self.examples[index] for index in indices])

    def micro_batches(self, step: Step) -> list[Part]:
        """This process's share of a step, so many examples at a time."""
        return self.team.parts(step.examples, self.config.training.batch_size)

    def scale_of(self, step: Step) -> int:
        """A mean's gradients are too small for float16: the sum's are taken, and divided in float32."""
        return step.answer_tokens if self.model.dtype == torch.float16 else 1

    def take(self, step: Step, loss: torch.Tensor) -> None:
        """Clips the gradients that are there, `scale_of` times the mean's, and takes the step; `loss` is read later."""
        if (scale := self.scale_of(step)) > 1:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        self.learning_rate = scheduled_rate(self.step, self.total_steps, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * group["times"]
        norm = self.team.take_step(self, self.config.training.max_grad_norm or math.inf)
        self.step += 1
        self.tokens_done += sum(len(example.ids) for example in step.examples)
        self._unread.append((loss, norm, step.indices))

    def is_due(self, every: int | str | None) -> bool:
        """Whether what is done `every` so many steps, or every "epoch", is due now. After the last step all is."""
        if every is None:
            return False
        steps = self.steps_per_epoch if every == "epoch" else int(every)
        return self.step % steps == 0 or self.step == self.total_steps

    def measure(self, heldout: Sequence[Example]) -> None:
        """Adds the held-out loss of now to `evaluations`, and keeps the weights when none was lower.

        Raises NotFinite.
        """
        loss = self.loss_now("held-out loss", heldout)
        self.evaluations.append((self.step, loss))
        if self.config.training.keep == "best" and is_best(self.evaluations):
            with self.team.whole(self):
                self.best = {name: value.detach().to("cpu", copy=True) for name, value in self.parameters.items()}

    def check_last(self) -> None:
        """Raises NotFinite where the last step's own examples have no loss any more: no step comes that would tell."""
        self.loss_now("loss after the last step", [self.examples[index] for index in self._latest()])

    def loss_now(self, what: str, examples: Sequence[Example]) -> float:
        """Nats per answer token. Raises NotFinite, by the name of `what`, for the last step, and OutOfMemory."""
        size = self.config.training.batch_size
        longest = sorted(examples, key=lambda example: len(example.ids))[-size:]
        with memory_named(partial(self._too_much, longest, self.step)):
            loss = mean_loss(self.forward, examples, size, self.pad_id, self.team)
        if not math.isfinite(loss):
            raise NotFinite(self.step, what, loss, self._rows(self._latest()))
        return loss

    def settle(self) -> int:
        """Puts the best weights back where those are to be kept; returns the step whose weights the model has now."""
        self.team.put(self, self.best)
        return min(self.evaluations, key=lambda measured: measured[1])[0] if self.best else self.step

    def read_losses(self) -> None:
        """Brings the latest losses over from the device (it waits there, so not every step); raises NotFinite."""
        if not self._unread:
            return
        values = torch.stack([torch.stack([loss, norm]) for loss, norm, _ in self._unread]).tolist()
        first = self.step - len(values) + 1
        for step, ((loss, norm), (*_, indices)) in enumerate(zip(values, self._unread, strict=True), start=first):
            for what, value in (("loss", loss), ("gradient norm", norm)):
                if not math.isfinite(value):
                    raise NotFinite(step, what, value, self._rows(indices))
            self.losses.append(loss)
        self._unread.clear()

    def _latest(self) -> list[int]:
        """The examples of the step before, whichever process took it."""
        epoch, place = divmod(self.step - 1, self.steps_per_epoch)
        lengths = [len(example.ids) for example in self.examples]
        return epoch_order(lengths, self.config.examples_per_step, self.config.training.seed, epoch)[place]

    def _rows(self, indices: Sequence[int]) -> list[str]:
        return [where for index in sorted(indices) for where in self.examples[index].where]

    def _forward_backward(self, step: Step) -> torch.Tensor:
        """Adds to the gradients; returns the loss of this process's share, a part of the mean over the whole step."""
        total = torch.zeros((), device=self.team.device or self.model.device)
        for part in self.micro_batches(step):
            with memory_named(partial(self._too_much, part.examples, self.step + 1)):
                loss = part.counts * examples_loss(self.forward, part.examples, self.pad_id) / step.answer_tokens
                self.team.backward(self, loss * self.scale_of(step), part)
            total += loss.detach().to(total.device)
        return total

    def _too_much(self, part: Sequence[Example], step: int) -> OutOfMemory:
        longest = max(len(example.ids) for example in part)
        return OutOfMemory(step, len(part), longest, self.config.training.accumulation_steps)


@contextmanager
def memory_named(error: Callable[[], TrainerError]) -> Iterator[None]:
    """Raises `error`, which says what to lower, in the place of torch's errors for want of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as torchs:  # the CPU's allocator raises a plain RuntimeError
        if not isinstance(torchs, MemoryError) and not any(words in str(torchs) for words in OUT_OF_MEMORY):
            raise
        raise error() from torchs


def examples_loss(model: Any, examples: Sequence[Example], pad_id: int) -> torch.Tensor:
    """Summed over the labelled tokens of a batch, for either kind of model."""
    if model.config.is_encoder_decoder:
        return seq2seq.loss_sum(model, examples, pad_id)
    return loss_sum(model, make_batch(examples, pad_id))


def loss_sum(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Cross-entropy summed over the labelled tokens, in float32; logits are made only where a label can be."""
    device = next(model.parameters()).device
    inputs = {"input_ids": batch.input_ids.to(device), **packed_inputs(model, batch.position_ids)}
    labels = batch.labels.flatten()
    labelled = (labels != IGNORED).nonzero().squeeze(1)  # found before the move: the device is not waited for
    (loss,) = losses_at(model, inputs, batch.logits_to_keep, [(labelled, labels[labelled])])
    return loss


def losses_at(
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    positions: int | torch.Tensor,
    answers: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> list[torch.Tensor]:
    """One forward, and the summed cross-entropy of each of `answers`: ids, and the places, row by row, they belong to.

    `positions`: the last so many of each row, or these ones, among which the places are.
    """
    given = {**inputs, "use_cache": False}
    if head := head_in_pieces(model):
        hidden = hidden_states(model, given, positions).flatten(0, 1)
        return [loss_in_pieces(hidden[at], head, ids) for at, ids in answers]
    logits = model(logits_to_keep=positions, **given).logits.flatten(0, 1)  # (rows · positions, vocabulary)
    where = logits.device  # its own: the weights may be offloaded
    return [cross_entropy(logits[at.to(where)].float(), ids.to(where), reduction="sum") for at, ids in answers]


@torch.no_grad()
def mean_loss(
    model: torch.nn.Module, examples: Sequence[Example], batch_size: int, pad_id: int, team: Team = ALONE
) -> float:
    """Nats per answer token over `examples`, without dropout; the model's mode is put back."""
    was_training = model.training
    model.eval()
    parts = team.parts(sorted(examples, key=lambda example: len(example.ids)), batch_size)
    total = team.total(sum(part.counts * examples_loss(model, part.examples, pad_id).item() for part in parts))
    model.train(was_training)
    return total / sum(example.answer_tokens for example in examples)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM so that the step in hand is finished; a second one acts at once."""
    received: list[int] = []
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
