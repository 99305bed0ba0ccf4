"""ZeRO by DeepSpeed's own engine: optimizer state (stage 1), gradients (2) and weights (3) shared out among processes.

The engine owns backward, clipping and the step; what a step is made of, and its loss, stay the loop's. Knows DeepSpeed,
which is an extra, and is imported by the first run that wants it.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

import torch
from bitsandbytes.nn.modules import Params4bit
from torch.nn.functional import pad

from loraplex_trainer.deepspeed_json import engine_settings
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.sections import BaseSection
from loraplex_trainer.sharding import load_on_host, parts_in_step
from loraplex_trainer.team import Part, Team, device_of_team

if TYPE_CHECKING:
    from loraplex_trainer.encoding import Example
    from loraplex_trainer.loop import Loop


@dataclass(frozen=True)
class ZeroTeam(Team):
    """`stage` 1, 2 or 3. What is shared out is the adapter's; with stage 3 the base's weights too."""

    stage: int = 1
    given: Mapping[str, Any] = field(default_factory=dict)  # the run's DeepSpeed JSON

    @property
    def shares_base(self) -> bool:
        return self.stage == 3

    @property
    def device(self) -> torch.device:
        return device_of_team()

    def load_options(self, base: BaseSection) -> dict[str, Any]:
        return load_on_host(base) if self.shares_base else super().load_options(base)

    def parts(self, examples: Sequence["Example"], size: int) -> list[Part]:
        return parts_in_step(self, examples, size)

    def begin(self, loop: "Loop") -> str:
        """Puts the engine around model and optimizer, with the optimizer's state of a run that is resumed."""
        self.share_weights(loop.parameters)
        whole = sum(parameter.nbytes for parameter in loop.model.parameters())
        states = {name: loop.optimizer.state.pop(p, {}) for name, p in loop.parameters.items()}
        name, example = next(iter(states.items()))
        shared = {key for key, value in example.items() if _is_like(value, loop.parameters[name])}
        model: Any = loop.model
        if model.dtype == torch.float16:
            raise ConfigError(f"base.dtype: float16: expected bfloat16 or float32 with strategy 'zero{self.stage}'")
        settings = engine_settings(self.given, loop.config.training, model.config.get_text_config().hidden_size)
        deepspeed = _deepspeed(self.device)
        if self.stage == 3:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            _move_what_is_whole(model, self.device)
        loop.forward, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(loop.parameters.values()),
            optimizer=loop.optimizer,
            config=settings,
            dist_init_required=False,
        )
        loop.forward.config = model.config  # of the model, for the loss; the engine's own is elsewhere too
        if example:
            self._restore(loop, states, shared)
        held = sum(_held_bytes(parameter) for parameter in model.parameters())
        return f"zero{self.stage}: each process holds about {held:,} of the {whole:,} bytes of base and adapter"

    def backward(self, loop: "Loop", loss: torch.Tensor, part: Part) -> None:
        """The engine takes the mean over the processes, where the losses are parts of a sum."""
        engine: Any = loop.forward
        engine.set_gradient_accumulation_boundary(part.is_last)
        engine.backward(loss * self.size, scale_wrt_gas=False)

    def add_up(self, parameters: Mapping[str, torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """The loss alone: the engine adds the gradients up."""
        torch.distributed.all_reduce(loss)
        return loss

    def take_step(self, loop: "Loop", limit: float) -> torch.Tensor:
        """The engine clips, by the same limit, which its settings have."""
        engine: Any = loop.forward
        engine.step()
        return torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    @contextmanager
    def whole(self, loop: "Loop") -> Iterator[None]:
        """The optimizer's state is put beside the shards', under the parameters that it is of."""
        get, state = import_module("deepspeed.utils").safe_get_full_optimizer_state, loop.optimizer.state
        shard = self._shards(loop)[0]
        of_shard = dict(state.get(shard, {}))
        for parameter in loop.parameters.values():
            if of_shard:
                state[parameter] = {
                    key: get(parameter, key) if _is_like(value, shard) else value for key, value in of_shard.items()
                }
        try:
            with self._gathered(loop):
                yield
        finally:
            for parameter in loop.parameters.values():
                state.pop(parameter, None)

    @torch.no_grad()
    def put(self, loop: "Loop", weights: Mapping[str, torch.Tensor]) -> None:
        with self._gathered(loop, modifier_rank=0):
            super().put(loop, weights)

    @contextmanager
    def _gathered(self, loop: "Loop", modifier_rank: int | None = None) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        gather = import_module("deepspeed").zero.GatheredParameters
        with gather(list(loop.parameters.values()), modifier_rank=modifier_rank):
            yield

    def _shards(self, loop: "Loop") -> list[torch.Tensor]:
        """What the optimizer of this process steps: flat pieces of several parameters each."""
        zero: Any = loop.forward.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    @torch.no_grad()
    def _restore(self, loop: "Loop", states: Mapping[str, Mapping[str, Any]], shared: set[str]) -> None:
        """Whole states into the shards, which have none before the first step."""
        utils, engine = import_module("deepspeed.utils"), cast(Any, loop.forward)
        example = next(iter(states.values()))
        for shard in self._shards(loop):
            loop.optimizer.state[shard] = {
                key: torch.zeros_like(shard) if key in shared else _copy(value) for key, value in example.items()
            }
        if self.stage < 3:
            engine.optimizer._lazy_init_hp_params_optimizer_state()  # links the shards' states to the parameters
        for name, parameter in loop.parameters.items():
            for key in shared:
                value = states[name][key]
                if self.stage < 3:
                    utils.safe_set_full_optimizer_state(parameter, value, key)
                else:  # DeepSpeed's own way of cutting fails where the last piece is padded
                    pieces: Any = parameter
                    size = pieces.ds_tensor.numel()
                    flat = pad(value.flatten(), (0, size * self.size - value.numel()))
                    utils.safe_set_local_optimizer_state(parameter, flat.narrow(0, size * self.rank, size), key)


def _deepspeed(device: torch.device) -> Any:
    """The package; without a word of what torch calls deprecated in it."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # also where there is a GPU
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    return import_module("deepspeed")


def _move_what_is_whole(model: torch.nn.Module, device: torch.device) -> None:
    """Buffers, and the scales of 4-bit weights: small, and not parameters."""
    for buffers in (module._buffers for module in model.modules()):
        buffers.update({name: buffer.to(device) for name, buffer in buffers.items() if buffer is not None})
    for parameter in model.parameters():
        if isinstance(parameter, Params4bit) and parameter.quant_state is not None:
            parameter.quant_state.to(device)


def _held_bytes(parameter: Any) -> int:
    """What stays here of a parameter: DeepSpeed lets small ones be whole, beside their piece."""
    piece = getattr(parameter, "ds_tensor", None)
    if piece is None:
        return parameter.nbytes
    return piece.nbytes + (parameter.ds_numel * parameter.element_size() if parameter.ds_persist else parameter.nbytes)


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    """Whether a value of the optimizer's state is shared out as the parameter is; others are numbers for all of it."""
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
