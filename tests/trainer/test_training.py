"""What a run computes: the loss it takes, the steps it makes, and what it leaves alone. All on a tiny real base."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraplex_registry.registry import Registry
from loraplex_server.engine.model import load_base
from loraplex_trainer.adapter import attach_adapter, load_weights, trainable_parameters
from loraplex_trainer.data import Example, encode_split, make_batch, read_split
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.loop import Loop, loss_sum, mean_loss
from loraplex_trainer.run_file import load_config
from loraplex_trainer.schedule import scheduled_rate

EOS = 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(one: Path, other: Path, tolerance: float):
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=tolerance)


@torch.no_grad()
def reference_loss(base_folder: Path, examples: list[Example]) -> float:
    """transformers' own loss, one unpadded example at a time: nats per answer token."""
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    total = 0.0
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = ids.clone()
        labels[0, : example.answer_start] = -100
        total += model(input_ids=ids, labels=labels).loss.item() * example.answer_tokens
    return total / sum(example.answer_tokens for example in examples)


def test_the_first_loss_is_the_base_models_loss_on_the_answers(write_run, train, receipt, base_folder, tmp_path):
    """A fresh adapter changes nothing: step 1 over all examples, padded, in 3 parts, gives transformers' loss."""
    path = write_run(training={"max_steps": 1, "batch_size": 16, "accumulation_steps": 3})
    train(path)
    config = load_config(path)
    encoder = encoder_for(load_base(**config.base.load_options), config.data)
    examples = encode_split(read_split(config.data.train, config.data), encoder).examples
    assert receipt()["losses"]["train_first"] == pytest.approx(reference_loss(base_folder, list(examples)), abs=1e-5)


def test_4_batches_of_4_are_1_batch_of_16(write_run, train, receipt, tmp_path):
    """The mean of micro-batch means weighs tokens by how few share their micro-batch (transformers#34191)."""
    steps = {"max_steps": 8, "learning_rate": 1e-2, "max_grad_norm": 0.5}
    losses = []
    for name, batch_size, accumulation_steps in (("whole", 16, 1), ("parts", 4, 4)):
        shape = {"batch_size": batch_size, "accumulation_steps": accumulation_steps}
        train(write_run(name=name, training=steps | shape))
        losses.append(receipt(name)["losses"])
    assert losses[0]["train_last"] < losses[0]["train_first"] - 0.2  # it did learn something to compare
    for key in ("train_first", "train_last", "heldout"):
        assert losses[0][key] == pytest.approx(losses[1][key], abs=1e-5)
    assert_same_weights(tmp_path / "adapters/whole", tmp_path / "adapters/parts", 1e-4)


def test_two_identical_runs_write_the_same_bytes(write_run, train, tmp_path, base_folder):
    """peft keeps target_modules in a set, whose order differs from process to process, and so did the file's sha256."""
    for name in ("one", "two"):
        train(write_run(name=name, lora={"rank": 4, "alpha": 8, "dropout": 0.1}, base__quantization="nf4"))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        one, two = (tmp_path / "adapters" / name / file for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    config = json.loads((tmp_path / "adapters/one/adapter_config.json").read_text())
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) > 1
    assert config["base_model_name_or_path"] == str(base_folder) and config["inference_mode"] is True


def test_the_adapter_is_float32_on_every_linear_module_but_the_head(write_run, train, tmp_path):
    train(write_run(base={"model": load_config(write_run()).base.model, "dtype": "bfloat16", "device": "cpu"}))
    tensors = weights(tmp_path / "adapters/tagger")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    modules = {key.rpartition(".lora_")[0].rpartition(".")[2] for key in tensors}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class TestFourBitBase:
    """bitsandbytes repacks a 4-bit weight for the CPU when used in eval mode; training must not meet that layout."""

    @pytest.fixture
    def loop(self, write_run, base_folder):
        config = load_config(write_run(base__quantization="nf4", base__dtype="bfloat16"))
        base = load_base(**config.base.load_options)
        split = read_split(config.data.train, config.data)
        examples = encode_split(split, encoder_for(base, config.data)).examples
        torch.manual_seed(0)
        return Loop(attach_adapter(base, config.lora), examples, config, pad_id=EOS)

    def steps(self, loop: Loop, count: int) -> list[float]:
        loop.total_steps = loop.step + count
        loop.run(lambda _: None)
        return loop.losses[-count:]

    def frozen_bytes(self, loop: Loop) -> dict[str, bytes]:
        state = loop.model.state_dict()
        trained = loop.parameters.keys()
        kept = {key: value for key, value in state.items() if key not in trained}
        return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in kept.items()}

    def test_the_base_is_the_same_to_the_byte_after_training_and_evaluation(self, loop):
        before = self.frozen_bytes(loop)
        assert any(key.endswith("weight.nested_absmax") for key in before)  # NF4 with double quantization
        for _ in range(2):
            self.steps(loop, 2)
            mean_loss(loop.model, loop.examples, 16, EOS)
        assert self.frozen_bytes(loop) == before

    def test_training_goes_on_after_an_evaluation_as_if_there_had_been_none(self, loop):
        fresh = {name: parameter.detach().clone() for name, parameter in loop.parameters.items()}
        mean_loss(loop.model, loop.examples, 16, EOS)
        evaluated = self.steps(loop, 3)
        mean_loss(loop.model, loop.examples, 16, EOS)
        evaluated += self.steps(loop, 3)
        again = Loop(loop.model, loop.examples, loop.config, pad_id=EOS)
        with torch.no_grad():
            for name, parameter in again.parameters.items():
                parameter.copy_(fresh[name])
        assert self.steps(again, 3) + self.steps(again, 3) == evaluated

    def test_the_loss_in_evaluation_is_the_loss_in_training(self, loop):
        """The repacked layout rounds the scales: what evaluation then measures is another model."""
        loop.model.train()
        with torch.no_grad():
            trained = loss_sum(loop.model, make_batch(loop.examples, EOS)).item()
        evaluated = mean_loss(loop.model, loop.examples, 48, EOS)
        assert evaluated == pytest.approx(trained / sum(e.answer_tokens for e in loop.examples), abs=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(write_run, train, tmp_path):
    train(write_run())
    finished = (tmp_path / "adapters/tagger/adapter_model.safetensors").read_bytes()
    path = write_run(training__save_every=1, training__warmup_ratio=1.0, training__max_steps=30)
    result = train(path, "training.learning_rate=1e36", exit_code=1)
    assert "error: the " in result.stderr and " at step " in result.stderr and "learning_rate" in result.stderr
    step = int(result.stderr.split(" at step ")[1].split(",")[0])
    progress = json.loads((tmp_path / "adapters/tagger/.checkpoint/progress.json").read_text())
    assert progress["step"] == step - 1 and all(map(math.isfinite, progress["losses"]))
    state = load_file(tmp_path / "adapters/tagger/.checkpoint/state.safetensors")
    assert all(tensor.isfinite().all() for key, tensor in state.items() if key.startswith("adapter/"))
    assert (tmp_path / "adapters/tagger/adapter_model.safetensors").read_bytes() == finished


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("linear", 0.0), ("constant", 1.0)])
def test_the_schedule_warms_up_and_comes_down(write_run, schedule, last):
    config = load_config(write_run(), [f"training.schedule={schedule}", "training.warmup_ratio=0.1"])
    rates = [scheduled_rate(step, 100, config.training) / config.training.learning_rate for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == pytest.approx(1.0) and rates[99] == pytest.approx(last, abs=0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_named_targets_alone_are_adapted_and_an_unknown_one_is_refused(write_run, train, tmp_path):
    train(write_run(), "lora.target_modules=[q_proj, v_proj]")
    assert all(".q_proj." in key or ".v_proj." in key for key in weights(tmp_path / "adapters/tagger"))
    result = train(write_run(), "lora.target_modules=[query_key_value]", exit_code=2)
    assert "'query_key_value'" in result.stderr and "q_proj" in result.stderr


def test_epochs_count_the_steps_unless_max_steps_does(write_run, train, receipt):
    train(write_run(training={"epochs": 1.5, "batch_size": 10}))
    assert receipt()["steps"] == math.ceil(1.5 * math.ceil(48 / 10))
    train(write_run(training={"epochs": 1.5, "max_steps": 2}))
    assert receipt()["steps"] == 2


class TestContinuing:
    @pytest.fixture
    def parent(self, write_run, train, tmp_path) -> Path:
        train(write_run(name="first", training={"max_steps": 20, "batch_size": 16, "learning_rate": 1e-2}))
        return tmp_path / "adapters/first"

    def test_it_starts_from_the_parents_loss(self, parent, write_run, train, receipt, tmp_path):
        train(write_run(name="second", continue_from=str(parent), training={"max_steps": 1, "batch_size": 48}))
        before, after = receipt("first")["losses"], receipt("second")["losses"]
        assert before["train_first"] - before["train_last"] > 0.5
        assert after["train_first"] == pytest.approx(before["train_last"], abs=0.2)
        pushed_later = Registry(tmp_path / "registry").push("first", parent)
        assert receipt("second")["parent"] == {"name": "first", "version": None, "digest": pushed_later.digest}

    def test_a_registry_version_is_the_recorded_parent(self, parent, write_run, train, receipt, tmp_path):
        registry = Registry(tmp_path / "registry")
        version = registry.push("first", parent)
        registry.promote("first:1", "production")
        run = {"continue_from": "first@production", "registry": str(tmp_path / "registry")}
        train(write_run(name="second", **run, training={"max_steps": 1, "batch_size": 48}))
        assert receipt("second")["parent"] == {"name": "first", "version": 1, "digest": version.digest}
        assert receipt("second")["losses"]["train_first"] < receipt("first")["losses"]["train_first"] - 0.5

    @pytest.mark.parametrize(
        ("override", "words"),
        [
            ("lora.rank=8", ["lora.rank", "8", "4"]),
            ("lora.alpha=9", ["lora.alpha", "9", "8"]),
            ("lora.target_modules=[q_proj]", ["lora.target_modules", "q_proj"]),
            ("continue_from=no-such", ["continue_from", "'no-such'"]),
        ],
    )
    def test_what_does_not_fit_the_parent_is_refused(self, parent, write_run, train, override, words, tmp_path):
        path = write_run(continue_from=str(parent), registry=str(tmp_path / "nowhere"))
        result = train(path, override, exit_code=2)
        assert all(word in result.stderr for word in words), result.stderr
        assert not (tmp_path / "nowhere").exists()

    def test_a_registry_that_cannot_be_reached_is_one_line(self, write_run, train):
        path = write_run(continue_from="first", registry="http://127.0.0.1:9")
        result = train(path, exit_code=1)
        assert result.stderr.startswith("error: ") and "127.0.0.1:9" in result.stderr

    def test_an_adapter_of_another_base_is_refused(self, parent, write_run, train, base_folder, tmp_path):
        other = tmp_path / "other"
        shutil.copytree(base_folder, other)
        tensors = load_file(other / "model.safetensors")
        save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, other / "model.safetensors")
        with Registry(tmp_path / "registry") as registry:
            registry.push("first", parent)
        for start in (str(parent), "first:1"):
            path = write_run(continue_from=start, registry=str(tmp_path / "registry"))
            result = train(path, f"base.model={other}", exit_code=2)
            assert "continue_from" in result.stderr and "base" in result.stderr

    def test_the_nearest_reference_is_named(self, write_run, train, parent, tmp_path):
        Registry(tmp_path / "registry").push("first", parent)
        result = train(write_run(continue_from="frist", registry=str(tmp_path / "registry")), exit_code=2)
        assert "'frist'" in result.stderr and "'first'" in result.stderr

    def test_weights_of_other_shapes_are_not_loaded_in_part(self, parent, write_run):
        config = load_config(write_run())
        base = load_base(**config.base.load_options)
        model = attach_adapter(base, config.lora.model_copy(update={"target_modules": ("q_proj",)}))
        before = {name: parameter.clone() for name, parameter in trainable_parameters(model).items()}
        with pytest.raises(ConfigError):
            load_weights(model, parent)
        assert all(torch.equal(before[name], now) for name, now in trainable_parameters(model).items())
