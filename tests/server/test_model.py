"""How a base is loaded: what it computes in on which device."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_base

from loraplex_server.engine.errors import BaseUnusable
from loraplex_server.engine.model import _compute_dtype, load_base


@pytest.mark.parametrize(("major", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_gpu_that_only_emulates_bfloat16_computes_in_float16(monkeypatch, major, dtype):
    """Turing (7.5) makes bfloat16 tensors, which torch calls support unless asked not to."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert _compute_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quantization": "int3"}, "'int3', expected one of nf4, fp4, int8, none"),
        ({"task": "images"}, "'images', expected one of causal, seq2seq"),
        ({"device": "cpu", "device_map": "auto"}, "only one of the two"),
        ({"device_map": {}}, "device_map is {}, expected modules to devices"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "a part of the base on cpu"),
    ],
    ids=str,
)
def test_an_option_that_is_not_one_is_refused_before_anything_is_read(tmp_path, options, words):
    with pytest.raises(BaseUnusable, match=words):
        load_base(str(tmp_path / "not there"), **options)


def test_a_base_without_its_weights_has_their_sizes_and_no_memory(base_folder):
    whole, empty = load_base(str(base_folder), quantization="none"), load_base(str(base_folder), weights=False)
    assert {name: tensor.shape for name, tensor in empty.model.named_parameters()} == {
        name: tensor.shape for name, tensor in whole.model.named_parameters()
    }
    assert {tensor.device.type for tensor in empty.model.parameters()} == {"meta"}
    assert (empty.context_tokens, empty.eos_token_ids) == (whole.context_tokens, whole.eos_token_ids)


def _without_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.down_proj" not in name}


def _with_one_cut(tensors):
    return {name: tensor[..., :8].clone() if "down_proj" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "options",
    [{"quantization": "none"}, {"quantization": "nf4"}, {"quantization": "int8"}, {"weights": False}],
    ids=str,
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_without_one, r"lacks 1 of its weights: model.layers.1.mlp.down_proj.weight$"),
        (_with_one_cut, r"2 of its weights .* model.layers.0.mlp.down_proj.weight is \(64, 8\), expected \(64, 128\)$"),
    ],
)
def test_a_base_that_lacks_weights_is_refused(base_folder, tmp_path, change, words, options):
    """transformers fills in random numbers and says so in a table; they were trained on and served."""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseUnusable, match=words):
        load_base(str(folder), device="cpu", **options)


def test_a_revision_of_a_folder_is_refused(base_folder):
    """It was not looked at, and the receipt named it all the same."""
    with pytest.raises(BaseUnusable, match="revision is 'nope', which is for a base of the Hub, and this is a folder"):
        load_base(str(base_folder), "nope", weights=False)


@pytest.mark.parametrize("text", ["{}", "[]", "words", '{"added_tokens": []}'])
def test_a_tokenizer_that_cannot_be_read_is_named(base_folder, tmp_path, text):
    """The message ended in "'added_tokens'", or there was a traceback."""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(BaseUnusable, match=r"no tokenizer can be made of its tokenizer\.json"):
        load_base(str(folder), weights=False)


def test_an_expert_that_is_missing_is_refused(tmp_path):
    """transformers makes one tensor of all experts, and raises RuntimeError where it cannot."""
    folder = make_base(tmp_path / "base", "mixtral")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseUnusable, match="not those of the model in its config"):
        load_base(str(folder), quantization="none", device="cpu")


@pytest.mark.parametrize("options", [{"quantization": "none"}, {"quantization": "nf4"}, {"weights": False}], ids=str)
def test_weights_that_are_tied_are_not_missed(tmp_path, options):
    folder = make_base(tmp_path / "base", tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_base(str(folder), device="cpu", **options).description.tied


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[: len(whole) // 2], lambda whole: b"\xff" * 16 + whole[16:], lambda whole: b""],
    ids=["cut", "header", "empty"],
)
@pytest.mark.parametrize("weights", [True, False])
def test_weights_that_are_damaged_are_refused(base_folder, tmp_path, damage, weights):
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(damage((base_folder / "model.safetensors").read_bytes()))
    with pytest.raises(BaseUnusable, match="no whole safetensors files"):
        load_base(str(folder), device="cpu", weights=weights)
