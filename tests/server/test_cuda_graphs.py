"""Decode by replay, with a recorder in the place of torch.cuda.CUDAGraph, gives the eager runner's tokens.

The recorder holds a tape of torch's own operations over fixed memory, as a graph holds kernels: Python does not run
again, so a number that should have been in a buffer and was baked in instead gives wrong tokens here too.
"""

from contextlib import contextmanager

import pytest
import torch
from tiny import make_base
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex_server.engine.batch import Batch, Row
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.cuda_graphs import BaseRoutes, GraphRunner, is_decode, ladder
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams

PROMPTS = ["the quick", "again and again and again: the lazy brown dog jumps over", "fox?", "ünïcödé dog " * 3, "a"]
GREEDY = SamplingParams(max_tokens=20, temperature=0)


class Tape(TorchDispatchMode):
    """The operations that ran inside, to be run again over the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # else a view, or in place
                    old.copy_(new)


def _tensors(out) -> list[torch.Tensor]:
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor) and t.numel()]


class Recorder:
    """A Capture; counts what is captured and replayed, by size."""

    def __init__(self) -> None:
        self.captured, self.replayed = [], []

    def __call__(self, run) -> tuple:
        run()
        with Tape() as tape:
            out = run()
        size = len(out)
        self.captured.append(size)

        def replay() -> None:
            self.replayed.append(size)
            tape.replay()

        return replay, out


def engine_for(folder, recorder=None, routes=None, **config) -> Engine:
    base = load_base(str(folder), quantization="none", device="cpu", dtype="float32")
    engine = Engine(base, EngineConfig(**config))
    if recorder:
        engine._runner = GraphRunner(
            engine._runner, engine.pages, engine.config.max_rows, engine.max_tokens, routes, recorder
        )
    return engine


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("llama", {}),
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral-window", {}),
        ("gemma2", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(v),
)
def test_replayed_tokens_are_the_eager_ones(tmp_path, family, more):
    folder = make_base(tmp_path / "base", family, **more)
    recorder = Recorder()
    expected = engine_for(folder, max_rows=4).generate(PROMPTS, GREEDY)
    answers = engine_for(folder, recorder, max_rows=4).generate(PROMPTS, GREEDY)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
    assert len({tuple(a.token_ids) for a in expected}) == len(PROMPTS)
    assert set(recorder.captured) >= {1, 4} and len(recorder.captured) == len(set(recorder.captured))
    assert len(recorder.replayed) > 20


def test_the_ladder_ends_with_the_most_rows_there_can_be():
    assert ladder(1) == (1,)
    assert ladder(16) == (1, 2, 4, 8, 16)
    assert ladder(20) == (1, 2, 4, 8, 16, 20)


def test_only_steps_of_one_token_a_row_are_replayed(base_folder):
    recorder = Recorder()
    engine = engine_for(base_folder, recorder, step_tokens=8)
    steps = []
    forward = engine._runner.forward
    engine._runner.forward = lambda model, batch: (
        steps.append((is_decode(batch), len(batch.rows))) or forward(model, batch)
    )
    prompts = [PROMPTS[i % 5] for i in range(7)]
    answers = engine.generate(prompts, GREEDY)
    assert [a.token_ids for a in answers] == [a.token_ids for a in engine_for(base_folder).generate(prompts, GREEDY)]
    decodes = [rows for decode, rows in steps if decode]
    assert len(decodes) < len(steps), "long prompts were cut into chunks beside rows that decode"
    assert recorder.replayed == [next(size for size in (1, 2, 4, 8) if size >= rows) for rows in decodes]


def test_padding_writes_to_the_scratch_slot_alone(base_folder):
    engine = engine_for(base_folder, Recorder())
    requests = [Request(f"{i}", [5 + i] * 9, GREEDY) for i in range(3)]
    for request in requests:
        engine.add(request)
    engine.step()
    kv = engine._runner._eager.kv
    for tensor in (*kv.keys, *kv.values):
        tensor.nan_to_num_()  # memory that nobody has written may hold anything
        tensor[engine.pages.slots(requests[2], 10, 16)] = 7
        tensor[-1] = 7
    before = [tensor.clone() for tensor in (*kv.keys, *kv.values)]
    engine.step()  # three rows, padded to four
    for old, new in zip(before, (*kv.keys, *kv.values), strict=True):
        changed = (old != new).flatten(1).any(1).nonzero().flatten().tolist()
        own = [engine.pages.slots(request, 9, 10)[0] for request in requests]
        assert sorted(changed) == sorted([*own, len(new) - 1])


class SlotLayers:
    """Adapters on every attention's q_proj, by slots read from a buffer: engine.lora as Routes sees it."""

    def __init__(self, model, names: list[str]) -> None:
        self.generation = 0
        self.names = {name: slot for slot, name in enumerate(names)}
        self.refused: set[str] = set()
        self.read: torch.Tensor | None = None
        random = torch.Generator().manual_seed(3)
        layers = [layer.self_attn.q_proj for layer in model.model.layers]
        draw = lambda *shape: torch.randn(*shape, generator=random) * 0.2  # noqa: E731
        self.a = [draw(len(names), 4, layer.in_features) for layer in layers]
        self.b = [draw(len(names), layer.out_features, 4) for layer in layers]
        for layer, a, b in zip(layers, self.a, self.b, strict=True):
            layer.register_forward_hook(lambda _, args, out, a=a, b=b: self._add(out, args[0], a, b))

    def _add(self, out, x, a, b):
        if self.read is None:
            return out
        slots = self.read.long()
        part = torch.einsum("tri,ti->tr", a[slots.clamp(min=0)], x[0])
        return out + torch.einsum("tor,tr->to", b[slots.clamp(min=0)], part * (slots >= 0)[:, None])[None]

    def slots_of(self, batch: Batch):
        adapters = [row.request.adapter for row in batch.rows]
        return None if self.refused & set(adapters) else [-1 if a is None else self.names[a] for a in adapters]

    @contextmanager
    def bound(self, slots):
        before, self.read = self.read, slots
        try:
            yield
        finally:
            self.read = before

    def route(self, batch: Batch) -> None:
        """What the engine does before each forward: every token's slot, for the steps that run eagerly."""
        slots = [-1 if r.request.adapter is None else self.names[r.request.adapter] for r in batch.rows]
        tokens = torch.tensor([row.tokens for row in batch.rows])
        self.read = torch.tensor(slots, dtype=torch.int32).repeat_interleave(tokens)


class Bench:
    """A model, its runner and some requests, driven step by step without a scheduler."""

    def __init__(self, folder, adapters: list[str | None], graphs: bool) -> None:
        engine = engine_for(folder)
        self.model, self.pages, self.recorder = engine.base.model, engine.pages, Recorder()
        self.routes = SlotLayers(self.model, ["red", "green", "blue"])
        self.runner = engine._runner
        if graphs:
            self.runner = GraphRunner(self.runner, self.pages, 16, 256, self.routes, self.recorder)
        self.requests = [Request(f"{i}", [9, 8, 7 + i], GREEDY, a) for i, a in enumerate(adapters)]
        for request in self.requests:
            assert self.pages.admit(request, 0)  # a page: more than these requests grow to
        self.step(3)

    @torch.no_grad()
    def step(self, tokens: int = 1, only: int | None = None) -> list[int]:
        batch = Batch.of(Row.of(request, tokens) for request in self.requests[:only])
        self.routes.route(batch)
        chosen = self.runner.forward(self.model, batch).argmax(-1).tolist()
        for row, token in zip(batch.rows, chosen, strict=True):
            row.request.computed_tokens = row.stop
            row.request.output_ids.append(token)
        return chosen


MIXED = ["red", None, "green", "red", "blue"]


def test_rows_of_many_adapters_and_of_the_base_are_replayed_by_their_slots(base_folder):
    eager, graphs = Bench(base_folder, MIXED, False), Bench(base_folder, MIXED, True)
    for only in (None, None, None, 3, 3, 2, 1, None):
        assert eager.step(only=only) == graphs.step(only=only)
    assert sorted(graphs.recorder.captured) == [1, 2, 4, 8]
    assert len(graphs.recorder.replayed) == 8
    answers = {tuple(request.output_ids) for request in graphs.requests[1:]}
    assert len(answers) == 4, "the adapters must answer differently, or this test proves nothing"


def test_steps_of_the_base_alone_have_a_graph_without_adapters(base_folder):
    graphs = Bench(base_folder, [None, None, "red"], True)
    given, bound = [], graphs.routes.bound
    graphs.routes.bound = lambda slots: given.append(None if slots is None else slots.tolist()) or bound(slots)
    graphs.step(only=2)
    graphs.step()
    graphs.requests = graphs.requests[1:]  # two rows again, one of them an adapter's
    graphs.step()
    assert graphs.recorder.captured == [2, 4, 2]
    assert given == [None, [-1, -1, 0, -1], [-1, 0]]


def test_an_adapter_that_comes_to_a_slot_later_is_seen_by_graphs_that_were_there(base_folder):
    eager, graphs = Bench(base_folder, MIXED, False), Bench(base_folder, MIXED, True)
    for bench in (eager, graphs):
        bench.step()
        for weights in (*bench.routes.a, *bench.routes.b):
            weights[0] = weights[2].flip(0)
    assert [eager.step() for _ in range(4)] == [graphs.step() for _ in range(4)]
    assert graphs.recorder.captured == [8]


def test_another_generation_is_captured_anew(base_folder):
    graphs = Bench(base_folder, MIXED, True)
    graphs.step()
    graphs.step()
    graphs.routes.generation += 1
    graphs.step()
    assert (graphs.recorder.captured, graphs.recorder.replayed) == ([8, 8], [8, 8, 8])


def test_an_adapter_that_needs_more_than_slots_runs_its_steps_eagerly(base_folder):
    eager, graphs = Bench(base_folder, MIXED, False), Bench(base_folder, MIXED, True)
    graphs.routes.refused = {"blue"}
    assert [eager.step() for _ in range(3)] == [graphs.step() for _ in range(3)]
    assert graphs.recorder.captured == []
    assert eager.step(only=4) == graphs.step(only=4)
    assert graphs.recorder.captured == [4]


def test_without_routes_the_base_is_replayed_and_adapters_are_not(base_folder):
    base, red = Request("a", [5], GREEDY), Request("b", [5], GREEDY, "red")
    assert BaseRoutes().slots_of(Batch.of([Row.of(base, 1)])) == [-1]
    assert BaseRoutes().slots_of(Batch.of([Row.of(base, 1), Row.of(red, 1)])) is None


def test_a_capture_that_fails_leaves_a_server_that_answers_eagerly(base_folder, caplog):
    """And with its adapters: what was bound for the capture is bound no more."""
    tries = []

    def failing(run):
        tries.append(run())
        raise RuntimeError("operation not permitted when stream is capturing")

    eager, graphs = Bench(base_folder, MIXED, False), Bench(base_folder, MIXED, True)
    graphs.runner._capture = failing
    assert [eager.step() for _ in range(4)] == [graphs.step() for _ in range(4)]
    assert len(tries) == 1
    said = [record.message for record in caplog.records if "without CUDA graphs" in record.message]
    assert len(said) == 1 and "not permitted" in said[0]


def test_a_forward_that_reads_the_device_back_is_caught_by_the_recorder(base_folder):
    """What CUDA would refuse to capture must not pass here."""
    with pytest.raises(RuntimeError, match="capturing"):
        Recorder()(lambda: torch.ones(2) * torch.ones(2).sum().item())


def test_on_a_cpu_no_graphs_are_used(base_folder):
    assert not isinstance(engine_for(base_folder)._runner, GraphRunner)
