"""Runs a batch through the model and returns the logits that are looked at. Knows no adapters and no scheduling.

PagedRunner puts the rows of a step side by side in one forward. PlainRunner is the slow reference, one row after
another through transformers' own cache: it serves every model whose cache it has seen to work, and the other is tested
against it.
"""

from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.engine.attention import NAME, KVTensors, PagedStep, RowSlots
from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.bloom import page_bloom
from loraplex_server.engine.cuda_graphs import GraphRunner, Routes, can_graph
from loraplex_server.engine.errors import BaseUnusable
from loraplex_server.engine.families import pattern_of, rope_turns_at
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request


class Runner(Protocol):
    """What the engine asks of a way to run the model."""

    mixed: bool  # whether one forward may hold rows of many adapters
    paged: bool  # whether keys and values lie in KVPages, where requests can share them

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the last ``kept`` tokens of each row, row after row: (kept tokens, vocabulary)."""
        ...

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that ended or was preempted."""
        ...


def make_runner(
    model: PreTrainedModel,
    pages: KVPages,
    paged: bool | None = None,
    graph_rows: int = 0,
    max_tokens: int = 0,
    routes: Routes | None = None,
    kernels: bool = False,
) -> Runner:
    """The fastest runner that is right for this model; ``paged`` False asks for the slow reference.

    Decode steps of up to ``graph_rows`` rows, of up to ``max_tokens`` tokens each, go by CUDA graphs where they can;
    those with adapters too, if ``routes`` can tell their slots. ``kernels``: use ours for CPUs.

    Raises:
        BaseUnusable: the model does not go on from its own cache.
    """
    if paged is False or not can_page(model):
        return PlainRunner(model)
    runner = PagedRunner(model, pages, kernels)
    return GraphRunner(runner, pages, graph_rows, max_tokens, routes) if graph_rows and can_graph(model) else runner


def can_page(model: PreTrainedModel) -> bool:
    """Whether the model's attention is known to be what paged attention computes."""
    return pattern_of(model.config) is not None


class PagedRunner:
    """All rows of a step in one forward, over paged keys and values."""

    mixed = True
    paged = True

    def __init__(self, model: PreTrainedModel, pages: KVPages, kernels: bool = False) -> None:
        pattern = pattern_of(model.config)
        assert pattern is not None  # see can_page
        self._pattern = pattern
        self._pages = pages
        self._kernels = kernels
        self._device = model.device
        self._within = torch.arange(pages.page_tokens, device=self._device)
        self._step: PagedStep | None = None
        slots = pages.pages * pages.page_tokens
        self.kv = KVTensors(model.config, slots + 1, model.dtype, model.device)  # the last: where padding is written
        if model.config.model_type == "bloom":
            page_bloom(model, self._current_step)
        else:
            model.set_attn_implementation(NAME)
        assert model.config._attn_implementation == NAME

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """See Runner."""
        ids: list[int] = []
        positions: list[int] = []
        written: list[torch.Tensor] = []
        rows: list[RowSlots] = []
        kept: list[int] = []
        for row in batch.rows:
            context = self._slots(row)
            rows.append(RowSlots(len(ids), len(ids) + row.tokens, context))
            ids += row.request.token_ids[row.start : row.stop]
            positions += range(row.start, row.stop)
            written.append(context[row.start :])
            kept += range(len(ids) - row.kept, len(ids))
        self._step = PagedStep(self.kv, torch.cat(written), rows, self._pattern, self._kernels)
        return model(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(kept),
            paged=self._step,
        ).logits[0]

    def forget(self, request: Request) -> None:
        """See Runner; the pages are freed by their owner."""

    def _slots(self, row: Row) -> torch.Tensor:
        """Where the tokens of a sequence lie, those of this step included: (tokens,)."""
        size = self._pages.page_tokens
        pages = self._tensor(self._pages.table(row.request)[: -(-row.stop // size)])
        return (pages[:, None] * size + self._within).flatten()[: row.stop]

    def _current_step(self) -> PagedStep:
        assert self._step is not None
        return self._step

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class PlainRunner:
    """One row after another, each with transformers' own cache."""

    mixed = False
    paged = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._caches: dict[str, tuple[Cache, int]] = {}  # with the tokens that are in it
        self._turn = rope_turns_at(model.config)
        _check_cache(model)

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """See Runner."""
        logits = []
        for row in batch.rows:
            cache, start = self._cache_for(row)
            ids = row.request.token_ids[start : row.stop]
            out, cache = _extend(model, ids, cache)
            self._caches[row.request.id] = cache, row.stop
            logits.append(out[len(out) - row.kept :])
        return torch.cat(logits)

    def forget(self, request: Request) -> None:
        """See Runner."""
        self._caches.pop(request.id, None)

    def _cache_for(self, row: Row) -> tuple[Cache | None, int]:
        """The cache to go on from and how many tokens it holds; none for a row that starts, or starts again."""
        if row.start == 0 or (self._turn is not None and row.start <= self._turn < row.stop):
            return None, 0
        cache, held = self._caches[row.request.id]
        assert held == row.start
        return cache, held


def _extend(model: Any, ids: list[int], cache: Cache | None) -> tuple[torch.Tensor, Cache]:
    """Logits of some more tokens of a sequence, (tokens, vocabulary), and the cache with them."""
    pieces = [ids]
    if cache is not None and not all(map(_is_attention, cache.layers)):
        pieces = [[token_id] for token_id in ids]  # a recurrent state is only sure to go on by one, as in generate
    logits = []
    for piece in pieces:
        out = model(input_ids=torch.tensor([piece], device=model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        if cache is None:
            raise BaseUnusable("the model keeps no keys and values")
        logits.append(out.logits[0])
    assert cache is not None  # ids are never empty
    return torch.cat(logits), cache


def _is_attention(layer: object) -> bool:
    """Whether a layer keeps keys and values, and nothing else."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


@torch.no_grad()
def _check_cache(model: PreTrainedModel) -> None:
    """Whether a sequence given in parts is as good as given whole: not every family's cache takes it in parts.

    Raises:
        BaseUnusable: it is not, or there is no cache.
    """
    name, vocabulary = model.config.model_type, model.config.vocab_size
    ids = [vocabulary * i // 9 for i in range(1, 9)]
    try:
        whole, _ = _extend(model, ids, None)
        first, cache = _extend(model, ids[:4], None)
        parts = torch.cat((first, _extend(model, ids[4:6], cache)[0], _extend(model, ids[6:], cache)[0]))
        forgetful, _ = _extend(model, ids[4:], None)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BaseUnusable(f"models of type {name!r} cannot be served: {error}") from error
    # Kernels may round differently by the number of tokens; a lost past is another matter.
    lost = (parts - whole)[4:].abs().mean()
    if not lost <= 0.5 * (forgetful - whole[4:]).abs().mean():  # NaN too
        raise BaseUnusable(f"models of type {name!r} cannot be served: given in parts, a sequence loses its past")
