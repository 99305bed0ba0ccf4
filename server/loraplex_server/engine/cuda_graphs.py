"""Decode steps by CUDA graphs: the launches of a whole forward are recorded once and replayed as one.

A step in which every row has one token is padded to the next size of a ladder, its inputs are copied into buffers that
never move, and the graph of that size is replayed. Every other step runs eagerly. What a graph is made of is handed in
(`Capture`), so that all of this is tested without a GPU. Knows rows and buffers; which adapter lies in which slot is
told by `Routes`.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from transformers.modeling_utils import PreTrainedModel

from loraplex_server.engine import decode_attention
from loraplex_server.engine.attention import KVTensors
from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.decode_attention import DecodeStep
from loraplex_server.engine.kv_cache import KVPages
from loraplex_server.engine.request import Request

_log = logging.getLogger(__name__)

# Families whose forward was read through: it asks the device for nothing and branches on no value.
GRAPHED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2"})

Forward = Callable[[], torch.Tensor]
# Runs a forward, and gives what repeats it over the same memory, and the tensor in which its result then lies.
Capture = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]


class Eager(Protocol):
    """The runner of all other steps, over the same keys and values."""

    kv: KVTensors  # with one slot past the last page's, where padded rows write

    def forward(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor: ...
    def forget(self, request: Request) -> None: ...


class Routes(Protocol):
    """How the adapters of a step reach the layers."""

    @property
    def generation(self) -> int:
        """Changes when graphs captured before would no longer compute what the model does.

        So when a layer is wrapped or unwrapped, or a table moves in memory or gets another highest rank; not when
        what stands in the tables changes.
        """
        ...

    def slots_of(self, batch: Batch) -> Sequence[int] | None:
        """The adapter slot of each row, -1 for the base's; None: an adapter of the step needs more than slots.

        Asked once the engine has announced the step to the routing.
        """
        ...

    def bound(self, slots: torch.Tensor | None) -> AbstractContextManager[None]:
        """Within, a forward takes its tokens' slots from here alone, (rows,) int32; None: the base alone."""
        ...


class BaseRoutes:
    """No adapter goes by slots: steps of the base alone can be replayed, all others run eagerly."""

    generation = 0

    def slots_of(self, batch: Batch) -> list[int] | None:
        """See Routes."""
        return [-1] * len(batch.rows) if batch.adapters == {None} else None

    def bound(self, slots: torch.Tensor | None) -> AbstractContextManager[None]:
        """See Routes."""
        return nullcontext()


def can_graph(model: PreTrainedModel) -> bool:
    """Whether the model's decode step can be captured: a CUDA device, and a forward that is known to stay on it."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    stays = rope.get("rope_type", "default") != "dynamic"  # transformers reads the longest position back for it
    return model.device.type == "cuda" and model.config.model_type in GRAPHED_FAMILIES and stays


def ladder(max_rows: int) -> tuple[int, ...]:
    """Sizes to which steps are padded: powers of two, and the most rows there can be."""
    return (*(1 << i for i in range((max_rows - 1).bit_length())), max_rows)


def is_decode(batch: Batch) -> bool:
    """Whether every row has one token, and samples from it."""
    return all(row.tokens == 1 and row.samples for row in batch.rows)


class GraphRunner:
    """Decode steps by replay, all others by ``eager``. ``max_tokens``: the most of one sequence."""

    mixed = True
    paged = True

    def __init__(
        self,
        eager: Eager,
        pages: KVPages,
        max_rows: int,
        max_tokens: int,
        routes: Routes | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.routes = routes or BaseRoutes()
        self._eager = eager
        self._sizes = ladder(max_rows)
        self._inputs = StaticInputs(eager.kv, pages, max_rows, max_tokens)
        self._capture = capture or CudaCapture()
        self._graphs: dict[tuple[int, bool], tuple[Callable[[], None], torch.Tensor]] = {}
        self._generation = self.routes.generation
        self._broken = False

    def forward(self, model: Any, batch: Batch) -> torch.Tensor:
        """See Runner. What comes back is overwritten by the next step."""
        rows = len(batch.rows)
        slots = None
        if not self._broken and is_decode(batch) and rows <= self._sizes[-1]:
            slots = self.routes.slots_of(batch)
        if slots is None:
            return self._eager.forward(model, batch)
        size = next(size for size in self._sizes if size >= rows)
        adapters = any(slot >= 0 for slot in slots)
        self._inputs.fill(batch.rows, slots, size)
        try:
            replay, logits = self._graph(model, size, adapters)
        except RuntimeError as error:  # nothing was lost but speed, and the next try would fail as this one did
            self._broken = True
            self._graphs.clear()
            _log.warning("decode steps run without CUDA graphs: capturing one failed: %s", error)
            return self._eager.forward(model, batch)
        replay()
        return logits[:rows]

    def forget(self, request: Request) -> None:
        """See Runner."""
        self._eager.forget(request)

    def _graph(self, model: Any, size: int, adapters: bool) -> tuple[Callable[[], None], torch.Tensor]:
        if self._generation != self.routes.generation:
            self._generation = self.routes.generation
            self._graphs.clear()
        if (size, adapters) not in self._graphs:
            self._graphs[size, adapters] = self._captured(model, size, adapters)
        return self._graphs[size, adapters]

    def _captured(self, model: Any, size: int, adapters: bool) -> tuple[Callable[[], None], torch.Tensor]:
        inputs = self._inputs
        step = inputs.step(size)

        def run() -> torch.Tensor:
            return model(
                input_ids=inputs.ids[None, :size],
                position_ids=inputs.positions[None, :size],
                use_cache=False,
                paged=step,
            ).logits[0]

        eager_attention = model.config._attn_implementation
        model.set_attn_implementation(decode_attention.NAME)
        try:
            with self.routes.bound(inputs.slots[:size] if adapters else None):
                return self._capture(run)
        finally:
            model.set_attn_implementation(eager_attention)


class StaticInputs:
    """The buffers that graphs read. They are filled on the host and copied over at once.

    Whoever takes the step's result waits for the device before the next step is filled in, so a copy that is under way
    is never written over.
    """

    def __init__(self, kv: KVTensors, pages: KVPages, max_rows: int, max_tokens: int) -> None:
        self._kv, self._pages = kv, pages
        device = kv.keys[0].device
        most_pages = min(pages.pages, -(-max_tokens // pages.page_tokens))

        def pair(*shape: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(*shape, dtype=dtype, pin_memory=device.type == "cuda")
            return host, torch.zeros(*shape, dtype=dtype, device=device)

        self._rows_host, self._rows = pair(4, max_rows, dtype=torch.int64)
        self._tables_host, self._tables = pair(max_rows, most_pages, dtype=torch.int32)
        self._slots_host, self.slots = pair(max_rows, dtype=torch.int32)
        self.ids, self.positions, self.written, self.lengths = self._rows.unbind()

    def step(self, size: int) -> DecodeStep:
        """What attention reads in a step of ``size`` rows."""
        return DecodeStep(
            self._kv, self.written[:size], self._tables[:size], self.lengths[:size], self._pages.page_tokens
        )

    def fill(self, rows: Sequence[Row], slots: Sequence[int], size: int) -> None:
        """Copy a step in. Rows past the last are padding: the base's, one token long, written past the last page."""
        taken, page = len(rows), self._pages.page_tokens
        by_row, tables, adapters = self._rows_host.numpy(), self._tables_host.numpy(), self._slots_host.numpy()
        for i, row in enumerate(rows):
            own = self._pages.table(row.request)
            by_row[:, i] = (
                row.request.token_ids[row.start],
                row.start,
                own[row.start // page] * page + row.start % page,
                row.stop,
            )
            tables[i, : len(own)] = own
        scratch = self._pages.pages
        by_row[:, taken:size] = ((0,), (0,), (scratch * page,), (1,))
        tables[taken:size, 0] = scratch
        adapters[:size] = -1
        adapters[:taken] = slots
        self._rows.copy_(self._rows_host, non_blocking=True)
        self._tables[:size].copy_(self._tables_host[:size], non_blocking=True)
        self.slots.copy_(self._slots_host, non_blocking=True)


class CudaCapture:
    """Captures with torch.cuda.graph. Graphs share their memory: only one is replayed at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        """See Capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # what is made once (kernels, workspaces) is made outside the capture
            run()
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # thread_local: loads in other threads pin memory meanwhile, which would else end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return graph.replay, out
