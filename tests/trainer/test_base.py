"""The base under an adapter: how it is quantized and placed, what is raised to float32, and that it stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import EOS, assert_measured, heldout_examples, loss_of, make_base
from bitsandbytes.nn.modules import Linear8bitLt
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig

from loraplex_server.engine.errors import BaseUnusable
from loraplex_server.engine.model import load_base
from loraplex_trainer.adapter import attach, keep_quantized_layout, trainable_parameters
from loraplex_trainer.data import encode_split, read_splits
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.loop import Loop, examples_loss, mean_loss
from loraplex_trainer.run_file import load_config

SLOW = pytest.mark.slow
SCHEMES = [("fp4", True), ("int8", True)] + [
    pytest.param(*scheme, marks=SLOW) for scheme in (("nf4", True), ("nf4", False), ("fp4", False))
]


def frozen_bytes(model: torch.nn.Module, trained: Any) -> dict[str, bytes]:
    state = {key: value for key, value in model.state_dict().items() if key not in trained}
    return {key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in state.items() if value.ndim}


def make_loop(run: Path) -> Loop:
    config = load_config(run)
    base = load_base(**config.base.load_options)
    examples = encode_split(read_splits(config.data)["train"], encoder_for(base, config.data)).examples
    torch.manual_seed(0)
    return Loop(attach(base, config), examples, config, pad_id=EOS)


@pytest.mark.parametrize(("quantization", "double"), SCHEMES)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=SLOW), "bfloat16"])
def test_every_quantization_trains_and_leaves_its_base_as_it_was(write_run, quantization, double, dtype):
    loop = make_loop(write_run(base__quantization=quantization, base__dtype=dtype, base__double_quantization=double))
    before = frozen_bytes(loop.model, loop.parameters)
    assert any(key.endswith("nested_absmax") for key in before) == (double and quantization != "int8")
    assert any(key.endswith("SCB") for key in before) == (quantization == "int8")
    loop.run(lambda _: False)
    evaluated = mean_loss(loop.model, loop.examples, 16, EOS)
    assert loop.losses[-1] < loop.losses[0] - 0.2
    assert frozen_bytes(loop.model, loop.parameters) == before
    loop.model.train()
    with torch.no_grad():
        trained = examples_loss(loop.model, loop.examples, EOS).item() / sum(e.answer_tokens for e in loop.examples)
    # Evaluation is of the model that is trained; other batches round otherwise.
    assert evaluated == pytest.approx(trained, abs=1e-5 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize(("quantization", "double"), SCHEMES)
def test_the_receipt_names_the_quantization_and_the_engine_scores_on_it(
    write_run, train, receipt, quantization, double
):
    run = write_run(base__quantization=quantization, base__dtype="float32", evaluation={"metric": "exact_match"})
    train(run, f"base.double_quantization={json.dumps(double)}")
    scheme = f"{quantization}+double" if double and quantization != "int8" else quantization
    assert receipt()["base"]["quantization"] == f"{scheme}:float32"
    assert_measured(receipt(), "exact_match", served=True)


class TestBloomIn8Bit:
    """The first row of what was done before: BLOOM in 8 bits, device_map auto, rank 16 on query_key_value."""

    @pytest.fixture
    def run(self, write_run, base_folder, tmp_path) -> Path:
        base = {"model": str(make_base(tmp_path / "bloom", base_folder, "bloom"))}
        return write_run(
            base=base | {"quantization": "int8", "dtype": "bfloat16", "device_map": "auto"},
            lora={"rank": 16, "target_modules": ["query_key_value"]},
        )

    def test_the_base_is_bit_identical_after_training_and_norms_logits_and_lora_are_float32(self, run):
        loop = make_loop(run)
        before = frozen_bytes(loop.model, loop.parameters)
        loop.run(lambda _: False)
        assert loop.losses[-1] < loop.losses[0] - 0.05
        assert frozen_bytes(loop.model, loop.parameters) == before
        modules = dict(loop.model.get_base_model().named_modules())
        eight = [name for name, module in modules.items() if isinstance(module, Linear8bitLt)]
        assert len(eight) == 2 * 4 and all(modules[name].weight.dtype == torch.int8 for name in eight)
        norms = [module for module in modules.values() if isinstance(module, torch.nn.LayerNorm)]
        assert len(norms) == 2 * 2 + 2 and {norm.weight.dtype for norm in norms} == {torch.float32}
        assert {parameter.dtype for parameter in loop.parameters.values()} == {torch.float32}
        # What prepare_model_for_kbit_training would also raise: the embeddings, which are the head's weights too.
        assert modules["transformer.word_embeddings"].weight.dtype == torch.bfloat16
        logits = loop.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits
        assert logits.dtype == torch.float32

    def test_it_trains_from_the_command_to_a_folder_of_four_bytes_a_parameter(self, run, train, receipt, tmp_path):
        train(run)
        tensors = load_file(tmp_path / "adapters/tagger/adapter_model.safetensors")
        assert len(tensors) == 4 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        assert sum(tensor.nbytes for tensor in tensors.values()) == 4 * 2 * 16 * (64 + 3 * 64)
        assert receipt()["base"]["quantization"] == "int8:bfloat16"
        assert receipt()["losses"]["train_last"] < receipt()["losses"]["train_first"]


@torch.no_grad()
def test_a_row_of_an_8_bit_base_is_computed_alike_in_any_company_and_mode(base_folder):
    """In LLM.int8's own product a neighbour's large values decide which columns a row's are rounded in."""
    base = load_base(str(base_folder), quantization="int8", device="cpu", dtype="float32")
    layer = next(module for module in base.model.modules() if isinstance(module, Linear8bitLt))
    rows = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    rows[1, 3] = 100.0
    together = layer(rows[None])[0]
    assert torch.equal(together[0], layer(torch.stack([rows[0], -rows[0]])[None])[0, 0])
    weight = layer.state.CB.float() * (layer.state.SCB / 127)[:, None]
    torch.testing.assert_close(together, rows @ weight.T, rtol=1e-5, atol=1e-5)
    layer.train()
    assert torch.equal(layer(rows[None])[0], together)


def test_packed_rows_of_an_8_bit_base_do_not_see_each_other(write_run, train, receipt):
    steps = {"max_steps": 1, "batch_size": 48}
    train(write_run(name="rows", base__quantization="int8", training=steps))
    train(write_run(name="packed", base__quantization="int8", data__packing=True, training=steps))
    assert receipt("packed")["losses"]["train_first"] == pytest.approx(
        receipt("rows")["losses"]["train_first"], abs=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_base_trains_as_the_32_bit_one_does(write_run, train, receipt, dtype):
    """float16 gradients of a mean over many tokens are too small for the type, and were zero."""
    steps = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2}
    train(write_run(name="whole", training=steps))
    train(write_run(name="half", base__dtype=dtype, training=steps))
    for key in ("train_first", "train_last", "heldout"):
        assert receipt("half")["losses"][key] == pytest.approx(receipt("whole")["losses"][key], rel=0.02)


@pytest.mark.parametrize("place", ["auto", {"model": "cpu", "lm_head": "cpu"}], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_device_map_places_the_base(write_run, train, receipt, place):
    base = {"model": load_config(write_run()).base.model, "quantization": "none", "dtype": "float32"}
    train(write_run(name="one"))
    train(write_run(name="map", base=base | {"device_map": place}))
    assert receipt("map")["losses"] == receipt("one")["losses"]


@pytest.mark.parametrize(
    ("place", "word"), [({"model": 0, "lm_head": "cpu"}, "cpu"), ({"model": "disk", "lm_head": "disk"}, "disk")]
)
def test_a_part_of_the_base_off_the_gpu_is_refused(write_run, train, place, word):
    base = {"model": load_config(write_run()).base.model, "device_map": place}
    message = train(write_run(base=base), exit_code=2).stderr
    assert f"a part of the base on {word}" in message and message.count("\n") == 1


@pytest.mark.parametrize(("place", "words"), [({"": 77}, "GPU 77"), ({"": "gpu"}, "'gpu'")])
def test_a_device_that_is_not_there_is_refused(write_run, train, place, words):
    base = {"model": load_config(write_run()).base.model, "device_map": place}
    message = train(write_run(base=base), exit_code=2).stderr
    assert words in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("base.double_quantization=false", ["base.double_quantization", "'none'"]),
        ("base.device_map=auto", ["base.device_map", "base.device = 'cpu'"]),
        ("base.revision=nope", ["revision is 'nope'", "this is a folder"]),
        ("base.device_map=all", ["base.device_map", '"all"', "'auto'"]),
    ],
)
def test_options_of_the_base_that_exclude_each_other_are_refused(write_run, train, override, words):
    message = train(write_run(), override, exit_code=2).stderr
    assert all(word in message for word in words), message


class TestGradientCheckpointing:
    @pytest.mark.parametrize("quantization", ["nf4", *(pytest.param(q, marks=SLOW) for q in ("none", "int8"))])
    def test_loss_and_weights_are_those_without_it(self, write_run, train, receipt, tmp_path, quantization):
        """With dropout on: what is computed again must drop the same."""
        run = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2}, "base__quantization": quantization}
        train(write_run(name="kept", **run))
        train(write_run(name="again", **run, training__gradient_checkpointing=True))
        assert receipt("again")["losses"] == receipt("kept")["losses"]
        kept, again = (
            load_file(tmp_path / "adapters" / name / "adapter_model.safetensors") for name in ("kept", "again")
        )
        assert all(torch.equal(kept[key], again[key]) for key in kept)

    def test_it_keeps_fewer_activations(self, write_run):
        kept = {}
        for checkpointing in (False, True):
            loop = make_loop(write_run(training__gradient_checkpointing=checkpointing))
            loop.model.train()
            sizes: list[int] = []

            def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
                sizes.append(tensor.nbytes)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = examples_loss(loop.model, loop.examples, EOS)
            kept[checkpointing] = sum(sizes)
            loss.backward()
            assert all(parameter.grad is not None for parameter in loop.parameters.values())
        assert kept[True] < 0.5 * kept[False]

    def test_prefix_tuning_has_none_since_it_would_lose_its_prefix(self, write_run, train):
        run = write_run(method="prefix", lora={}, training__gradient_checkpointing=True)
        assert "training.gradient_checkpointing" in train(run, exit_code=2).stderr


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["int8", pytest.param("nf4", marks=SLOW), pytest.param("none", marks=SLOW)])
@pytest.mark.parametrize("lora", [{}, {"init": "pissa"}, pytest.param({"dora": True}, marks=SLOW)], ids=str)
def test_with_the_adapter_off_the_base_answers_exactly(write_run, quantization, lora):
    """No forgetting: what was trained lies beside the base, and can be put aside."""
    run = write_run(base__quantization=quantization, lora={"rank": 4, **lora})
    ids = torch.tensor([[5, 60, 7, 8]])
    base = load_base(**load_config(run).base.load_options)
    keep_quantized_layout(base.model)
    alone = base.model(input_ids=ids).logits
    loop = make_loop(run)
    with torch.enable_grad():
        loop.run(lambda _: False)
    loop.model.eval()
    assert not torch.equal(loop.model(input_ids=ids).logits, alone)
    with loop.model.disable_adapter():
        assert torch.equal(loop.model(input_ids=ids).logits, alone)


@pytest.mark.parametrize("lora", [{"init": "olora"}, {"dora": True}], ids=str)
def test_no_weight_of_the_base_is_in_the_artifact(write_run, train, tmp_path, base_folder, lora):
    train(write_run(lora={"rank": 4, **lora}))
    folder = tmp_path / "adapters/tagger"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in key for key in tensors)
    theirs = {tensor.shape for tensor in load_file(base_folder / "model.safetensors").values() if tensor.ndim > 1}
    assert theirs.isdisjoint(tensor.shape for tensor in tensors.values())
    assert {path.suffix for path in folder.iterdir() if path.is_file()} == {".json", ".md", ".safetensors"}


@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_a_vision_and_language_base_is_refused_with_the_reason(write_run, train, base_folder, tmp_path, task):
    folder = tmp_path / "llava"
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    text = LlamaConfig.from_pretrained(base_folder)
    LlavaConfig(text_config=text, vision_config=CLIPVisionConfig()).save_pretrained(folder)
    message = train(write_run(base={"model": str(folder), "task": task}), exit_code=2).stderr
    assert "vision and language model (llava)" in message and "only language models" in message
    with pytest.raises(BaseUnusable, match="vision"):
        load_base(str(folder))


def test_the_reloaded_adapter_of_a_quantized_run_has_the_loss_of_the_run(write_run, train, receipt, tmp_path):
    run = write_run(base__quantization="int8", base__dtype="float32")
    train(run)
    base = load_base(**load_config(run).base.load_options)
    model = PeftModel.from_pretrained(base.model, str(tmp_path / "adapters/tagger"))
    assert loss_of(model, heldout_examples(run)) == pytest.approx(receipt()["losses"]["heldout"], abs=1e-4)
    assert not trainable_parameters(model)
