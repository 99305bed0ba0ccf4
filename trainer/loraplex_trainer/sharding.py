"""Fully sharded data parallel: each process holds a part of every weight, gradient and optimizer state (torch's FSDP2).

The base's too, quantized or not: a layer is whole only while it computes. Knows the loop's parts, not its order.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from loraplex_trainer.adapter import trainable_parameters
from loraplex_trainer.sections import BaseSection
from loraplex_trainer.team import Part, Team, device_of_team

if TYPE_CHECKING:
    from loraplex_trainer.encoding import Example
    from loraplex_trainer.loop import Loop


@dataclass(frozen=True)
class ShardedTeam(Team):
    """`offload`: what a process holds lies in host memory, and the optimizer works there."""

    offload: bool = False

    @property
    def shares_base(self) -> bool:
        return True

    @property
    def device(self) -> torch.device:
        return device_of_team()

    def load_options(self, base: BaseSection) -> dict[str, Any]:
        return load_on_host(base)

    def parts(self, examples: Sequence["Example"], size: int) -> list[Part]:
        return parts_in_step(self, examples, size)

    def begin(self, loop: "Loop") -> str:
        """Shares everything out: the weights, and the optimizer's state of a run that is resumed."""
        self.share_weights(loop.parameters)
        old, whole = loop.parameters, sum(parameter.nbytes for parameter in loop.model.parameters())
        self._shard(loop.model)
        loop.parameters = trainable_parameters(loop.model)
        optimizer, names = loop.optimizer, {id(parameter): name for name, parameter in old.items()}
        for group in optimizer.param_groups:
            group["params"] = [loop.parameters[names[id(parameter)]] for parameter in group["params"]]
        states = {name: optimizer.state.pop(parameter, {}) for name, parameter in old.items()}
        for name, state in states.items():
            sharded = loop.parameters[name]
            if state:
                optimizer.state[sharded] = {
                    key: self._sharded(value, sharded) if _is_like(value, sharded) else value
                    for key, value in state.items()
                }
        held = sum(_local_bytes(parameter) for parameter in loop.model.parameters())
        return f"fsdp: each process holds about {held:,} of the {whole:,} bytes of base and adapter"

    def add_up(self, parameters: Mapping[str, torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """The loss alone: the gradients are added up in each backward."""
        torch.distributed.all_reduce(loss)
        return loss

    def take_step(self, loop: "Loop", limit: float) -> torch.Tensor:
        norm = super().take_step(loop, limit)
        assert isinstance(norm, DTensor)
        return _whole(norm).to(self.device)

    @contextmanager
    def whole(self, loop: "Loop") -> Iterator[None]:
        """Whole copies take the places of the shards, in the model and in the loop."""
        sharded, state = loop.parameters, loop.optimizer.state
        for module in _sharded_modules(loop.model):
            module.reshard()
        loop.parameters = {name: torch.nn.Parameter(_whole(shard)) for name, shard in sharded.items()}
        for name, parameter in loop.parameters.items():
            _replace(loop.model, name, parameter)
            if sharded[name] in state:
                state[parameter] = {
                    key: _whole(value) if isinstance(value, DTensor) else value
                    for key, value in state[sharded[name]].items()
                }
        try:
            yield
        finally:
            for name, parameter in loop.parameters.items():
                state.pop(parameter, None)
                _replace(loop.model, name, sharded[name])
            loop.parameters = sharded

    @torch.no_grad()
    def put(self, loop: "Loop", weights: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            shard: Any = loop.parameters[name]
            shard.to_local().copy_(self._local(tensor, shard))

    def _shard(self, model: Any) -> None:
        """Layer by layer, so that no more than one of them is ever whole on the device."""
        policy = CPUOffloadPolicy(pin_memory=self.device.type == "cuda") if self.offload else OffloadPolicy()
        for layer in repeated_layers(model):
            fully_shard(layer.to(self.device), offload_policy=policy)
        vocabulary = [model.get_input_embeddings(), model.get_output_embeddings()]
        if vocabulary[1] is not None and vocabulary[0].weight is not vocabulary[1].weight:
            for matrix in vocabulary:
                fully_shard(matrix.to(self.device), offload_policy=policy)
        fully_shard(model.to(self.device), offload_policy=policy)
        for module in _sharded_modules(model):  # the loss is a part of the whole step's mean: sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)

    def _sharded(self, tensor: torch.Tensor, like: Any) -> DTensor:
        """This process's shard of a whole tensor, shaped and placed as `like` is."""
        local = self._local(tensor, like).to(like.to_local().device, copy=True)
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _local(self, tensor: torch.Tensor, like: Any) -> torch.Tensor:
        """Its rows: FSDP2 shares out the first dimension, as torch.chunk does; the last ones may get none."""
        chunks = tensor.chunk(self.size)
        return chunks[self.rank] if self.rank < len(chunks) else tensor[:0]


def load_on_host(base: BaseSection) -> dict[str, Any]:
    """The arguments of `load_base` for a base that no device holds as a whole: it goes there in parts."""
    from loraplex_server.engine.model import _compute_dtype, _device

    dtype = str(_compute_dtype(base.dtype, _device(base.device))).removeprefix("torch.")
    return base.load_options | {"device": "cpu", "dtype": dtype}


def parts_in_step(team: Team, examples: Sequence["Example"], size: int) -> list[Part]:
    """As many parts in every process: each forward and backward is an exchange that all must take part in.

    Shares differ by at most one example, so one process may have one part too few: an example that does not count.
    """
    most = -(-len(examples[:: team.size]) // size)
    parts = Team.parts(team, examples, size)
    if len(parts) < most:
        shortest = min(examples, key=lambda example: len(example.ids))
        parts = [*(Part(part.examples) for part in parts), Part([shortest], counts=False, is_last=True)]
    return parts


def repeated_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that the model is stacked of: those that transformers says are not to be divided."""
    names: Any = getattr(model, "_no_split_modules", None) or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def _sharded_modules(model: torch.nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _local_bytes(parameter: torch.Tensor) -> int:
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).nbytes


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _whole(tensor: Any) -> torch.Tensor:
    """All shards together, in each process; from host memory by way of the device, which can exchange."""
    return tensor.detach().to(device_of_team()).full_tensor()


def _replace(model: torch.nn.Module, path: str, parameter: torch.nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    model.get_submodule(owner)._parameters[name] = parameter
