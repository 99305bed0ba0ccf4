"""Many adapters in one forward, over peft's own layers: which tokens belong to which adapter is said once per step.

A layer whose step is mixed adds to each run of tokens what peft would have added for that adapter alone; a step of one
adapter goes through peft untouched. Knows names and tokens, not requests.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

# Adapter (peft's name; None for the base alone), first token, token after the last.
Segment = tuple[str | None, int, int]


@dataclass
class Routing:
    """What every layer of one model looks at: the segments of a mixed step."""

    mixed: bool = False
    _tokens: list[Segment] = field(default_factory=list)  # along the step's tokens
    _sampled: list[Segment] = field(default_factory=list)  # along those sampled from: what the output head sees

    def mix(self, tokens: list[Segment], sampled: list[Segment]) -> None:
        """Announce a step of several adapters."""
        self.mixed, self._tokens, self._sampled = True, tokens, sampled

    def attach(self, model: torch.nn.Module) -> None:
        """Make every LoRA layer look here; layers that do already are left alone."""
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and "forward" not in vars(layer):
                layer.forward = _routed_forward(layer, layer.forward, self)

    def filled(self, layer: LoraLayer, slot: int, name: str) -> None:
        """A layer has got the weights of the adapter that peft calls ``name`` and the device keeps in ``slot``."""

    def cleared(self, layer: LoraLayer, slot: int) -> None:
        """A layer has lost the weights of the adapter in ``slot``."""

    def along(self, length: int) -> list[Segment]:
        """The segments of an activation with ``length`` tokens."""
        return self._tokens if length == self._tokens[-1][2] else self._sampled


def _routed_forward(layer: Any, alone: Callable[..., torch.Tensor], routing: Routing) -> Callable[..., torch.Tensor]:
    """``alone``, peft's forward of this layer, unless the step is mixed."""

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # (1, tokens, in) → (1, tokens, out)
        if not routing.mixed:
            return alone(x, *args, **kwargs)
        result = layer.base_layer(x, *args, **kwargs)
        for name, first, last in routing.along(x.shape[1]):
            if name and first < last and name in layer.lora_A:
                lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
                part = x[:, first:last].to(lora_a.weight.dtype)
                result[:, first:last] += (lora_b(lora_a(part)) * layer.scaling[name]).to(result.dtype)
        return result

    return forward
