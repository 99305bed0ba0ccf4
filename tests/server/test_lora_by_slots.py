"""Adapters by the Triton kernels in the engine, as on a CUDA device, here by Triton's interpreter: peft's tokens."""

import pytest
import torch

from loraplex_server.engine import engine as engines
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.cuda_graphs import GraphRunner
from loraplex_server.engine.lora import Routing
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import SamplingParams
from loraplex_server.engine.triton_lora import TritonLora

GREEDY = SamplingParams(max_tokens=5, temperature=0)
PROMPTS = ["the quick", "fox?", "again and again: the lazy brown dog", "a"]


def engine_for(folder, adapters, monkeypatch, triton: bool):
    """An engine on the CPU, with the routing that a CUDA device would get."""
    made = []

    def routing(slots, max_rank, *_) -> Routing:
        made.append(Routing(slots, max_rank, TritonLora(torch.float32) if triton else None))
        return made[-1]

    monkeypatch.setattr(engines, "Routing", routing)
    base = load_base(str(folder), quantization="none", device="cpu", dtype="float32")
    engine = engines.Engine(base, EngineConfig(kernels=False, max_rows=4))
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    return engine, made[0]


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "bound"])
def test_the_tokens_are_those_of_pefts_layers(base_folder, adapter_folders, monkeypatch, graphs):
    pytest.importorskip("triton", reason="pip install 'loraplex[kernels]'; scripts/test does")
    asked = [None, "red", "green", "blue", "head", "red", None, "green"]
    plain, _ = engine_for(base_folder, adapter_folders, monkeypatch, triton=False)
    expected = [a.token_ids for a in plain.generate(PROMPTS * 2, GREEDY, asked)]
    engine, routing = engine_for(base_folder, adapter_folders, monkeypatch, triton=True)
    runs = []
    if graphs:

        def capture(run):
            """Not a recording: Python runs again, but the layers read the buffer that was bound, as a graph would."""
            bound, config = routing._bound._slots, engine.base.model.config
            decoding = config._attn_implementation
            out = run()

            def replay() -> None:
                runs.append(len(out))
                eager = config._attn_implementation
                engine.base.model.set_attn_implementation(decoding)
                with routing.bound(bound):
                    out.copy_(run())
                engine.base.model.set_attn_implementation(eager)

            return replay, out

        engine._runner = GraphRunner(engine._runner, engine.pages, 4, engine.max_tokens, routing, capture)
    answers = [a.token_ids for a in engine.generate(PROMPTS * 2, GREEDY, asked)]
    assert answers == expected
    assert bool(runs) == graphs
