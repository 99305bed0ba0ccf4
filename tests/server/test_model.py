"""How a base is loaded: what it computes in on which device."""

from types import SimpleNamespace

import pytest
import torch

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
