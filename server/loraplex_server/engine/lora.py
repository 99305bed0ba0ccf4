"""Many adapters in one forward, over peft's own layers: which tokens belong to which adapter is said once per step.

A layer adds to each token what peft would have added for its adapter alone: by one call of a kernel for all adapters,
where there is one for the device; else adapter by adapter through peft's modules, and a step of one adapter goes
through peft untouched. Knows names, slots and tokens, not requests.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from peft.tuners.lora import Embedding, LoraLayer

from loraplex_server.engine.batch import Batch
from loraplex_server.engine.lora_table import LoraTable

TILE = 16  # tokens that the kernel for CPUs takes at once; see kernels/lora.c


class Segment(NamedTuple):
    """Neighbouring tokens of one adapter."""

    name: str | None  # peft's; None: the base alone
    slot: int  # -1: the base alone
    first: int
    last: int  # exclusive


class Along:
    """Who owns which tokens, along one axis of a step: for peft's modules, for one kernel, for the other."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        self.tokens = segments[-1].last
        runs = [
            (first, min(last, (first // TILE + 1) * TILE) - first, slot)
            for _, slot, start, last in segments
            if slot >= 0
            for first in (start, *range((start // TILE + 1) * TILE, last, TILE))
        ]
        self.runs = torch.tensor(runs, dtype=torch.int32)  # (runs, 3): first token, tokens, slot; none across two tiles
        self.adapted = bool(runs)  # whether any token is an adapter's
        self.call = (self.runs.data_ptr(), len(runs))  # as the kernels for CPUs take them
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


class Bound(Along):
    """Who owns which tokens is read from memory at each replay of a CUDA graph; None: the base owns all."""

    def __init__(self, slots: torch.Tensor | None) -> None:
        self.adapted, self._slots = slots is not None, slots


class LoraKernel(Protocol):
    """One call a layer for all adapters of a step."""

    dtype: torch.dtype  # what LoRA weights must be kept in

    def table(self, layer: Any, slots: int, max_rank: int) -> LoraTable | None:
        """An empty table for a layer; None if the kernel cannot serve its shape."""
        ...

    def apply(self, base_layer: Any, x: torch.Tensor, along: Along, table: LoraTable) -> torch.Tensor:
        """The base layer of ``x`` (…, tokens, inputs) and what every token's adapter adds: (…, tokens, outputs)."""
        ...


@dataclass
class _Layer:
    """What is known of one LoRA layer: its table, and the slots in it that no table can hold."""

    table: LoraTable | None
    others: set[int] = field(default_factory=set)


class Routing:
    """What every layer of one model looks at: the segments of the step, and who lies in which of ``slots`` slots."""

    def __init__(self, slots: int, max_rank: int = 0, kernel: LoraKernel | None = None) -> None:
        self.generation = 0  # see cuda_graphs.Routes
        self._slots, self._max_rank, self._kernel = slots, max_rank, kernel
        self._layers: dict[LoraLayer, _Layer] = {}
        self._elsewhere: Counter[int] = Counter()  # by slot: layers that hold the adapter outside their tables
        self._mixed = False
        self._bound: Bound | None = None  # while a graph is captured
        self._tokens = self._kept = Along([Segment(None, -1, 0, 1)])

    def step(self, tokens: Sequence[Segment], kept: Sequence[Segment]) -> None:
        """Announce a step: who owns its tokens, and who those whose logits are wanted, which the output head sees."""
        self._mixed = len({segment.slot for segment in tokens}) > 1
        self._tokens, self._kept = Along(tokens), Along(kept)

    def attach(self, layer: Any) -> None:
        """Make a LoRA layer look here."""
        self.generation += 1
        if isinstance(layer, Embedding):
            self._layers[layer] = _Layer(None)
            layer.forward = self._look_up(layer, layer.forward)
            return
        table = self._kernel.table(layer, self._slots, self._max_rank) if self._kernel else None
        self._layers[layer] = known = _Layer(table)
        layer.forward = self._forward(layer, layer.forward, known)

    def filled(self, layer: Any, slot: int, name: str) -> None:
        """A layer has got the weights of the adapter that peft calls ``name`` and the device keeps in ``slot``."""
        known = self._layers[layer]
        if not self._kernel or not known.table or not _is_plain(layer, name, known.table.dtype):
            known.others.add(slot)
            self._elsewhere[slot] += 1
            return
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        known.table.a[slot], known.table.b[slot] = a.data_ptr(), b.data_ptr()
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
        self._bound = Bound(slots)
        try:
            yield
        finally:
            self._bound = None

    def _along(self, length: int) -> Along:
        """Who owns an activation with ``length`` tokens."""
        return self._bound or (self._tokens if length == self._tokens.tokens else self._kept)

    def _forward(self, layer: Any, alone: Callable[..., torch.Tensor], known: _Layer) -> Callable[..., torch.Tensor]:
        """``alone`` is peft's forward of the layer."""
        others, base_layer = known.others, layer.base_layer
        apply = partial(self._kernel.apply, table=known.table) if self._kernel and known.table else None

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # (…, tokens, in) → (…, tokens, out)
            along = self._along(x.shape[-2])
            if self._bound or (apply and not others):
                return apply(base_layer, x, along) if apply and along.adapted else base_layer.forward(x)
            if not self._mixed:
                return alone(x, *args, **kwargs)
            result = base_layer(x, *args, **kwargs)
            add_by_peft(result, x, along, layer)
            return result

        return forward

    def _look_up(self, layer: Any, alone: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The same for an embedding, which is given ids, and always those of all tokens."""

        def forward(ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # (…, tokens) → (…, tokens, width)
            if not (self._mixed or self._bound):
                return alone(ids, *args, **kwargs)
            result = layer.base_layer(ids, *args, **kwargs)
            if not self._bound:
                embed_by_peft(result, ids, self._tokens, layer)
            return result

        return forward


def embed_by_peft(out: torch.Tensor, ids: torch.Tensor, along: Along, layer: Any) -> None:
    """What peft's own forward adds to the embeddings of ids, one segment after another."""
    scale = layer._get_embed_scale()  # gemma's embeddings are scaled as they are looked up
    for name, _, first, last in along.segments:
        if name in layer.lora_embedding_A and first < last:
            a, b = layer.lora_embedding_A[name].T, layer.lora_embedding_B[name].T
            part = layer._embed(ids[..., first:last], a) @ b * layer.scaling[name]
            if scale is not None:
                part = part * scale.to(part.dtype)
            out[..., first:last, :] = out[..., first:last, :] + part  # summed in the wider dtype, then rounded


def add_by_peft(out: torch.Tensor, x: torch.Tensor, along: Along, layer: Any) -> None:
    """The reference: through peft's modules, one segment after another."""
    for name, _, first, last in along.segments:
        if name in layer.lora_A and first < last:
            lora_a, lora_b = layer.lora_A[name], layer.lora_B[name]
            part = x[..., first:last, :].to(lora_a.weight.dtype)
            out[..., first:last, :] += (lora_b(lora_a(part)) * layer.scaling[name]).to(out.dtype)


def _is_plain(layer: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether the adapter is two matrices in this layer and nothing else, in the kernel's dtype."""
    variants = getattr(layer, "lora_variant", {})
    return (
        name in layer.lora_A  # an embedding's are elsewhere
        and name not in variants
        and layer.lora_B[name].bias is None
        and layer.lora_A[name].weight.dtype == layer.lora_B[name].weight.dtype == dtype
    )
