"""The methods beside LoRA: each trains, saves, gives through peft alone what it gave in training, and is not served."""

from pathlib import Path
from typing import Any

import pytest
from bases import assert_measured, heldout_examples, loss_of, make_base, reloaded
from oracle import engine_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loraplex_registry.errors import InvalidAdapter
from loraplex_registry.registry import Registry
from loraplex_server.engine.errors import AdapterRefused
from loraplex_trainer.run_file import load_config

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("IA3", {"method": "ia3"}),
    "ia3-named": (
        "IA3",
        {"method": "ia3", "ia3": {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}},
    ),
    "prompt": ("PROMPT_TUNING", {"method": "prompt", "prompt": {"virtual_tokens": 5}}),
    "prompt-text": ("PROMPT_TUNING", {"method": "prompt", "prompt": {"init": "text", "text": "river stone"}}),
    "prompt-random": ("PROMPT_TUNING", {"method": "prompt", "prompt": {"init": "random"}}),
    "prefix": ("PREFIX_TUNING", {"method": "prefix", "prompt": {"virtual_tokens": 5}}),
    "prefix-projection": ("PREFIX_TUNING", {"method": "prefix", "prompt": {"projection": True, "hidden_size": 32}}),
    "p_tuning": ("P_TUNING", {"method": "p_tuning", "prompt": {"virtual_tokens": 5, "hidden_size": 32}}),
    "p_tuning-lstm": ("P_TUNING", {"method": "p_tuning", "prompt": {"encoder": "lstm"}}),
}
STEPS = {"max_steps": 5, "batch_size": 48, "warmup_ratio": 0.0, "log_every_steps": 1}  # all examples in each step


def run_of(write_run: Any, changes: dict[str, Any], **more: Any) -> Path:
    return write_run(**({"lora": {}, "training": STEPS} | changes | more))


QUICK = {"ia3", "prompt", "prefix", "p_tuning"}  # the others take half a minute


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_each_method_trains_with_its_own_rate_and_peft_alone_gives_the_same_loss(
    write_run, train, receipt, tmp_path, base_folder, kind
):
    run = run_of(write_run, KINDS[kind][1])
    result = train(run, "evaluation.metric=tag_f1", "evaluation.max_tokens=4")
    losses = receipt()["losses"]
    assert losses["train_last"] < losses["train_first"]
    assert receipt()["config"]["training"]["learning_rate"] != 1e-3
    alone = AutoModelForCausalLM.from_pretrained(base_folder)
    assert_measured(receipt(), "tag_f1", loss_of(alone, heldout_examples(run)))
    assert "registry push" not in result.stdout and "peft" in result.stdout
    model = reloaded(base_folder, tmp_path / "adapters/tagger")
    assert loss_of(model, heldout_examples(run)) == pytest.approx(losses["heldout"], abs=5e-5)


@pytest.mark.parametrize(
    "kind", ["ia3", "prompt", *(pytest.param(k, marks=pytest.mark.slow) for k in ("prefix", "p_tuning"))]
)
def test_registry_and_engine_refuse_it_and_say_what_it_is(write_run, train, tmp_path, base_folder, kind):
    name, changes = KINDS[kind]
    train(run_of(write_run, changes))
    folder = tmp_path / "adapters/tagger"
    with pytest.raises(InvalidAdapter, match=f"peft_type is '{name}'; only LORA"):
        Registry(tmp_path / "registry").push("tagger", folder)
    with pytest.raises(AdapterRefused, match=f"peft_type is '{name}'; only LORA"):
        engine_for(base_folder, {"it": folder})


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(QUICK))
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_each_method_trains_on_a_quantized_base(write_run, train, receipt, kind, quantization):
    train(run_of(write_run, KINDS[kind][1], base__quantization=quantization, base__dtype="bfloat16"))
    assert receipt()["losses"]["train_last"] < receipt()["losses"]["train_first"]


def test_ia3_trains_with_its_own_defaults_and_is_scored_as_it_was_trained(write_run, train, receipt, base_folder):
    """peft's layers give float32 on a quantized base, and a 16-bit one's attention failed at the first step."""
    losses = {}
    for dtype in ("auto", "float16", "float32"):
        base = {"model": str(base_folder), "device": "cpu", "dtype": dtype}
        train(run_of(write_run, {"method": "ia3"}, name=dtype, base=base, training=STEPS | {"max_steps": 40}))
        written = receipt(dtype)
        half = "bfloat16" if dtype == "auto" else dtype
        assert written["base"]["quantization"] == f"nf4+double:{half}" and written["not_served"]
        losses[dtype] = written["losses"]
        assert written["metrics"]["heldout_loss"] == pytest.approx(losses[dtype]["heldout"], abs=5e-3)
        assert losses[dtype]["train_last"] < losses[dtype]["train_first"] - 0.02
        assert losses[dtype]["train_last"] == pytest.approx(losses["auto"]["train_last"], abs=5e-3)


def test_two_identical_runs_write_the_same_bytes(write_run, train, tmp_path):
    for name in ("one", "two"):
        train(run_of(write_run, KINDS["prompt"][1], name=name))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (tmp_path / "adapters" / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_only_vectors_are_saved(write_run, train, tmp_path):
    saved = {}
    for kind in ("prompt", "prefix", "p_tuning"):
        train(run_of(write_run, KINDS[kind][1], name=kind))
        tensors = load_file(tmp_path / "adapters" / kind / "adapter_model.safetensors")
        saved[kind] = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layers, heads, width = 2, 2, 16
    assert saved == {
        "prompt": {"prompt_embeddings": (5, 64)},
        "prefix": {"prompt_embeddings": (5, 2 * layers * heads * width)},
        "p_tuning": {"prompt_embeddings": (5, 64)},
    }


def test_a_rate_that_is_given_wins_over_the_method_s(write_run):
    run = run_of(write_run, {"method": "ia3"})
    assert load_config(run, ["training.learning_rate=2e-4"]).training.learning_rate == 2e-4
    assert load_config(run).training.learning_rate > load_config(write_run(training={})).training.learning_rate


def test_ia3_on_an_architecture_that_peft_does_not_know_asks_for_names(write_run, train, base_folder, tmp_path):
    base = make_base(tmp_path / "stablelm", base_folder, "stablelm")
    run = run_of(write_run, {"method": "ia3"}, base__model=str(base))
    message = train(run, exit_code=2).stderr
    assert "ia3.target_modules" in message and "'stablelm'" in message and "k_proj" in message
    train(run, "ia3={target_modules: [k_proj, v_proj, down_proj], feedforward_modules: [down_proj]}")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "lora2"}, ["method", '"lora2"', "'ia3'"]),
        ({"method": "ia3", "lora": {"rank": 4}}, ["lora.rank", "method 'ia3'"]),
        ({"method": "lora", "prompt": {"virtual_tokens": 4}}, ["prompt.virtual_tokens", "method 'lora'"]),
        ({"method": "ia3", "ia3": {"target_modules": ["w1"]}}, ["ia3.target_modules", "'w1'", "k_proj"]),
        ({"method": "ia3", "ia3": {"feedforward_modules": ["up_proj"]}}, ["ia3.feedforward_modules", "'up_proj'"]),
        ({"method": "prompt", "prompt": {"text": "x"}}, ["prompt.text", "prompt.init"]),
        ({"method": "prompt", "prompt": {"init": "text"}}, ["prompt.text", "prompt.init"]),
        ({"method": "prefix", "prompt": {"init": "random"}}, ["prompt.init", "'prefix'"]),
        ({"method": "p_tuning", "prompt": {"projection": True}}, ["prompt.projection", "'p_tuning'"]),
        ({"method": "prefix", "prompt": {"hidden_size": 8}}, ["prompt.hidden_size", "prompt.projection"]),
        ({"method": "prompt", "prompt": {"encoder": "lstm"}}, ["prompt.encoder", "'prompt'"]),
        ({"method": "prompt", "data__packing": True}, ["data.packing", "'prompt'"]),
        ({"method": "ia3", "push": {"every": "save"}}, ["push.every", "LoRA"]),
        ({"method": "prompt", "continue_from": "other"}, ["continue_from", "'prompt'"]),
    ],
    ids=str,
)
def test_options_of_another_method_are_refused(write_run, train, changes, words):
    message = train(run_of(write_run, changes), exit_code=2).stderr
    assert message.count("\n") == 1 and all(word in message for word in words), message
