"""Many adapters in one forward, over peft's own layers: which tokens belong to which adapter is said once per step.

A layer adds to each token what peft would have added for its adapter alone: by one call of a kernel for all adapters,
where there is a kernel for the layer; else adapter by adapter through peft's modules, and a step of one adapter goes
through peft untouched. Knows names, slots and tokens, not requests.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loraplex_server.engine.batch import Batch
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.engine.triton_lora import add_lora
from loraplex_server.kernels.native import addresses, native

RUN_TOKENS = 4  # the most that the kernel takes at once; see kernels/lora.c


class Segment(NamedTuple):
    """Neighbouring tokens of one adapter."""

    name: str | None  # peft's; None: the base alone
    slot: int  # -1: the base alone
    first: int
    last: int  # exclusive


class Along:
    """Who owns which tokens, along one axis of a step."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.tokens = segments[-1].last
        runs = [
            (first, min(RUN_TOKENS, last - first), slot)
            for _, slot, start, last in segments
            if slot >= 0
            for first in range(start, last, RUN_TOKENS)
        ]
        self.runs = torch.tensor(runs, dtype=torch.int32)  # (runs, 3): first token, tokens, slot
        self._slots: torch.Tensor | None = None

    @property
    def by_token(self) -> list[int]:
        """The slot of each token."""
        return [segment.slot for segment in self.segments for _ in range(segment.first, segment.last)]

    def slots(self, device: torch.device) -> torch.Tensor:
        """The same on the device, (tokens,) int32; made by the first layer that asks."""
        if self._slots is None:
            self._slots = torch.tensor(self.by_token, dtype=torch.int32).to(device, non_blocking=True)
        return self._slots


@dataclass
class _Bound:
    """Where a CUDA graph that is being captured reads its tokens' slots; None: the base alone."""

    slots: torch.Tensor | None


@dataclass
class _Layer:
    """What is known of one LoRA layer: its table, and the adapters in it that no table can hold."""

    table: LoraTable | None
    others: set[int]


class Routing:
    """What every layer of one model looks at: the segments of the step, and who lies in which of ``slots`` slots."""

    def __init__(
        self, slots: int, max_rank: int = 0, kernels: bool = False, triton_dtype: torch.dtype | None = None
    ) -> None:
        self._slots, self._max_rank, self._kernels = slots, max_rank, kernels
        self._triton_dtype = triton_dtype  # of LoRA weights that go by the Triton kernels; None: they are not used
        self.generation = 0  # see cuda_graphs.Routes
        self._bound: _Bound | None = None
        self._elsewhere: Counter[int] = Counter()  # by slot: layers that hold the adapter outside their tables
        self._layers: dict[LoraLayer, _Layer] = {}
        self._mixed = False
        self._tokens = self._kept = Along([Segment(None, -1, 0, 1)])

    def step(self, tokens: Sequence[Segment], kept: Sequence[Segment]) -> None:
        """Announce a step: who owns its tokens, and who those whose logits are wanted, which the output head sees."""
        self._mixed = len({segment.slot for segment in tokens}) > 1
        self._tokens, self._kept = Along(tokens), Along(kept)

    def attach(self, layer: Any) -> None:
        """Make a LoRA layer look here."""
        self._layers[layer] = known = _Layer(self._table(layer), set())
        self.generation += 1
        layer.forward = self._forward(layer, layer.forward, known)

    def filled(self, layer: Any, slot: int, name: str) -> None:
        """A layer has got the weights of the adapter that peft calls ``name`` and the device keeps in ``slot``."""
        known = self._layers[layer]
        if known.table is None or not _is_plain(layer, name, known.table.dtype):
            known.others.add(slot)
            self._elsewhere[slot] += 1
            return
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        across = b
        if self._triton_dtype is None:
            across = b.data.t().contiguous()  # as the kernel reads it; peft's module sees the same memory the other way
            layer.lora_B[name].weight = nn.Parameter(across.t(), requires_grad=False)
        known.table.a[slot], known.table.b[slot] = addresses(a, across)
        known.table.rank[slot], known.table.scaling[slot] = a.shape[0], layer.scaling[name]

    def cleared(self, layer: LoraLayer, slot: int) -> None:
        """A layer has lost the weights of the adapter in ``slot``."""
        known = self._layers[layer]
        if slot in known.others:
            known.others.remove(slot)
            self._elsewhere[slot] -= 1
        if known.table:
            known.table.rank[slot] = 0

    def slots_of(self, batch: Batch) -> list[int] | None:
        """See cuda_graphs.Routes."""
        slots = self._tokens.by_token
        return None if any(self._elsewhere[slot] for slot in set(slots)) else slots

    @contextmanager
    def bound(self, slots: torch.Tensor | None) -> Iterator[None]:
        """See cuda_graphs.Routes."""
        self._bound = _Bound(slots)
        try:
            yield
        finally:
            self._bound = None

    def _along(self, length: int) -> Along:
        """Who owns an activation with ``length`` tokens."""
        return self._tokens if length == self._tokens.tokens else self._kept

    def _table(self, layer: Any) -> LoraTable | None:
        """An empty table, if the kernel can serve the layer."""
        if self._triton_dtype is not None:
            device = layer.get_base_layer().weight.device
            a, b = torch.zeros(2, self._slots, dtype=torch.int64, device=device)
            rank = torch.zeros(self._slots, dtype=torch.int32, device=device)
            return LoraTable(a, b, rank, torch.zeros(self._slots, device=device), self._triton_dtype, self._max_rank)
        if not self._kernels or layer.in_features % 32 or layer.out_features % 64:
            return None
        a, b = torch.zeros(2, self._slots, dtype=torch.int64)
        rank, scaling = torch.zeros(self._slots, dtype=torch.int32), torch.zeros(self._slots)
        return LoraTable(a, b, rank, scaling, torch.bfloat16, self._max_rank)

    def _forward(self, layer: Any, alone: Callable[..., torch.Tensor], known: _Layer) -> Callable[..., torch.Tensor]:
        """``alone`` is peft's forward of the layer."""

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # (…, tokens, in) → (…, tokens, out)
            if self._bound:
                result = layer.base_layer(x, *args, **kwargs)
                if self._bound.slots is not None and known.table:
                    add_by_slots(result, x, self._bound.slots, known.table)
                return result
            if known.table and not known.others and self._triton_dtype is not None:
                result = layer.base_layer(x, *args, **kwargs)
                along = self._along(x.shape[-2])
                if len(along.runs):
                    add_by_slots(result, x, along.slots(x.device), known.table)
                return result
            if known.table and not known.others and x.dtype == torch.bfloat16:
                result = layer.base_layer(x, *args, **kwargs)
                add_by_kernel(result, x, self._along(x.shape[-2]), known.table)
                return result
            if not self._mixed:
                return alone(x, *args, **kwargs)
            result = layer.base_layer(x, *args, **kwargs)
            add_by_peft(result, x, self._along(x.shape[-2]), layer)
            return result

        return forward


def add_by_kernel(out: torch.Tensor, x: torch.Tensor, along: Along, table: LoraTable) -> None:
    """Add every adapter's product to ``out`` (…, tokens, outputs), given ``x`` (…, tokens, inputs); both bfloat16."""
    if not len(along.runs):
        return
    given = x.contiguous()
    inputs, outputs = x.shape[-1], out.shape[-1]
    native().library.lora_add(  # pyright: ignore[reportOptionalMemberAccess]
        *addresses(out, given, along.runs),
        len(along.runs),
        *addresses(table.a, table.b, table.rank, table.scaling),
        *(along.tokens, inputs, outputs, table.max_rank),
    )


def add_by_slots(out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor, table: LoraTable) -> None:
    """The same by the Triton kernels, given the slot of each token."""
    add_lora(out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1]), slots, table)


def add_by_peft(out: torch.Tensor, x: torch.Tensor, along: Along, layer: Any) -> None:
    """The same through peft's modules, one segment after another: the reference, and the way of all other layers."""
    for name, _, first, last in along.segments:
        if name in layer.lora_A and first < last:
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            part = x[..., first:last, :].to(lora_a.weight.dtype)
            out[..., first:last, :] += (lora_b(lora_a(part)) * layer.scaling[name]).to(out.dtype)


def _is_plain(layer: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the adapter is two matrices in this layer and nothing else, in the kernel's dtype."""
    variants = getattr(layer, "lora_variant", {})
    return (
        name in layer.lora_A
        and name not in variants
        and layer.lora_B[name].bias is None
        and layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype == dtype
    )
