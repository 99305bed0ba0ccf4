"""The oracle: the engine gives what peft gives for one request alone, `set_adapter` then plain greedy `generate`."""

import pytest
import torch
from peft import PeftModel
from tiny import FAMILIES, make_adapter, make_base
from transformers import AutoModelForCausalLM

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.engine.runner import can_page

PROMPTS = ["the quick", "again and again and again: the lazy brown dog jumps over", "fox?", "ünïcödé dog " * 3]
GREEDY = SamplingParams(max_tokens=20, temperature=0)


class PeftAlone:
    """The reference: one request at a time, on a model of its own."""

    def __init__(self, base_folder, adapters) -> None:
        model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
        for name, folder in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(folder, name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        self.model = model
        self.known = {}

    def answer(self, prompt_ids, adapter, max_tokens=20) -> list[int]:
        key = (tuple(prompt_ids), adapter, max_tokens)
        if key not in self.known:
            if adapter:
                self.model.set_adapter(adapter, inference_mode=True)
                self.known[key] = self._generate(prompt_ids, max_tokens)
            else:
                with self.model.disable_adapter():
                    self.known[key] = self._generate(prompt_ids, max_tokens)
        return self.known[key]

    def _generate(self, prompt_ids, max_tokens) -> list[int]:
        ids = torch.tensor([prompt_ids])
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=1,
        )
        answer = out[0, len(prompt_ids) :].tolist()
        return answer[: answer.index(0)] if 0 in answer else answer


@pytest.fixture(scope="module")
def alone(base_folder, adapter_folders) -> PeftAlone:
    return PeftAlone(base_folder, adapter_folders)


def engine_for(base_folder, adapters, **config) -> Engine:
    base = load_base(str(base_folder), quantization="none", device="cpu", dtype="float32")
    engine = Engine(base, EngineConfig(**config))
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine


@pytest.mark.parametrize(
    "config",
    [{}, {"step_tokens": 7}, {"max_loras": 1}, {"max_rows": 2}, {"paged": False}, {"page_tokens": 3}],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()) or "defaults",
)
def test_mixed_requests_equal_peft_alone(base_folder, adapter_folders, alone, config):
    engine = engine_for(base_folder, adapter_folders, **config)
    steps, route = [], engine.device.route
    engine.device.route = lambda batch: steps.append(len(batch.adapters)) or route(batch)
    asked = [(prompt, adapter) for prompt in PROMPTS for adapter in [None, *adapter_folders]]
    answers = engine.generate([p for p, _ in asked], GREEDY, [a for _, a in asked])
    expected = [alone.answer(engine.base.tokenizer(prompt).input_ids, adapter) for prompt, adapter in asked]
    assert [answer.token_ids for answer in answers] == expected
    assert (max(steps) > 1) == config.get("paged", True), "rows of several adapters share a step where they can"
    by_adapter = {tuple(map(tuple, expected[i::5])) for i in range(5)}
    assert len(by_adapter) == 5, "the adapters must answer differently, or this test proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_peft(tmp_path, family):
    base_folder = make_base(tmp_path / "base", family)
    adapters = {"one": make_adapter(tmp_path / "one", base_folder)}
    engine = engine_for(base_folder, adapters, step_tokens=9)
    alone = PeftAlone(base_folder, adapters)
    paged = {"llama", "mistral", "qwen2", "qwen3"}
    assert can_page(engine.base.model) == (family in paged)
    for adapter in (None, "one"):
        answers = engine.generate(PROMPTS, GREEDY, adapter)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            ids = engine.base.tokenizer(prompt).input_ids
            assert answer.token_ids == alone.answer(ids, adapter), prompt


def test_requests_that_arrive_while_others_run(base_folder, adapter_folders, alone):
    engine = engine_for(base_folder, adapter_folders, step_tokens=16)
    requests = [
        Request(f"{i}", engine.base.tokenizer(PROMPTS[i % 4]).input_ids, GREEDY, adapter)
        for i, adapter in enumerate(["red", None, "green", "red", "blue", None, "green"])
    ]
    waiting = list(requests)
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        engine.step()
    for request in requests:
        assert request.output_ids == alone.answer(request.prompt_ids, request.adapter)


def test_nf4_rows_in_a_batch_equal_each_alone(base_folder, adapter_folders):
    """In 4 bits the numbers depend on the kernel, so the reference is the engine itself, one request at a time; and
    lean, since otherwise the kernel depends on how many rows share a step."""
    base = load_base(str(base_folder), quantization="nf4", device="cpu")
    engine = Engine(base, EngineConfig(lean=True))
    for name, folder in adapter_folders.items():
        engine.add_adapter(name, folder)
    adapters = [None, "red", "green", "blue"]
    together = engine.generate([PROMPTS[0]] * 4, GREEDY, adapters)
    alone = [engine.generate([PROMPTS[0]], GREEDY, adapter)[0] for adapter in adapters]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({tuple(a.token_ids) for a in together}) == 4


def test_nf4_logits_are_those_of_peft(base_folder, adapter_folders):
    base = load_base(str(base_folder), quantization="nf4", device="cpu", dtype="float32")
    engine = Engine(base)
    engine.add_adapter("red", adapter_folders["red"])
    ids = base.tokenizer(PROMPTS[1]).input_ids
    engine.generate([PROMPTS[1]], SamplingParams(max_tokens=1, temperature=0), "red")
    captured = []
    sample = engine._sampler.sample
    engine._sampler.sample = lambda requests, logits: captured.append(logits) or sample(requests, logits)
    engine.add(Request("r", ids, SamplingParams(max_tokens=1, temperature=0), "red"))
    engine.step()
    reference = load_base(str(base_folder), quantization="nf4", device="cpu", dtype="float32").model
    reference = PeftModel.from_pretrained(reference, adapter_folders["red"]).eval()
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor([ids])).logits[0, -1]
    # The fused 4-bit kernel computes in bfloat16: 8 bits of mantissa, over 2 layers.
    torch.testing.assert_close(captured[0][0], expected, rtol=0, atol=0.02 * float(expected.abs().max()))


def test_a_seed_gives_the_same_sample_in_any_company(base_folder, adapter_folders):
    engine = engine_for(base_folder, adapter_folders)
    sampled = SamplingParams(max_tokens=16, temperature=1.5, top_p=0.9, seed=7)
    alone = engine.generate([PROMPTS[0]], sampled, "red")[0]
    crowd = engine.generate([PROMPTS[0]] * 3 + PROMPTS, sampled, ["green", "red", None, "red", "blue", None, "red"])
    assert crowd[1].token_ids == alone.token_ids
    assert crowd[0].token_ids != alone.token_ids
    other = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=16, temperature=1.5, top_p=0.9, seed=8), "red")[0]
    assert other.token_ids != alone.token_ids
