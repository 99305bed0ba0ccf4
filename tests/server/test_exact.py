"""The oracle: the engine gives what peft gives for one request alone, `set_adapter` then plain greedy `generate`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import PeftAlone, engine_for
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_adapter, make_base

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.errors import AdapterRefused, BaseUnusable
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import Request, SamplingParams
from loraplex_server.engine.runner import can_page

PROMPTS = ["the quick", "again and again and again: the lazy brown dog jumps over", "fox?", "ünïcödé dog " * 3]
GREEDY = SamplingParams(max_tokens=20, temperature=0)


@pytest.fixture(scope="module")
def alone(base_folder, adapter_folders) -> PeftAlone:
    return PeftAlone(base_folder, adapter_folders)


def watch_logits(engine) -> list[tuple[list[int], str | None, torch.Tensor]]:
    """What is sampled from, as it comes: the tokens so far, the adapter, the logits."""
    seen, forward = [], engine._runner.forward

    def watched(model, batch) -> torch.Tensor:
        logits = forward(model, batch)
        requests = [row.request for row in batch.rows if row.samples]
        seen.extend((r.token_ids, r.adapter, own.clone()) for r, own in zip(requests, logits, strict=True))
        return logits

    engine._runner.forward = watched
    return seen


@pytest.mark.parametrize(
    "config",
    [{}, {"step_tokens": 7}, {"max_loras": 1}, {"max_loras": 2}, {"max_rows": 2}, {"paged": False}, {"page_tokens": 3}],
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


PLAIN = {"phi3-longrope", "falcon", "jamba"}  # one row after another
REFUSED = {"mamba": "they have no attention", "bert": "keeps no keys and values"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# Where peft's "all-linear" would reach for what is no linear layer: experts, or weights a recurrent layer uses itself.
TARGETS = {"mixtral": ATTENTION, "qwen3_moe": ATTENTION, "jamba": ATTENTION}


@dataclass(frozen=True)
class Family:
    """A base of a family, three adapters for it, and what peft alone says."""

    name: str
    folder: Path
    adapters: dict[str, Path]
    alone: PeftAlone

    @property
    def asked(self) -> tuple[list[str], list[str | None]]:
        """Short, longer and longest prompt, of the base and of every adapter: prompts and adapters."""
        asked = [
            (prompt, adapter) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[3]) for adapter in (None, *self.adapters)
        ]
        return [prompt for prompt, _ in asked], [adapter for _, adapter in asked]


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in REFUSED])
def family(request, tmp_path_factory) -> Family:
    root, targets = tmp_path_factory.mktemp(request.param), TARGETS.get(request.param, "all-linear")
    base = make_base(root / "base", request.param)
    adapters = {
        "one": make_adapter(root / "one", base, targets=targets, seed=1),
        "two": make_adapter(root / "two", base, rank=2, targets=targets, seed=2, use_rslora=True),
        "three": make_adapter(root / "three", base, rank=7, targets=targets, seed=3, lora_alpha=16),
    }
    return Family(request.param, base, adapters, PeftAlone(base, adapters))


@pytest.mark.parametrize("config", [{}, {"step_tokens": 9, "page_tokens": 3}, {"paged": False}], ids=str)
def test_every_family_equals_peft(family, config):
    """Whole prompts, prompts in pieces, and the reference; one prompt is longer than any window."""
    engine = engine_for(family.folder, family.adapters, **config)
    paged = family.name not in PLAIN and config.get("paged", True)
    assert can_page(engine.base.model) == (family.name not in PLAIN)
    steps, route = [], engine.device.route
    engine.device.route = lambda batch: steps.append(len(batch.adapters)) or route(batch)
    prompts, adapters = family.asked
    seen = watch_logits(engine)
    assert max(len(engine.base.tokenizer(prompt).input_ids) for prompt in prompts) > 2 * 16
    answers = engine.generate(prompts, GREEDY, adapters)
    expected = family.alone.answers(prompts, adapters, engine.base.tokenizer)
    assert [answer.token_ids for answer in answers] == expected
    assert (max(steps) > 1) == paged, "rows of several adapters share a step where they can"
    by_adapter = {tuple(map(tuple, expected[i::4])) for i in range(4)}
    assert len(by_adapter) == 4, "the adapters must answer differently, or this test proves nothing"
    # The likeliest token can outlive a key too few, so the numbers too: of the longest prompt, at the first and last.
    longest = len(engine.base.tokenizer(PROMPTS[-1]).input_ids)
    for ids, adapter, logits in (one for one in seen if len(one[0]) in (longest, longest + GREEDY.max_tokens - 1)):
        reference = family.alone.logits(ids, adapter)
        if farthest(logits, reference) > 1e-4:  # some prompts amplify a rounding: no farther from float64 than peft
            exact = family.alone.exact_logits(ids, adapter).float()
            assert farthest(logits, exact) <= farthest(reference, exact) < 1e-3


def farthest(logits, others) -> float:
    """The largest difference, to the largest logit."""
    return float((logits - others).abs().max() / others.abs().max())


def test_every_family_equals_peft_while_adapters_come_and_go(family):
    """Requests arrive one a step, in pieces, for more adapters than there are places."""
    engine = engine_for(family.folder, family.adapters, max_loras=2, step_tokens=16)
    installed, begin = [], engine.device.begin
    engine.device.begin = lambda adapter: installed.append(adapter.key) or begin(adapter)
    for _ in range(2):  # so that each adapter comes back after it had to go
        requests = [
            Request(f"{i}", engine.base.tokenizer(PROMPTS[i % 4]).input_ids, GREEDY, adapter)
            for i, adapter in enumerate(["one", None, "two", "one", "three", None, "two"])
        ]
        drive(engine, requests)
        for request in requests:
            assert request.output_ids == family.alone.answer(request.prompt_ids, request.adapter)
    assert len(installed) > len(set(installed)) == 3


@pytest.mark.parametrize("config", [{}, {"paged": False}, {"kv_cache_bytes": 1 << 16}], ids=str)
def test_who_is_paused_for_another_s_adapter_goes_on_as_if_nothing_had_been(
    base_folder, adapter_folders, alone, config
):
    """Rows for all and one slot for three adapters; with little memory they make room for each other as well."""
    engine = engine_for(base_folder, adapter_folders, max_loras=1, max_rows=8, **config)
    params = SamplingParams(max_tokens=80, temperature=0)
    requests = [
        Request(f"{i}", engine.base.tokenizer(PROMPTS[i % 4]).input_ids, params, adapter)
        for i, adapter in enumerate(["red", None, "green", "red", "blue", "green"])
    ]
    paused: set[str] = set()
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            assert delta.request.error is None
        paused |= {r.id for r in engine.scheduler.waiting if r.computed_tokens}
    assert {requests[int(id)].adapter for id in paused} >= {"red", "green"}
    assert "1" not in paused, "the base needs no slot"
    for request in requests:
        assert request.output_ids == alone.answer(request.prompt_ids, request.adapter, 80)
    assert any(r.preemptions for r in requests) == ("kv_cache_bytes" in config)


def drive(engine: Engine, requests: Sequence[Request]) -> None:
    """Add a request before each step, and step until all have ended."""
    waiting = list(requests)
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            assert delta.request.error is None


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_without_a_cache_to_go_on_from_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(BaseUnusable, match=f"models of type '{name}' cannot be served: .*{REFUSED[name]}"):
        engine_for(make_base(tmp_path / "base", name), {})


def test_a_model_that_forgets_what_is_in_its_cache_is_refused_at_the_start(tmp_path):
    base = load_base(str(make_base(tmp_path / "base", "falcon")), quantization="none", device="cpu", dtype="float32")
    Engine(base)  # as it is, it can be served
    whole = base.model.forward
    base.model.forward = lambda **inputs: whole(**{**inputs, "past_key_values": None})
    with pytest.raises(BaseUnusable, match="given in parts, a sequence loses its past"):
        Engine(base)


def test_requests_that_arrive_while_others_run(base_folder, adapter_folders, alone):
    engine = engine_for(base_folder, adapter_folders, step_tokens=16)
    requests = [
        Request(f"{i}", engine.base.tokenizer(PROMPTS[i % 4]).input_ids, GREEDY, adapter)
        for i, adapter in enumerate(["red", None, "green", "red", "blue", None, "green"])
    ]
    drive(engine, requests)
    for request in requests:
        assert request.output_ids == alone.answer(request.prompt_ids, request.adapter)


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA: what makes it on which base, and why it is refused, if it is."""

    lora: dict[str, Any]
    refused: str = ""  # a pattern; empty: it is served
    base: str = "llama"
    options: dict[str, Any] = field(default_factory=dict)  # of the base


QV = ["q_proj", "v_proj"]
TIED = {"tie_word_embeddings": True}
# A kind that comes to be served loses its reason here, and nothing else.
KINDS = {
    "rank 1": Kind({"rank": 1}),
    "rank 256": Kind({"rank": 256}),
    "rank 257": Kind({"rank": 257}, "rank r is 257, expected a whole number from 1 to 256"),
    "rsLoRA": Kind({"rank": 16, "use_rslora": True}),
    "rsLoRA on Conv1D": Kind({"targets": ["attn.c_proj", "c_fc"], "use_rslora": True}, base="gpt2"),
    "alpha_pattern": Kind({"targets": ["q_proj", "down_proj"], "alpha_pattern": {"down_proj": 64}}),
    "alpha_pattern on fused layers": Kind(
        {"targets": ["qkv_proj", "gate_up_proj"], "alpha_pattern": {"qkv_proj": 32}}, base="phi3"
    ),
    "rank_pattern": Kind({"targets": ["q_proj", "down_proj"], "rank_pattern": {r"layers\.1\.mlp\.down_proj": 7}}),
    "rank_pattern on Conv1D": Kind({"targets": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 7}}, base="gpt2"),
    "targets by pattern": Kind({"targets": r".*\.layers\.0\..*(up|down)_proj"}),
    "layers_to_transform": Kind({"targets": QV, "layers_to_transform": [1]}),
    "layers_pattern": Kind({"targets": QV, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "exclude_modules": Kind({"targets": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "lm_head": Kind({"targets": ["lm_head"]}),
    "a head that its checkpoint calls embed_out": Kind({"targets": ["lm_head"]}, base="gpt_neox"),
    "tied lm_head": Kind({"targets": ["lm_head", "q_proj"]}, options=TIED),
    "tied lm_head beside Conv1D": Kind({"targets": ["lm_head", "c_attn"]}, base="gpt2"),
    "tied lm_head of a narrow embedding": Kind({"targets": ["lm_head"]}, base="opt"),
    "tied lm_head of BLOOM": Kind({"targets": ["lm_head"]}, base="bloom"),
    "projections around the layers": Kind({"targets": ["project_in", "project_out"]}, base="opt"),
    "a shared expert and its gate": Kind(
        {"targets": ["shared_expert.up_proj", "shared_expert_gate"]}, base="qwen2_moe"
    ),
    "a name that experts have too": Kind({"targets": ["gate_proj"]}, base="qwen2_moe"),
    "embedding": Kind({"targets": ["embed_tokens", "q_proj"]}),
    "embedding alone": Kind({"targets": ["embed_tokens"], "use_rslora": True}),
    "tied embedding": Kind({"targets": ["embed_tokens"]}, options=TIED),
    "embedding and head": Kind({"targets": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 7}}, options=TIED),
    "scaled embedding": Kind({"targets": ["embed_tokens", "q_proj"]}, base="gemma2"),
    "scaled embedding of gemma3": Kind({"targets": ["embed_tokens"]}, base="gemma3_text"),
    "embedding by pattern": Kind({"targets": r".*\.embed_in", "alpha_pattern": {"embed_in": 64}}, base="gpt_neox"),
    "embedding of BLOOM": Kind({"targets": ["word_embeddings"]}, base="bloom"),
    "narrow embedding": Kind({"targets": ["embed_tokens"]}, base="opt"),
    "embedding of one row after another": Kind({"targets": ["embed_tokens"]}, base="phi3-longrope"),
    "learned positions": Kind({"targets": ["wpe", "wte"]}, base="gpt2"),
    "learned positions of OPT": Kind({"targets": ["embed_positions"]}, "this kind of embedding", base="opt"),
    "tied adapters": Kind(
        {"targets": ["embed_tokens"], "ensure_weight_tying": True}, "ensure_weight_tying is True", options=TIED
    ),
    "bias of LoRA layers": Kind({"targets": ["c_attn"], "bias": "lora_only"}, "bias is 'lora_only'", base="gpt2"),
    "all biases": Kind({"targets": ["c_attn"], "bias": "all"}, "bias is 'all'", base="gpt2"),
    "lora_bias": Kind({"targets": ["c_attn"], "lora_bias": True}, base="gpt2"),
    "lora_bias and rsLoRA": Kind({"targets": QV, "lora_bias": True, "use_rslora": True}, base="qwen2"),
    "lora_bias on layers without": Kind({"targets": ["q_proj", "down_proj", "lm_head"], "lora_bias": True}),
    "modules_to_save": Kind({"targets": QV, "modules_to_save": ["lm_head"]}, "whole modules saved beside"),
    "a norm to save": Kind({"targets": QV, "modules_to_save": ["norm"]}, "whole modules saved beside"),
    "DoRA": Kind({"targets": QV, "use_dora": True}, "DoRA adapters are not served"),
    "tokens": Kind({"targets": QV, "trainable_token_indices": [5, 6]}, "trained token embeddings are not served"),
    "replicated layers": Kind(
        {"targets": QV, "layer_replication": [[0, 2], [1, 2]]}, "replicated layers are not served"
    ),
    "experts": Kind(
        {"targets": ATTENTION, "target_parameters": ["mlp.experts.down_proj"]},
        "LoRA on bare parameters is not served",
        base="qwen3_moe",
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by family and options, each made once."""
    made: dict[str, Path] = {}

    def base(family: str, options: dict[str, Any]) -> Path:
        key = f"{family}{options}"
        made[key] = made.get(key) or make_base(tmp_path_factory.mktemp("base"), family, **options)
        return made[key]

    return base


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")  # peft's advice to who makes such adapters
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # gpt2's head, unlike its other layers
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but:peft.utils.warning.PeftWarning")  # merging is not
@pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape")  # it means the LoRA biases
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_kind_of_lora_is_right_or_refused(tmp_path, bases, kind):
    """Beside the base and an ordinary adapter in one batch; each is held to peft with that adapter alone."""
    base = bases(kind.base, kind.options)
    folders = {
        "it": make_adapter(tmp_path / "it", base, **kind.lora),
        "other": make_adapter(tmp_path / "other", base, targets=TARGETS.get(kind.base, "all-linear"), seed=9),
    }
    engine = engine_for(base, {"other": folders["other"]}, max_rank=256)
    names = [None, "other"]
    if kind.refused:
        with pytest.raises(AdapterRefused, match=kind.refused):
            engine.add_adapter("it", folders["it"])
    else:
        engine.add_adapter("it", folders["it"])
        names.append("it")
    prompts, adapters = [p for p in PROMPTS[:2] for _ in names], names * 2
    answers = [answer.token_ids for answer in engine.generate(prompts, GREEDY, adapters)]
    alone = {name: PeftAlone(base, {name: folders[name]}) for name in names if name}
    alone[None] = alone["other"]
    for prompt, adapter, answer in zip(prompts, adapters, answers, strict=True):
        assert answer == alone[adapter].answer(engine.base.tokenizer(prompt).input_ids, adapter), adapter
    assert len(set(map(tuple, answers))) == len(answers), "all must answer differently, or this test proves nothing"


# Of a family: where ids and positions are looked up, and linear layers. Each base's head is tied to its embedding.
LOOKED_UP = {
    "llama": (["embed_tokens"], ["q_proj", "down_proj"]),
    "gemma2": (["embed_tokens"], ["q_proj", "down_proj"]),
    "gpt2": (["wte", "wpe"], ["c_attn", "c_proj"]),
    "bloom": (["word_embeddings"], ["query_key_value", "dense"]),
}


@pytest.fixture(scope="module", params=LOOKED_UP)
def peculiar(request, tmp_path_factory) -> Family:
    """Adapters that differ in what they adapt: embeddings, the head, both, linear layers with and without biases."""
    root, (looked_up, linear) = tmp_path_factory.mktemp(request.param), LOOKED_UP[request.param]
    base = make_base(root / "base", request.param, **(TIED if request.param == "llama" else {}))
    adapters = {
        "ids": make_adapter(root / "ids", base, targets=looked_up, seed=1),
        "ids and head": make_adapter(root / "both", base, rank=7, targets=[*looked_up, "lm_head"], seed=2),
        "ids and layers": make_adapter(
            root / "more", base, rank=2, targets=[*looked_up, *linear], seed=3, lora_alpha=9
        ),
        "biases": make_adapter(root / "biases", base, targets=linear, seed=4, lora_bias=True),
        "layers": make_adapter(root / "layers", base, rank=3, targets=linear, seed=5, use_rslora=True),
    }
    return Family(request.param, base, adapters, PeftAlone(base, adapters))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but:peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize(
    "config", [{}, {"step_tokens": 9, "page_tokens": 3}, {"max_loras": 2}, {"paged": False}], ids=str
)
def test_embeddings_heads_and_biases_share_steps(peculiar, config):
    engine = engine_for(peculiar.folder, peculiar.adapters, **config)
    steps, route = [], engine.device.route
    engine.device.route = lambda batch: steps.append(len(batch.adapters)) or route(batch)
    prompts, adapters = peculiar.asked
    answers = [answer.token_ids for answer in engine.generate(prompts, GREEDY, adapters)]
    assert answers == peculiar.alone.answers(prompts, adapters, engine.base.tokenizer)
    assert (max(steps) > 1) == config.get("paged", True)
    assert len({tuple(map(tuple, answers[i::6])) for i in range(6)}) == 6


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True")
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but:peft.utils.warning.PeftWarning")
@pytest.mark.filterwarnings("ignore:Adapter .* LoRA tensor.s. have invalid shape")
def test_embeddings_heads_and_biases_beside_the_kernels(tmp_path, bases):
    """In bfloat16, with kernels where the machine has them: these go through peft's modules, the plain ones do not.

    Held to peft as the 4-bit logits are; see test_quantized_logits_of_a_mixed_step_are_those_of_peft.
    """
    base_folder = bases("llama", {"hidden_size": 128, "num_attention_heads": 2, **TIED})
    several = {"ids": ["embed_tokens", "lm_head"], "biases": ["q_proj", "down_proj"], "plain": "all-linear"}
    folders = {
        key: make_adapter(tmp_path / key, base_folder, targets=targets, seed=i, strength=1, lora_bias=key == "biases")
        for i, (key, targets) in enumerate(several.items(), 1)
    }
    load = {"quantization": "none", "device": "cpu", "dtype": "bfloat16"}
    engine = Engine(load_base(str(base_folder), **load))
    for key, folder in folders.items():
        engine.add_adapter(key, folder)
    engine.generate(PROMPTS[:3], SamplingParams(max_tokens=1, temperature=0), list(folders))  # all on the device now
    seen, adapters = watch_logits(engine), [None, *folders]
    engine.generate([PROMPTS[3]] * 4, SamplingParams(max_tokens=3, temperature=0, logit_bias={0: -100}), adapters)
    assert {adapter for _, adapter, _ in seen} == set(adapters)
    alone = PeftAlone(base_folder, folders, load_base(str(base_folder), **load).model)
    for ids, adapter, logits in seen:
        expected = alone.logits(ids, adapter).float()
        torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.05 * float(expected.abs().max()))
        for other in {*adapters} - {adapter}:
            assert float((logits - alone.logits(ids, other)).abs().max()) > 0.1 * float(expected.abs().max())


def test_an_adapter_of_single_experts_is_refused_whole(tmp_path, bases):
    """As made when every expert was a module of its own; in the model they are one tensor, which LoRA cannot wrap."""
    base = bases("mixtral", {})
    folder = make_adapter(tmp_path / "it", base, targets=["q_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "w1"]}))
    tensors = load_file(folder / "adapter_model.safetensors")
    for expert in (f"layers.{layer}.block_sparse_moe.experts.{number}" for layer in range(2) for number in range(4)):
        tensors[f"base_model.model.model.{expert}.w1.lora_A.weight"] = torch.ones(4, 64)
        tensors[f"base_model.model.model.{expert}.w1.lora_B.weight"] = torch.ones(128, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    engine = engine_for(base, {})
    before = engine.generate(PROMPTS, GREEDY)
    with pytest.raises(AdapterRefused, match=r"experts\.0\.w1.*experts are one tensor"):
        engine.add_adapter("it", folder)
        engine.generate(PROMPTS, GREEDY, "it")
    assert engine.generate(PROMPTS, GREEDY) == before


@pytest.mark.parametrize("slots", [2, 4])
def test_ranks_from_1_to_256_share_a_batch(tmp_path, base_folder, slots):
    folders = {
        "1": make_adapter(tmp_path / "1", base_folder, rank=1, seed=1, lora_alpha=16),
        "7": make_adapter(tmp_path / "7", base_folder, rank=7, seed=2, targets=["q_proj", "gate_proj", "lm_head"]),
        "64": make_adapter(
            tmp_path / "64", base_folder, rank=64, seed=3, targets=["o_proj", "up_proj"], use_rslora=True
        ),
        "256": make_adapter(tmp_path / "256", base_folder, rank=256, seed=4, targets=r".*\.1\..*_proj"),
    }
    engine = engine_for(base_folder, folders, max_rank=256, max_loras=slots)
    prompts, adapters = [p for p in PROMPTS for _ in range(5)], [None, *folders] * 4
    answers = [answer.token_ids for answer in engine.generate(prompts, GREEDY, adapters)]
    assert answers == PeftAlone(base_folder, folders).answers(prompts, adapters, engine.base.tokenizer)
    assert len({tuple(map(tuple, answers[i::5])) for i in range(5)}) == 5


@pytest.mark.parametrize("kernels", [True, False])
def test_nf4_rows_in_a_batch_equal_each_alone(base_folder, adapter_folders, kernels):
    """In 4 bits the numbers depend on the kernel, so the reference is the engine itself, one request at a time; and
    lean, since bitsandbytes' kernel otherwise depends on how many rows share a step. Ours does not."""
    base = load_base(str(base_folder), quantization="nf4", device="cpu")
    engine = Engine(base, EngineConfig(kernels=kernels, lean=True))
    for name, folder in adapter_folders.items():
        engine.add_adapter(name, folder)
    adapters = [None, "red", "green", "blue"]
    together = engine.generate([PROMPTS[0]] * 4, GREEDY, adapters)
    alone = [engine.generate([PROMPTS[0]], GREEDY, adapter)[0] for adapter in adapters]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert len({tuple(a.token_ids) for a in together}) == 4


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.02), ("bfloat16", 0.05)])
@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama", "nf4"),
        ("gemma2", "nf4"),
        ("gpt2", "nf4"),
        ("bloom", "nf4"),
        ("llama", "fp4"),
        ("llama", "int8"),
        ("bloom", "int8"),
    ],
)
def test_quantized_logits_of_a_mixed_step_are_those_of_peft(tmp_path, name, quantization, dtype, tolerance):
    """Adapters as peft draws them: stronger ones turn a rounding into another answer, in peft as here.

    The tolerance is the share of the largest logit that 8 bits of mantissa come to over 2 layers; the fused 4-bit
    kernel computes in bfloat16 whatever the model does. gpt2's Conv1D layers are quantized as linear ones.
    """
    base_folder = make_base(tmp_path / "base", name)
    folders = {
        key: make_adapter(tmp_path / key, base_folder, seed=seed, strength=1, lora_alpha=4)
        for seed, key in enumerate(["one", "two"], 1)
    }
    load = {"quantization": quantization, "device": "cpu", "dtype": dtype}
    engine = Engine(load_base(str(base_folder), **load))
    for key, folder in folders.items():
        engine.add_adapter(key, folder)
    engine.generate(
        PROMPTS[:2], SamplingParams(max_tokens=1, temperature=0), list(folders)
    )  # both are on the device now
    seen = watch_logits(engine)
    for i, (prompt, key) in enumerate([(prompt, key) for prompt in PROMPTS for key in (None, *folders)]):
        ids = engine.base.tokenizer(prompt).input_ids
        engine.add(Request(f"{i}", ids, SamplingParams(max_tokens=3, temperature=0, logit_bias={0: -100}), key))
    while engine.has_work:
        engine.step()
    assert len(seen) == 12 * 3, "whole prompts, then two steps of single tokens"
    alone = PeftAlone(base_folder, folders, load_base(str(base_folder), **load).model)
    others: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for ids, adapter, logits in seen:
        expected = alone.logits(ids, adapter)  # of the tokens the engine chose, as these may be close to others
        atol = tolerance * float(expected.abs().max())
        torch.testing.assert_close(logits.float(), expected.float(), rtol=0, atol=atol)
        of_prompt = others.setdefault(tuple(ids), [])
        assert all(float((logits - other).abs().max()) > 2 * atol for other in of_prompt), "nothing is proved"
        of_prompt.append(logits)


def test_a_seed_gives_the_same_sample_in_any_company(base_folder, adapter_folders):
    engine = engine_for(base_folder, adapter_folders)
    sampled = SamplingParams(max_tokens=16, temperature=1.5, top_p=0.9, seed=7)
    alone = engine.generate([PROMPTS[0]], sampled, "red")[0]
    crowd = engine.generate([PROMPTS[0]] * 3 + PROMPTS, sampled, ["green", "red", None, "red", "blue", None, "red"])
    assert crowd[1].token_ids == alone.token_ids
    assert crowd[0].token_ids != alone.token_ids
    other = engine.generate([PROMPTS[0]], SamplingParams(max_tokens=16, temperature=1.5, top_p=0.9, seed=8), "red")[0]
    assert other.token_ids != alone.token_ids
