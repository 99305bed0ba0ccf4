"""The adapters inside the served PeftModel: put in layer by layer through peft, made active, taken out.

Owns the model's adapters; called by the engine's thread alone, between two forwards. Knows no tiers and no requests.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import copy
from dataclasses import dataclass, field
from itertools import count, groupby
from time import perf_counter
from typing import Any

import torch
from peft import LoraConfig, LoraModel, PeftModelForCausalLM
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.integrations import init_empty_weights
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.adapters.host import HostAdapter
from loraplex_server.engine.batch import Batch
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.lora import Routing, Segment

ALL_LINEAR = "all-linear"
_NOT_OF_THE_SHAPE = {"base_model_name_or_path", "revision", "init_lora_weights", "inference_mode", "lora_dropout"}


@dataclass
class _Held:
    """An adapter in the model, or on its way into it: peft's name for it, its slot, and the layers that hold it."""

    key: str
    name: str
    slot: int
    shape: str  # equal for adapters that peft makes the same modules for
    layers: dict[str, LoraLayer] = field(default_factory=dict)  # by path


class DeviceAdapters:
    """At most ``slots`` adapters of one model, by key. ``model`` is what a forward calls: the base, whose layers peft
    replaces in place.

    Not peft's own wrapper: its forward reads the configuration of the adapter it holds for the active one, which may
    be gone while the base answers. ``dtype`` is what LoRA weights are kept in; peft raises 16 bits to 32 as well.
    """

    def __init__(
        self, base: PreTrainedModel, slots: int, dtype: torch.dtype = torch.float32, routing: Routing | None = None
    ) -> None:
        self.model = base
        self._dtype = dtype
        self._paths = tuple(path for path, _ in base.named_modules() if path)  # before any layer is wrapped
        self._linear = _linear_layers(base)
        self._peft = _wrapper(base)
        self._layers: dict[str, LoraLayer] = {}  # all that peft has wrapped so far, by path
        self._states: list[dict[str, object]] = []  # the attributes of each of them
        self._held: dict[str, _Held] = {}  # those that can be used, by key
        self._coming: tuple[_Held, Iterator[None]] | None = None  # being installed, and the rest of the work
        self._left: list[_Held] = []  # modules without weights, of adapters that left: to be filled again
        self._most_left = slots
        self._slots = list(range(slots))[::-1]  # the free ones
        self._numbers = count()
        self._active: list[str] = []  # peft's names, as every layer has them: one at most
        self._routing = routing or Routing(slots)

    def begin(self, adapter: HostAdapter) -> None:
        """Start to put an adapter on the device; ``advance`` does the work. One at a time, and a slot must be free."""
        assert self._coming is None and self._slots and adapter.key not in self._held
        shape, slot = _shape(adapter.config), self._slots.pop()
        if left := next((one for one in self._left if one.shape == shape), None):
            self._left.remove(left)
            held = _Held(adapter.key, left.name, slot, shape, left.layers)
            self._coming = held, self._refill(held, adapter)
        else:
            held = _Held(adapter.key, f"adapter_{next(self._numbers)}", slot, shape)
            self._coming = held, self._install(held, adapter)

    def advance(self, seconds: float) -> bool:
        """Work on what was begun for about so long, at least one module; says whether it can be used now.

        A forward in between sees nothing of it.

        Raises:
            AdapterRefused: peft did not take every tensor to its place; nothing of the adapter stays.
        """
        assert self._coming
        held, work = self._coming
        until = perf_counter() + seconds
        try:
            for _ in work:
                if perf_counter() >= until:
                    return False
        except Exception as error:  # whatever it was, nothing of the adapter may stay in the base
            self._coming = None
            self._take_out(held)
            raise AdapterRefused(f"peft cannot use it on this base: {error}") from error
        self._coming = None
        self._held[held.key] = held
        return True

    def remove(self, key: str) -> None:
        """Take an adapter off the device, whole or on its way; its memory is free when this returns."""
        if self._coming and self._coming[0].key == key:
            held, self._coming = self._coming[0], None
            self._take_out(held)
        else:
            self._empty(self._held.pop(key))

    def route(self, batch: Batch) -> None:
        """Make the next forward give each row its adapter: by activation for a step of one, else row by row."""
        if len(batch.adapters) == 1:
            self.activate(*batch.adapters)
        self._routing.step(self._segments(batch, sampled=False), self._segments(batch, sampled=True))

    def activate(self, key: str | None) -> None:
        """Make one adapter, or none, the active one: the swap. It leaves what peft's set_adapter leaves.

        That one also walks every adapter of every layer to say that none is trained, which none ever is here.
        """
        active = [] if key is None else [self._held[key].name]
        if active == self._active:
            return
        self._active = active
        for state in self._states:
            state["_active_adapter"] = active
        tuner = _tuner(self._peft)
        tuner.active_adapter = self._peft.active_adapter = active[0] if active else []

    def layers_of(self, key: str) -> Iterable[tuple[str, LoraLayer]]:
        """Path and layer of every module that an adapter changes."""
        return self._held[key].layers.items()

    def _segments(self, batch: Batch, sampled: bool) -> list[Segment]:
        """Who owns which tokens of the step, or which of those whose logits are kept; None for the base's."""
        segments, first = [], 0
        for key, rows in groupby(batch.rows, key=lambda row: row.request.adapter):
            tokens = sum(row.kept if sampled else row.tokens for row in rows)
            name, slot = (None, -1) if key is None else (self._held[key].name, self._held[key].slot)
            segments.append(Segment(name, slot, first, first + tokens))
            first += tokens
        return segments

    def _install(self, held: _Held, adapter: HostAdapter) -> Iterator[None]:
        """What peft's add_adapter and set_peft_model_state_dict do, in pieces: each module that was looked at is one.

        Both walk all modules and all adapters several times, a stall of 0.2 seconds on 22 layers.
        """
        config, tuner = adapter.config, _tuner(self._peft)
        tuner.peft_config[held.name] = config
        tuner._check_new_adapter_config(config)
        if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
            config.target_modules = list(self._linear)
        tensors = dict(adapter.tensors)  # those that have not found their place yet
        empty = copy(config)
        empty.init_lora_weights = False  # the weights come from the file
        for path in self._paths:
            if tuner._check_target_module_exists(config, path):
                self._adapt(path, empty, held)
                _rest(held.layers[path], held.name)
                self._fill(path, held, tensors)
            yield
        _none_left(tensors)
        tuner.targeted_module_names = list(dict.fromkeys([*tuner.targeted_module_names, *held.layers]))

    def _refill(self, held: _Held, adapter: HostAdapter) -> Iterator[None]:
        """Give modules that peft has made for an adapter of the same shape the weights of this one."""
        _tuner(self._peft).peft_config[held.name] = adapter.config
        tensors = dict(adapter.tensors)
        for path in held.layers:
            self._fill(path, held, tensors)
            yield
        _none_left(tensors)

    def _empty(self, held: _Held) -> None:
        """Free an adapter's weights; its modules wait for another of its shape."""
        if held.name in self._active:
            self.activate(None)
        for layer in held.layers.values():
            self._routing.cleared(layer, held.slot)
            for _, container in _containers(layer, held.name):
                _each_parameter(container, held.name, _without_memory)
        _tuner(self._peft).peft_config.pop(held.name)
        self._slots.append(held.slot)
        self._left.append(held)
        if len(self._left) > self._most_left:
            self._delete(self._left.pop(0))

    def _adapt(self, path: str, config: LoraConfig, held: _Held) -> None:
        """Let peft make a module's LoRA for one adapter, without memory yet; the module is wrapped if it was not."""
        parent_path, _, leaf = path.rpartition(".")
        parent, tuner = self.model.get_submodule(parent_path), _tuner(self._peft)
        target = getattr(parent, leaf)
        if known := self._layers.get(path):
            held.layers[path] = known  # first, so that what peft leaves behind when it gives up is taken out
            # peft would walk the layer's other adapters to say that none is trained.
            vars(known)["set_adapter"] = _nothing
        try:
            tuner._check_target_module_compatiblity(config, self.model, leaf)
            with init_empty_weights():
                tuner._create_and_replace(config, held.name, target, leaf, parent, current_key=path)
        finally:
            if known:
                del vars(known)["set_adapter"]
        if known is None:
            layer = held.layers[path] = self._layers[path] = getattr(parent, leaf)
            layer.eval()
            self._states.append(vars(layer))
            self._states[-1]["_active_adapter"] = self._active  # not the newcomer, as peft has it
            self._routing.attach(layer)

    def _fill(self, path: str, held: _Held, tensors: dict[str, torch.Tensor]) -> None:
        """Give a layer the adapter's tensors, which leave ``tensors``."""
        layer = held.layers[path]
        for attribute, container in _containers(layer, held.name):
            key = f"base_model.model.{path}.{attribute}"
            _each_parameter(container, held.name, lambda leaf, made, key=key: self._take(key + leaf, made, tensors))
        self._routing.filled(layer, held.slot, held.name)

    def _take(self, key: str, made: nn.Parameter, tensors: dict[str, torch.Tensor]) -> nn.Parameter:
        tensor = tensors.pop(key, None)
        if tensor is None:
            raise AdapterRefused(f"the file has no tensor {key!r}, which peft has a place for")
        if tensor.shape != made.shape:
            raise AdapterRefused(f"tensor {key!r} has shape {tuple(tensor.shape)}, expected {tuple(made.shape)}")
        held = tensor.to(self.model.device, non_blocking=True).to(self._dtype)  # cast there, not on the engine's thread
        return nn.Parameter(held, requires_grad=False)

    def _take_out(self, held: _Held) -> None:
        """What peft's delete_adapter does, over the layers that hold the adapter. Layers stay wrapped, as in peft."""
        if held.name in self._active:
            self.activate(None)  # peft would make another adapter active in place of a deleted one
        for layer in held.layers.values():
            self._routing.cleared(layer, held.slot)
        self._delete(held)
        _tuner(self._peft).peft_config.pop(held.name, None)
        self._slots.append(held.slot)

    @staticmethod
    def _delete(held: _Held) -> None:
        for layer in held.layers.values():
            layer.delete_adapter(held.name)


def _shape(config: LoraConfig) -> str:
    """What decides which modules peft makes: the configuration, less where it comes from and how it began."""
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    return repr(sorted((k, repr(v)) for k, v in said.items() if k not in _NOT_OF_THE_SHAPE))


def _containers(layer: LoraLayer, name: str) -> Iterator[tuple[str, Any]]:
    """Where a layer keeps what it has under an adapter's name: the attribute and its dictionary."""
    for attribute in layer.adapter_layer_names:
        if name in (container := getattr(layer, attribute)):
            yield attribute, container


def _each_parameter(container: Any, name: str, new: Callable[[str, nn.Parameter], nn.Parameter]) -> None:
    """Replace every parameter under a name; ``new`` is handed its path below the name, and what is there."""
    made = container[name]
    if isinstance(made, nn.Parameter):
        container[name] = new("", made)
        return
    parameters = made._parameters  # a module's own way there takes as long again as all the rest
    for leaf, parameter in parameters.items():
        if parameter is not None:
            parameters[leaf] = new(f".{leaf}", parameter)


def _rest(layer: LoraLayer, name: str) -> None:
    """Put what peft has made for an adapter into eval mode."""
    layer.lora_dropout[name].eval()
    for _, container in _containers(layer, name):
        if isinstance(made := container[name], nn.Module):
            made.eval()


def _without_memory(_: str, parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _none_left(tensors: dict[str, torch.Tensor]) -> None:
    if tensors:
        first = min(tensors)
        why = "; a layer's experts are one tensor here, which LoRA does not reach" if ".experts." in first else ""
        raise AdapterRefused(f"{len(tensors)} tensors have no counterpart, the first is {first!r}{why}")


def _wrapper(base: PreTrainedModel) -> PeftModelForCausalLM:
    """peft's wrapper around a base, with no adapter in it and no layer replaced."""
    nobody = "nobody"
    wrapped = PeftModelForCausalLM(base, LoraConfig(target_modules=DUMMY_TARGET_MODULES, inference_mode=True), nobody)
    wrapped.delete_adapter(nobody)
    wrapped.active_adapter = _tuner(wrapped).active_adapter = []
    return wrapped


def _linear_layers(base: PreTrainedModel) -> frozenset[str]:
    """The modules that peft means by "all-linear"."""
    config = LoraConfig(target_modules=ALL_LINEAR)
    _maybe_include_all_linear_layers(config, base)  # in place
    return frozenset(config.target_modules or ())


def _tuner(model: PeftModelForCausalLM) -> LoraModel:
    tuner = model.base_model
    assert isinstance(tuner, LoraModel)  # only LoRA adapters get here
    return tuner


def _nothing(*_: object, **__: object) -> None:
    """Takes the place of a method that has nothing to do."""
