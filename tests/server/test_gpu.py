"""The engine on a CUDA device: peft alone is the oracle there too. Run with `pytest -m gpu`; no GPU has run it yet.

On such a machine test_triton_lora and test_decode_attention also run on the device, compiled instead of interpreted.
"""

import pytest
import torch
from peft import PeftModel

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.cuda_graphs import CudaCapture, GraphRunner
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.engine.triton_lora import BLOCKED_TOKENS, add_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["the quick", "again and again and again: the lazy brown dog jumps over", "fox?", "ünïcödé dog " * 3]
GREEDY = SamplingParams(max_tokens=20, temperature=0)


def engine_for(folder, adapters, quantization="none", dtype="float32", **config) -> Engine:
    base = load_base(str(folder), quantization=quantization, device="cuda", dtype=dtype)
    engine = Engine(base, EngineConfig(**config))
    for name, adapter in adapters.items():
        engine.add_adapter(name, adapter)
    return engine


def peft_alone(folder, adapters, quantization="none", dtype="float32") -> PeftModel:
    model = load_base(str(folder), quantization=quantization, device="cuda", dtype=dtype).model
    (first, first_folder), *others = adapters.items()
    model = PeftModel.from_pretrained(model, first_folder, adapter_name=first)
    for name, adapter in others:
        model.load_adapter(adapter, name)
    return model.eval()


@torch.no_grad()
def alone(model, ids, adapter) -> list[int]:
    prompt = torch.tensor([ids], device="cuda")
    asked = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt), "pad_token_id": 1}
    if adapter is None:
        with model.disable_adapter():
            out = model.generate(**asked, max_new_tokens=20, do_sample=False)
    else:
        model.set_adapter(adapter, inference_mode=True)
        out = model.generate(**asked, max_new_tokens=20, do_sample=False)
    answer = out[0, len(ids) :].tolist()
    return answer[: answer.index(0)] if 0 in answer else answer


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("adapted", [True, False], ids=["adapters", "base"])
def test_in_float32_the_tokens_are_those_of_peft_alone(base_folder, adapter_folders, graphs, adapted):
    engine = engine_for(base_folder, adapter_folders, cuda_graphs=graphs)
    assert isinstance(engine._runner, GraphRunner) == graphs
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in ([None, *adapter_folders] if adapted else [None])]
    answers = engine.generate([p for p, _ in asked], GREEDY, [a for _, a in asked])
    model = peft_alone(base_folder, adapter_folders)
    expected = [alone(model, engine.base.tokenizer(prompt).input_ids, adapter) for prompt, adapter in asked]
    assert [answer.token_ids for answer in answers] == expected
    if graphs:
        assert not engine._runner._broken, "a capture failed: see the warning"
        assert adapted or engine._runner._graphs, "nothing was captured"


@pytest.mark.parametrize("steps", [1, 2], ids=["prompt", "decode"])
def test_in_4_bits_the_logits_are_those_of_peft(base_folder, adapter_folders, steps):
    red = {"red": adapter_folders["red"]}
    engine = engine_for(base_folder, red, "nf4", "bfloat16")
    captured, sample = [], engine._sampler.sample
    engine._sampler.sample = lambda requests, logits: captured.append(logits.clone()) or sample(requests, logits)
    ids = engine.base.tokenizer(PROMPTS[1]).input_ids
    engine.generate([PROMPTS[1]], SamplingParams(max_tokens=1, temperature=0), "red")  # it is on the device now
    captured.clear()
    request = Request("r", list(ids), SamplingParams(max_tokens=steps, temperature=0), "red")
    engine.add(request)
    while engine.has_work:
        engine.step()
    model = peft_alone(base_folder, red, "nf4", "bfloat16")
    with torch.no_grad():
        seen = torch.tensor([ids + request.output_ids[: steps - 1]], device="cuda")
        expected = model(input_ids=seen).logits[0, -1].float()
    # bfloat16 has 8 bits of mantissa, rounded anew in each of 2 layers; kernels differ by the number of rows.
    torch.testing.assert_close(captured[-1][0].float(), expected, rtol=0, atol=0.03 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [4, BLOCKED_TOKENS], ids=["single", "blocked"])
def test_lora_kernels_are_captured_and_see_what_changes_afterwards(tokens):
    a, b = torch.randn(2, 8, 64, device="cuda"), torch.randn(2, 96, 8, device="cuda")
    table = LoraTable(
        a=torch.tensor([a[0].data_ptr(), a[1].data_ptr()], device="cuda"),
        b=torch.tensor([b[0].data_ptr(), b[1].data_ptr()], device="cuda"),
        rank=torch.tensor([8, 8], dtype=torch.int32, device="cuda"),
        scaling=torch.ones(2, device="cuda"),
        dtype=torch.float32,
        max_rank=8,
    )
    x, slots = torch.randn(tokens, 64, device="cuda"), torch.zeros(tokens, dtype=torch.int32, device="cuda")

    def run() -> torch.Tensor:
        out = torch.zeros(tokens, 96, device="cuda")
        add_lora(out, x, slots, table)
        return out

    replay, out = CudaCapture()(run)
    slots[1:] = 1
    slots[-1] = -1
    a[1] *= 2
    replay()
    expected = torch.stack([b[s] @ (a[s] @ x[t]) if s >= 0 else out[t] * 0 for t, s in enumerate(slots.tolist())])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
