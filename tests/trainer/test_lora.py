"""LoRA with every switch: each trains, saves, and gives through peft alone what it gave in training.

Then either the engine serves it as peft has it, or registry and engine refuse it and say why.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import assert_measured, heldout_examples, loss_of, make_base, reloaded
from oracle import PeftAlone, engine_for
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.registry import Registry
from loraplex_server.engine.errors import AdapterRefused
from loraplex_server.engine.model import load_base
from loraplex_server.engine.request import SamplingParams
from loraplex_trainer import session
from loraplex_trainer.adapter import attach, keep_quantized_layout
from loraplex_trainer.initial import lora_layers
from loraplex_trainer.run_file import load_config

GREEDY = SamplingParams(max_tokens=12, temperature=0)
SERVED: dict[str, dict[str, Any]] = {
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6}, "alpha_pattern": {"v_proj": 32}},
    "rslora": {"rslora": True},
    "dropout": {"dropout": 0.3},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa"},
    "pissa-rslora-patterns": {
        "init": "pissa",
        "rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 3},
    },
    "pissa-dropout": {"init": "pissa", "dropout": 0.3},
    "olora": {"init": "olora"},
    "plus": {"plus_ratio": 8.0},
    "layers": {"layers_to_transform": [1]},
    "layers-of-named": {"layers_to_transform": [0], "target_modules": ["q_proj", "down_proj"]},
    "exclude": {"exclude_modules": ["down_proj", "layers.0.self_attn.q_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"dora": True}, "DoRA"),
    "dora-orthogonal": ({"dora": True, "init": "orthogonal"}, "DoRA"),
    "whole-head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "whole-norms": ({"modules_to_save": ["input_layernorm"], "target_modules": ["q_proj"]}, "modules_to_save"),
    "tokens": ({"trainable_token_indices": [5, 6, 300]}, "trainable_token_indices"),
    "tokens-and-head": ({"trainable_token_indices": [5], "target_modules": ["lm_head"]}, "trainable_token_indices"),
}
QUICK = {"patterns", "orthogonal", "pissa-rslora", "layers", "dora", "whole-head", "tokens"}  # the others take a minute
ALL = SERVED | {name: lora for name, (lora, _) in REFUSED.items()}


def run_of(write_run: Any, lora: dict[str, Any], **changes: Any) -> Path:
    return write_run(lora={"rank": 4, "alpha": 8} | lora, **changes)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_each_switch_trains_and_gives_through_peft_alone_what_it_gave(
    write_run, train, receipt, tmp_path, base_folder, name
):
    run = run_of(write_run, ALL[name])
    result = train(run)
    losses, folder = receipt()["losses"], tmp_path / "adapters/tagger"
    assert losses["train_last"] < losses["train_first"] - 0.02
    model = reloaded(base_folder, folder)
    assert loss_of(model, heldout_examples(run)) == pytest.approx(losses["heldout"], abs=2e-5)
    assert ("registry push" in result.stdout) == (name in SERVED)
    if name in SERVED:
        assert Registry(tmp_path / "registry").push("tagger", folder).number == 1
        assert_served_as_by_peft(base_folder, folder)
    else:
        with pytest.raises(InvalidAdapter, match=REFUSED[name][1]):
            Registry(tmp_path / "registry").push("tagger", folder)
        with pytest.raises(AdapterRefused, match=REFUSED[name][1]):
            engine_for(base_folder, {"it": folder})


def assert_served_as_by_peft(base_folder: Path, folder: Path) -> None:
    """Every token the engine chose is the one that peft alone would have chosen there."""
    engine, alone = engine_for(base_folder, {"it": folder}), PeftAlone(base_folder, {"it": folder})
    prompts = ["river stone ->:", "a lantern in the harbor"]
    for adapter in ("it", None):
        for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY, adapter), strict=True):
            ids = engine.base.tokenizer(prompt).input_ids
            assert not torch.equal(alone.logits(ids, "it"), alone.logits(ids, None)), "nothing is proved"
            for token in answer.token_ids:
                assert token == int(alone.logits(ids, adapter).argmax())
                ids.append(token)


@pytest.mark.parametrize(
    "lora", [{"dora": True}, pytest.param({"modules_to_save": ["lm_head"]}, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_the_engine_refuses_is_scored_through_transformers(write_run, train, receipt, tmp_path, lora, dtype):
    run = run_of(write_run, lora, base__dtype=dtype)
    train(run, "evaluation={metric: exact_match, general: default, samples: 2, goldens: 2}")
    alone = AutoModelForCausalLM.from_pretrained(load_config(run).base.model, dtype=getattr(torch, dtype))
    assert_measured(receipt(), "exact_match", loss_of(alone, heldout_examples(run)) if dtype == "float32" else None)
    card = (tmp_path / "adapters/tagger/README.md").read_text()
    assert "Not served, and so scored by peft" in card


@pytest.mark.parametrize("bias", ["all", pytest.param("lora_only", marks=pytest.mark.slow)])
def test_biases_of_the_base_are_trained_saved_and_refused_by_the_engine(
    write_run, train, receipt, tmp_path, base_folder, bias
):
    base = make_base(tmp_path / "qwen2", base_folder, "qwen2")
    run = run_of(write_run, {"bias": bias, "target_modules": ["q_proj"]}, base__model=str(base))
    train(run)
    alone = loss_of(AutoModelForCausalLM.from_pretrained(base), heldout_examples(run))
    assert receipt()["metrics"]["base_heldout_loss"] == pytest.approx(alone, abs=5e-5)
    folder = tmp_path / "adapters/tagger"
    biases = {key for key in load_file(folder / "adapter_model.safetensors") if key.endswith(".bias")}
    assert len(biases) == 2 * (3 if bias == "all" else 1) and any(".q_proj." in key for key in biases)
    assert loss_of(reloaded(base, folder), heldout_examples(run)) == pytest.approx(
        receipt()["losses"]["heldout"], abs=2e-5
    )
    with pytest.raises(AdapterRefused, match="bias"):
        engine_for(base, {"it": folder})


def test_biases_in_16_bits_are_not_trained(write_run, train):
    message = train(run_of(write_run, {"bias": "all"}, base__dtype="bfloat16"), exit_code=2).stderr
    assert "lora.bias" in message and "bfloat16" in message and "base.dtype" in message


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize(
    "lora", [{"init": "pissa"}, {"init": "olora"}, {"init": "loftq"}, {"init": "orthogonal"}, {"dora": True}], ids=str
)
def test_starts_on_a_quantized_base_work_on_that_base_as_everybody_has_it(
    write_run, train, receipt, tmp_path, lora, quantization
):
    """peft writes the remainder over the base and quantizes it anew, or refuses: the adapter then needs that base."""
    run = run_of(write_run, lora, base__quantization=quantization)
    train(run)
    losses = receipt()["losses"]
    assert losses["train_last"] < losses["train_first"] - 0.1
    base = load_base(**load_config(run).base.load_options)
    keep_quantized_layout(base.model)
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "adapters/tagger"))
    assert loss_of(model, heldout_examples(run)) == pytest.approx(losses["heldout"], abs=2e-4)
    saved = json.loads((tmp_path / "adapters/tagger/adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True
    assert (saved["r"], saved["lora_alpha"]) == ((8, 16) if lora.get("init") in ("pissa", "olora") else (4, 8))


@pytest.fixture(scope="module")
def wide_base(base_folder, tmp_path_factory) -> Path:
    """With weights of a rank that some servers, or none, take."""
    return make_base(tmp_path_factory.mktemp("wide") / "base", base_folder, "qwen2", hidden_size=264)


@pytest.mark.parametrize(
    ("lora", "saved"), [({"rank": 33, "init": "pissa"}, 66), ({"rank": 4, "rank_pattern": {"q_proj": 65}}, 65)], ids=str
)
def test_a_rank_above_the_servers_default_is_told_with_what_to_do(write_run, train, wide_base, lora, saved):
    """PiSSA's rank 64 became 128 in the registry, which a server refused, and the run had said: push it."""
    named = {"target_modules": ["q_proj"]}
    run = run_of(write_run, lora | named, base__model=str(wide_base))
    hint = f"its rank is {saved} as it is saved: serve it with --max-rank {saved}"
    assert hint in train(run, "--check", "--no-timing").stdout
    assert f"registry push tagger; {hint}" in train(run).stdout
    lower = run_of(write_run, {"rank": 32, "init": lora.get("init", "default")} | named)
    assert "--max-rank" not in train(lower, "--check", "--no-timing").stdout


def test_a_rank_that_no_server_takes_is_scored_by_peft_and_told(write_run, train, receipt, wide_base):
    run = run_of(write_run, {"rank": 257, "target_modules": ["q_proj"]}, base__model=str(wide_base))
    told = train(run).stdout
    assert "scored by peft" in told and "use it with peft" in told and "registry push" not in told
    assert "rank r is 257, expected a whole number from 1 to 256" in receipt()["not_served"]
    assert receipt()["metrics"]["heldout_loss"] == pytest.approx(receipt()["losses"]["heldout"], abs=5e-5)
    assert "ranks up to 256" in train(run, "push.every=end", exit_code=2).stderr


def test_pissa_begins_with_the_largest_singular_values_and_changes_nothing(write_run, base_folder):
    """Against peft's own start, on a base in float32, where peft can."""
    config = load_config(run_of(write_run, {"init": "pissa"}))
    base = load_base(**config.base.load_options)
    ids = torch.tensor([[5, 60, 7]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        ours = attach(base, config)
        torch.testing.assert_close(ours(input_ids=ids).logits, before, rtol=0, atol=1e-5)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights="pissa"),
    )
    expected = dict(lora_layers(theirs))
    for path, layer in lora_layers(ours):
        products = [one.lora_B["default"].weight @ one.lora_A["default"].weight for one in (layer, expected[path])]
        torch.testing.assert_close(*products, rtol=0, atol=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_loftq_begins_nearer_to_the_weights_that_were_quantized(write_run, base_folder, quantization):
    config = load_config(run_of(write_run, {"init": "loftq", "rank": 16}, base__quantization=quantization))
    base = load_base(**config.base.load_options)
    model = attach(base, config)
    whole = load_file(base_folder / "model.safetensors")
    for path, layer in lora_layers(model):
        eye = torch.eye(layer.in_features)
        with torch.no_grad():
            now, without = layer(eye).T, layer.base_layer(eye).T
        true = whole[f"{path}.weight"]
        assert (true - now).norm() < 0.8 * (true - without).norm(), path


def test_lora_plus_lets_b_learn_faster(write_run, train, tmp_path):
    """AdamW's first step is the rate itself: of B alone, since A's gradient is zero while B is."""
    steps = {"max_steps": 1, "batch_size": 8, "learning_rate": 1e-3, "warmup_ratio": 0.0, "schedule": "constant"}
    for name, ratio in (("plain", 1.0), ("plus", 16.0)):
        train(run_of(write_run, {"plus_ratio": ratio}, name=name, training=steps))
    plain, plus = (load_file(tmp_path / "adapters" / name / "adapter_model.safetensors") for name in ("plain", "plus"))
    for key, tensor in plain.items():
        torch.testing.assert_close(plus[key], tensor * (16 if ".lora_B." in key else 1), rtol=1e-3, atol=1e-7)
    largest = max(float(tensor.abs().max()) for key, tensor in plain.items() if ".lora_B." in key)
    assert largest == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("lora", [{"plus_ratio": 4.0, "init": "pissa", "dropout": 0.2}, {"dora": True}], ids=str)
def test_an_interrupted_run_goes_on_with_the_same_weights(write_run, train, tmp_path, lora):
    steps = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "save_every": 3, "log_every_steps": 1}
    train(run_of(write_run, lora, name="whole", training=steps))
    run = run_of(write_run, lora, name="parts", training=steps)
    state = tmp_path / "adapters/parts/.checkpoint"
    save = session.save_checkpoint

    def save_and_stop(folder, progress, *rest):
        save(folder, progress, *rest)
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "save_checkpoint", save_and_stop)
        train(run, exit_code=130)
    assert state.is_dir()
    train(run, "--resume")
    whole, parts = (
        load_file(tmp_path / "adapters" / name / "adapter_model.safetensors") for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"rank_pattern": {"qproj": 2}}, ["lora.rank_pattern", "'qproj'", "q_proj"]),
        ({"rank_pattern": {"q_proj(": 2}}, ["lora.rank_pattern", "not a pattern"]),
        ({"rank_pattern": {"q_proj": 0}}, ["lora.rank_pattern", "0", "greater than 0"]),
        ({"alpha_pattern": {"lm_head": 2}}, ["lora.alpha_pattern", "'lm_head'"]),
        ({"layers_to_transform": [1, 2]}, ["lora.layers_to_transform", "2"]),
        ({"exclude_modules": ["w1"]}, ["lora.exclude_modules", "'w1'", "q_proj"]),
        ({"exclude_modules": ["q_proj"], "target_modules": ["q_proj"]}, ["lora", "excluded"]),
        ({"modules_to_save": ["head"]}, ["lora.modules_to_save", "'head'"]),
        ({"trainable_token_indices": [5000]}, ["lora.trainable_token_indices", "5000"]),
        ({"rank": 65}, ["lora.rank: 65", "at most 64"]),
        ({"rank_pattern": {"q_proj": 65}}, ["lora.rank_pattern.q_proj: 65", "at most 64"]),
        ({"init": "pissa", "rank": 64}, ["lora.rank", "64", "pissa", "32", "k_proj"]),
        ({"init": "pissa", "dora": True}, ["lora.dora", "'pissa'"]),
        ({"init": "loftq"}, ["lora.init", "'loftq'", "'none'"]),
        ({"init": "orthogonal", "rank": 3}, ["lora.init", "even", "3"]),
        ({"init": "eva"}, ["lora.init", '"eva"', "'pissa'"]),
        ({"plus_ratio": 0.5}, ["lora.plus_ratio", "0.5"]),
    ],
    ids=str,
)
def test_what_a_base_has_not_or_options_exclude_is_refused(write_run, train, lora, words):
    """Before a run as in it."""
    run = run_of(write_run, lora)
    for options in ([], ["--check", "--no-timing"]):
        message = train(run, *options, exit_code=2).stderr
        assert message.count("\n") == 1 and all(word in message for word in words), message


def test_a_quantized_module_is_not_trained_whole(write_run, train):
    message = train(run_of(write_run, {"modules_to_save": ["mlp"]}, base__quantization="nf4"), exit_code=2).stderr
    assert "lora.modules_to_save" in message and "quantized" in message


def test_a_whole_module_of_a_16_bit_base_is_trained_in_float32(write_run, train, receipt, tmp_path):
    run = run_of(write_run, {"modules_to_save": ["lm_head", "norm", "embed_tokens"]}, base__dtype="bfloat16")
    train(run)
    tensors = load_file(tmp_path / "adapters/tagger/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert receipt()["losses"]["train_last"] < receipt()["losses"]["train_first"] - 0.2
    rounded = [key for key, tensor in tensors.items() if torch.equal(tensor, tensor.bfloat16().float())]
    assert not any("lm_head" in key or "norm" in key for key in rounded)


class TestContinuing:
    @pytest.fixture
    def parent(self, write_run, train, tmp_path) -> Path:
        lora = {"alpha_pattern": {"q_proj": 4}}
        train(run_of(write_run, lora, name="first"))
        return tmp_path / "adapters/first"

    def test_the_same_options_go_on(self, parent, write_run, train, receipt):
        train(run_of(write_run, {"alpha_pattern": {"q_proj": 4}}, continue_from=str(parent)))
        assert receipt()["losses"]["train_first"] < receipt("first")["losses"]["train_first"] - 0.1

    @pytest.mark.parametrize(
        ("lora", "words"),
        [
            ({}, ["lora.alpha_pattern"]),
            ({"rslora": True}, ["lora.rslora", "True", "False"]),
            ({"dora": True}, ["lora.dora", "True", "False"]),
            ({"alpha_pattern": {"q_proj": 4}, "modules_to_save": ["lm_head"]}, ["lora.modules_to_save"]),
            ({"init": "pissa"}, ["lora.init", "'pissa'", "continue_from"]),
            ({"alpha_pattern": {"q_proj": 4}, "layers_to_transform": [0]}, ["lora.target_modules"]),
        ],
        ids=str,
    )
    def test_other_options_are_refused(self, parent, write_run, train, lora, words):
        message = train(run_of(write_run, lora, continue_from=str(parent)), exit_code=2).stderr
        assert all(word in message for word in words), message

    def test_a_pissa_run_is_gone_on_from_at_twice_its_rank(self, write_run, train, receipt, tmp_path):
        train(run_of(write_run, {"init": "pissa"}, name="first"))
        parent = str(tmp_path / "adapters/first")
        train(
            write_run(lora={"rank": 8, "alpha": 16}, continue_from=parent, training={"max_steps": 1, "batch_size": 48})
        )
        assert receipt()["losses"]["train_first"] < receipt("first")["losses"]["train_first"] - 0.1
        assert receipt()["parent"]["name"] == "first"


def test_plain_runs_hold_no_second_adapter(write_run):
    config = load_config(run_of(write_run, {}))
    model = attach(load_base(**config.base.load_options), config)
    assert list(model.peft_config) == ["default"]
