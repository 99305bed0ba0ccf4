"""Runs a batch through the model and returns the logits that are sampled from. Knows no adapters and no scheduling.

PagedRunner puts the rows of a step side by side in one forward. PlainRunner is the slow reference, one row after
another through transformers' own cache: it serves every causal language model, and the other is tested against it.
"""

from typing import Any, Protocol

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.engine.attention import NAME, KVTensors, PagedStep, RowSlots
from loraplex_server.engine.batch import Batch
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request

# Families whose attention is plain causal attention through AttentionInterface, each tested against PlainRunner.
PAGED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class Runner(Protocol):
    """What the engine asks of a way to run the model."""

    mixed: bool  # whether one forward may hold rows of many adapters

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Logits of the last token of each row that samples: (sampling rows, vocabulary)."""
        ...

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request that ended."""
        ...


def make_runner(model: PreTrainedModel, pages: KVPages, paged: bool | None = None) -> Runner:
    """The fastest runner that is right for this model; ``paged`` False asks for the slow reference."""
    return PagedRunner(model, pages) if paged is not False and can_page(model) else PlainRunner()


def can_page(model: PreTrainedModel) -> bool:
    """Whether the family's attention is known to be what paged attention computes."""
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = config.model_type == "mistral" and config.sliding_window is not None
    return config.model_type in PAGED_FAMILIES and kinds == {"full_attention"} and not windowed


class PagedRunner:
    """All rows of a step in one forward, over paged keys and values."""

    mixed = True

    def __init__(self, model: PreTrainedModel, pages: KVPages) -> None:
        self._pages = pages
        self._device = model.device
        self._kv = KVTensors(model.config, pages.pages * pages.page_tokens, model.dtype, model.device)
        model.set_attn_implementation(NAME)

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """See Runner."""
        ids: list[int] = []
        positions: list[int] = []
        written: list[int] = []
        rows: list[RowSlots] = []
        sampled: list[int] = []
        for row in batch.rows:
            context = self._pages.slots(row.request, 0, row.stop)
            rows.append(RowSlots(len(ids), len(ids) + row.tokens, self._tensor(context)))
            ids += row.request.token_ids[row.start : row.stop]
            positions += range(row.start, row.stop)
            written += context[row.start :]
            if row.samples:
                sampled.append(len(ids) - 1)
        step = PagedStep(self._kv, self._tensor(written), tuple(rows))
        return model(
            input_ids=self._tensor(ids)[None],
            position_ids=self._tensor(positions)[None],
            use_cache=False,
            logits_to_keep=self._tensor(sampled),
            paged=step,
        ).logits[0]

    def forget(self, request: Request) -> None:
        """See Runner; the pages are freed by their owner."""

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


class PlainRunner:
    """One row after another, each with transformers' own cache."""

    mixed = False

    def __init__(self) -> None:
        self._caches: dict[str, Cache] = {}

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """See Runner."""
        logits = []
        for row in batch.rows:
            ids = torch.tensor([row.request.token_ids[row.start : row.stop]], device=model.device)
            out = model(input_ids=ids, past_key_values=self._caches.get(row.request.id), use_cache=True)
            self._caches[row.request.id] = out.past_key_values
            if row.samples:
                logits.append(out.logits[0, -1])
        return torch.stack(logits) if logits else torch.empty(0, model.config.vocab_size)

    def forget(self, request: Request) -> None:
        """See Runner."""
        self._caches.pop(request.id, None)
