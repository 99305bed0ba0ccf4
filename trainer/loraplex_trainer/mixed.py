"""Several LoRA adapters in one batch: whose each token is, and what each layer adds to its own tokens alone.

peft takes rows of several adapters (`adapter_names`) only outside training; here its layers are asked part by part.
Knows layers and tokens, not losses or steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loraplex_trainer.errors import ConfigError


class Part(NamedTuple):
    """The tokens of one adapter, from `start` on up to `stop`, of all tokens of a batch, row by row."""

    adapter: str
    start: int
    stop: int


PartsOf = Callable[[Any, int], list[Part]]  # of a layer, and the tokens it is given


def active_parts(layer: Any, tokens: int) -> list[Part]:
    """As peft does: the active adapters on all tokens, or none where they are turned off."""
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    return [Part(name, 0, tokens) for name in names]


class Mixed:
    """Whose the tokens of the batch in hand are. In a forward outside of `batch` and `alone` every adapter rests."""

    def __init__(self) -> None:
        self._parts: Sequence[Part] = ()
        self._alone: str | None = None
        self.again = False  # whether a layer is computed a second time, for its gradients

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What torch's checkpoints compute a layer in: the first time, and again."""
        return nullcontext(), self._again()

    @contextmanager
    def _again(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False

    @contextmanager
    def batch(self, parts: Sequence[Part]) -> Iterator[None]:
        """For forward and backward (which may compute a layer again) of a batch of these parts, which cover it."""
        before, self._parts = self._parts, parts
        try:
            yield
        finally:
            self._parts = before

    @contextmanager
    def alone(self, adapter: str) -> Iterator[None]:
        """Batches of one adapter, whatever their size."""
        before, self._alone = self._alone, adapter
        try:
            yield
        finally:
            self._alone = before

    def parts_of(self, layer: Any, tokens: int) -> list[Part]:
        """Those whose adapter has something in `layer`. Raises ConfigError where it is not given the batch's tokens."""
        parts = [Part(self._alone, 0, tokens)] if self._alone is not None else self._parts
        if parts and parts[-1].stop != tokens:
            raise ConfigError(
                f"lora.target_modules: a layer of the base is given {tokens} of the batch's {parts[-1].stop} tokens: "
                "several adapters cannot be trained on it at once; leave it out, or train them one after another"
            )
        return [part for part in parts if part.adapter in layer.lora_A]


class OwnDropout(torch.nn.Module):
    """torch's dropout, drawn from a run's own generators: what one run draws does not depend on the others.

    torch puts its own generators back when it computes a layer again, and knows nothing of these.
    """

    def __init__(self, p: float, generators: Mapping[str, torch.Generator], mixed: Mixed) -> None:
        super().__init__()
        self.p, self._generators, self._mixed = p, generators, mixed
        self._first: torch.Tensor | None = None  # the state from which the first computation drew

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        generator = self._generators[x.device.type]
        now = generator.get_state()
        if self._mixed.again and self._first is not None:
            generator.set_state(self._first)
        self._first = generator.get_state()
        kept = torch.empty_like(x).bernoulli_(1 - self.p, generator=generator)
        if self._mixed.again:
            generator.set_state(now)
        return x * kept.div_(1 - self.p)


def mix(model: PeftModel, generators: Mapping[str, Mapping[str, torch.Generator]]) -> Mixed:
    """Lets the adapters `generators` names, all of LoRA, train in one batch. Before kernels are put in, if they are."""
    mixed = Mixed()
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name, dropout in list(layer.lora_dropout.items()):
            if p := getattr(dropout, "p", 0.0):
                layer.lora_dropout[name] = OwnDropout(p, generators[name], mixed)
        layer.forward = partial(_forward, layer, mixed.parts_of)
        for name in layer.lora_A:  # peft freezes all but the active one
            for matrix in (layer.lora_A[name], layer.lora_B[name]):
                matrix.requires_grad_(True)
    return mixed


def adapted_by(model: PeftModel, adapter: str) -> list[str]:
    """Paths, in the base, of the layers that an adapter has something in."""
    modules = model.get_base_model().named_modules()
    return [path for path, module in modules if isinstance(module, LoraLayer) and adapter in module.lora_A]


def add_parts(layer: Any, out: torch.Tensor, x: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """`out`, which the base's layer gives for `x`, plus what each part's adapter adds to its own tokens."""
    tokens = x.shape[:-1].numel()
    if all((part.start, part.stop) == (0, tokens) for part in parts):
        for part in parts:
            out = out + _added(layer, part.adapter, x).to(out.dtype)
        return out
    given, flat = x.reshape(tokens, -1), out.reshape(tokens, -1)
    pieces, done = [], 0
    for part in parts:
        added = _added(layer, part.adapter, given[part.start : part.stop])
        pieces += [flat[done : part.start], flat[part.start : part.stop] + added.to(out.dtype)]
        done = part.stop
    return torch.cat([*pieces, flat[done:]]).view(out.shape)


def _added(layer: Any, adapter: str, x: torch.Tensor) -> torch.Tensor:
    a, b = layer.lora_A[adapter], layer.lora_B[adapter]
    return b(a(layer.lora_dropout[adapter](x.to(a.weight.dtype)))) * layer.scaling[adapter]


def _forward(layer: Any, parts_of: PartsOf, x: torch.Tensor) -> torch.Tensor:
    return add_parts(layer, layer.base_layer(x), x, parts_of(layer, x.shape[:-1].numel()))
