"""Several processes that train one adapter: who they are, and what they tell each other. Started by torchrun.

Here every process holds the whole base and adapter. Of each step's examples, which do not depend on how many processes
there are, each takes its share; their gradients are added up once per step, in one exchange, so all take the same step.
`sharding` and `zero` share out weights, gradients and optimizer state too: what they do otherwise is overridden there.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from loraplex_trainer.config import RunConfig
from loraplex_trainer.deepspeed_json import read_deepspeed
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.launch import read_launch
from loraplex_trainer.sections import BaseSection

if TYPE_CHECKING:
    from loraplex_trainer.encoding import Example
    from loraplex_trainer.loop import Loop

T = TypeVar("T")


@dataclass(frozen=True)
class Part:
    """The examples of one forward. Those that do not count only keep this process in step with the others."""

    examples: Sequence["Example"]
    counts: bool = True
    is_last: bool = False  # of this process in this step


@dataclass(frozen=True)
class Team:
    """One process of `size`, the first of which alone writes and speaks. Alone, every exchange is nothing to do."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def shares_base(self) -> bool:
        """Whether a process holds only a part of the base's weights."""
        return False

    @property
    def device(self) -> torch.device | None:
        """Where the losses lie, if not where the weights do."""
        return None

    def load_options(self, base: BaseSection) -> dict[str, Any]:
        """The arguments of `load_base`."""
        return base.load_options

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's part: every so many-th, so that sorted items are spread evenly."""
        return items[self.rank :: self.size] if self.size > 1 else items

    def parts(self, examples: Sequence["Example"], size: int) -> list[Part]:
        """This process's share, in parts of at most `size`."""
        share = self.share(examples)
        return [Part(share[i : i + size], is_last=i + size >= len(share)) for i in range(0, len(share), size)]

    def seed(self, seed: int, step: int) -> None:
        """Random numbers of a step, for dropout: its own in each process, and the same when the run is resumed."""
        if self.size > 1:
            torch.manual_seed((seed * 1_000_003 + step * 1_009 + self.rank) % 2**63)

    def begin(self, loop: "Loop") -> str:
        """All begin with the first one's weights. Once, when the weights are those that the run begins with.

        Returns what there is to tell of it.
        """
        self.share_weights(loop.parameters)
        return ""

    def share_weights(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        if self.size > 1:
            for parameter in parameters.values():
                dist.broadcast(parameter.data, src=0)

    def backward(self, loop: "Loop", loss: torch.Tensor, part: Part) -> None:
        """Adds to the gradients."""
        loss.backward()

    def take_step(self, loop: "Loop", limit: float) -> torch.Tensor:
        """Clips the gradients, which are added up, to a norm of `limit` and takes a step; returns the norm before."""
        norm = torch.nn.utils.clip_grad_norm_(loop.parameters.values(), limit)
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=True)
        return norm

    @contextmanager
    def whole(self, loop: "Loop") -> Iterator[None]:
        """While this lasts, the first one's loop has weights and optimizer state whole: to read them. All take part."""
        yield

    @torch.no_grad()
    def put(self, loop: "Loop", weights: Mapping[str, torch.Tensor]) -> None:
        """Gives the adapter these whole weights."""
        for name, tensor in weights.items():
            loop.parameters[name].copy_(tensor)

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
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def total(self, number: float) -> float:
        """The sum of a number over all processes."""
        if self.size == 1:
            return number
        summed = torch.tensor(number, dtype=torch.float64, device=device_of_team())
        dist.all_reduce(summed)
        return summed.item()


ALONE = Team()


def join_team(config: RunConfig) -> Team:
    """The team that torchrun started this process in; a team of one without torchrun.

    Raises ConfigError where several processes were asked for and one was started.
    """
    distributed, device = config.training.distributed, config.base.device
    strategy = distributed.strategy
    check_strategy(strategy)
    if "RANK" not in os.environ:
        _refuse_silent_launch()
        if strategy != "ddp":
            raise ConfigError(
                f"training.distributed.strategy: {strategy!r}: it shares one run out among processes, and one was "
                "started: start them with torchrun --nproc-per-node N -m loraplex_trainer RUN_YAML"
            )
        return ALONE
    launch = read_launch()
    rank, size = launch.rank, launch.size
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if launch.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"{os.environ.get('LOCAL_WORLD_SIZE', size)} processes were started on this machine, which has "
                f"{torch.cuda.device_count()} GPUs: start one for each (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(launch.local_rank)
    if (size > 1 or strategy != "ddp") and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if strategy == "fsdp":
        from loraplex_trainer.sharding import ShardedTeam

        return ShardedTeam(rank, size, offload=distributed.offload == "cpu")
    if strategy.startswith("zero"):
        from loraplex_trainer.zero import ZeroTeam

        given = read_deepspeed(distributed.deepspeed) if distributed.deepspeed else {}
        return ZeroTeam(rank, size, stage=int(strategy.removeprefix("zero")), given=given)
    return Team(rank, size)


def check_strategy(strategy: str) -> None:
    """Raises ConfigError for DeepSpeed's where that is not installed, and where accelerate was told of another one."""
    if strategy.startswith("zero") and find_spec("deepspeed") is None:
        raise ConfigError(
            f"training.distributed.strategy: {strategy!r} is DeepSpeed's, which is not installed: "
            "pip install 'loraplex[deepspeed]'"
        )
    for variable, theirs in (("ACCELERATE_USE_FSDP", "fsdp"), ("ACCELERATE_USE_DEEPSPEED", "zero")):
        if os.environ.get(variable) == "true" and not strategy.startswith(theirs):
            raise ConfigError(
                f"training.distributed.strategy: {strategy!r}, but accelerate launch was configured for "
                f"{'DeepSpeed' if theirs == 'zero' else 'FSDP'}: the run file decides, so set it there"
            )


def device_of_team() -> torch.device:
    """Where what is exchanged lies."""
    return torch.device("cuda" if "nccl" in dist.get_backend_config() else "cpu")


def _refuse_silent_launch() -> None:
    """`accelerate launch --cpu --num_processes 2` starts one process and says nothing (accelerate 1.15)."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one: start them with "
            "torchrun --nproc-per-node N -m loraplex_trainer RUN_YAML"
        )
