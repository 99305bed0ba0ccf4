"""Several processes that train one adapter: who they are, and what they tell each other. Started by torchrun.

Every process holds the whole base and adapter. Of each step's examples, which do not depend on how many processes
there are, each takes its share; their gradients are added up once per step, in one exchange, so all take the same step.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from loraplex_trainer.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """One process of `size`, the first of which alone writes and speaks. Alone, every exchange is nothing to do."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every so many-th, so that sorted items are spread evenly."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of a step, for dropout: its own in each process, and the same when the run is resumed."""
        if self.size > 1:
            torch.manual_seed((seed * 1_000_003 + step * 1_009 + self.rank) % 2**63)

    def share_weights(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """All begin with the first one's weights."""
        if self.size > 1:
            for parameter in parameters.values():
                dist.broadcast(parameter.data, src=0)

    def add_up(self, parameters: Mapping[str, torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Sums the gradients over all processes, in place, and the loss. A missing gradient counts as zero."""
        if self.size == 1:
            return loss
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters.values()]
        everything = torch.cat([loss.flatten(), *(grad.flatten() for grad in grads)])
        dist.all_reduce(everything)
        summed, *totals = everything.split([1, *(grad.numel() for grad in grads)])
        for parameter, total in zip(parameters.values(), totals, strict=True):
            parameter.grad = total.view_as(parameter)
        return summed.squeeze()

    def any(self, asked: bool) -> bool:
        """Whether any process was asked."""
        return self.total(float(asked)) > 0

    def wait(self) -> None:
        """Until all have come this far."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """After the last exchange."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return number
        summed = torch.tensor(number, dtype=torch.float64, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(summed)
        return summed.item()


ALONE = Team()


def join_team(device: str) -> Team:
    """The team that torchrun started this process in; a team of one without torchrun.

    Raises ConfigError where several processes were asked for and one was started.
    """
    if "RANK" not in os.environ:
        _refuse_silent_launch()
        return ALONE
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"{os.environ['LOCAL_WORLD_SIZE']} processes were started on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: start one for each (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
    return Team(rank, size)


def _refuse_silent_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate 1.15)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one: start them with "
            "torchrun --nproc-per-node N -m loraplex_trainer RUN_YAML"
        )
